"""Which formulas look the same: by the table, by what matplotlib draws, and by changing real formulas."""

import random
import re
import time
import unicodedata
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
from conftest import ROOT, execute
from datasets import load_dataset

from qwen_vl_kit import latex, rows, run
from qwen_vl_kit.latex_commands import CHARACTERS, MU

REAL = ROOT.parent / "shared" / "latex_ocr"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real formulas are not at hand")


@pytest.fixture(scope="module")
def texts():
    """The 500 real formulas of the test split."""
    return load_dataset(str(REAL), split="test")["text"]


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what, one, other, alike", latex.TABLE)
def test_what_counts_as_the_same(what, one, other, alike):
    assert latex.same(one, other) == latex.same(other, one) == alike
    assert (latex.normalized(one) == latex.normalized(other)) == alike
    if alike:
        assert latex.same(latex.spelled(one), other)


@pytest.fixture(scope="module")
def drawing():
    """A function: what matplotlib draws, as the signs on each height from left to right and the lines; or None.

    Spaces don't count. Heights are in half points, of a letter of 10.
    """
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.mathtext import MathTextParser

    parser = MathTextParser("path")

    def draw(text):
        text = latex.joined(latex.tokens(text))  # matplotlib draws `{ }` where nothing is to be drawn
        try:
            with matplotlib.rc_context({"mathtext.fontset": "stix"}):
                _, _, _, signs, lines = parser.parse(f"${text}$", dpi=72)
        except ValueError:  # what it can't draw
            return None
        heights, first = defaultdict(list), float(min(signs, key=lambda sign: float(sign[3]))[4])
        for font, size, sign, _, y in sorted(signs, key=lambda sign: float(sign[3])):
            font = font.family_name + font.style_name if chr(sign).isalnum() else ""
            for part in ALIKE.get(chr(sign), chr(sign)).strip():
                mark = "above" if unicodedata.combining(part) else ""  # it may begin left of its letter or right
                heights[mark, round(2 * (float(y) - first))].append((part, font, round(float(size), 1)))
        return dict(heights), sorted(
            (round(2 * float(height)), round(2 * (float(y) - first))) for _, y, _, height in lines
        )

    return draw


# One sign that Unicode has twice, or as several.
ALIKE = {"∣": "|", "∗": "*", "…": "...", "≠": "\u0338=", "⋅": "·", "¤": "·"}
# What is drawn alike although it counts as different: what is different is how far signs are apart, or
# matplotlib does not know it.
DRAWN_ALIKE = {r"D\!\!\!\!/", r"a\,{}_1F_1", r"{x'}^2", r"\epsilon\phi\theta", "ε"}
SIZED = ("sizes of brackets", "accents over one symbol")  # size is drawn, and does not count


def test_pictures_say_the_same(drawing):
    drawn = Counter()
    for what, one, other, alike in latex.TABLE:
        pictures = [drawing(latex.spelled(text) if what == "Unicode" else text) for text in (one, other)]
        if None in pictures or (alike and what in SIZED) or (not alike and one in DRAWN_ALIKE):
            continue
        assert (pictures[0] == pictures[1]) == alike, (one, other)
        drawn[alike] += 1
    assert drawn[True] > 30 and drawn[False] > 30


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, tokens",
    [
        (r"\alpha x", [r"\alpha", "x"]),
        (r"\alphax", [r"\alphax"]),
        (r"a\ xi", ["a", r"\ ", "x", "i"]),
        (r"a \xi", ["a", r"\xi"]),
        (r"\begin { array } {c}", [r"\begin{array}", "{", "c", "}"]),
        (r"\operatorname * {lim}\pi*2", [r"\operatorname*", *"{lim}", r"\pi", "*", "2"]),
        ("x \\", ["x", r"\ "]),
        ("cafe\u0301", [*"caf\u00e9"]),
        (r"$x$", ["x"]),
        (r"$$ \[ x \] $$", ["x"]),
        (r"\begin{equation} x \end{equation}", ["x"]),
        (r"\begin{displaymath}x\end{displaymath}", ["x"]),
        (r"$a$ = $b$", ["$", "a", "$", "=", "$", "b", "$"]),
        (r"\[a\] \[b\]", [r"\[", "a", r"\]", r"\[", "b", r"\]"]),
        (r"$\text{if $x$}$", [r"\text", *"{if$x$}"]),
        ("$x", ["$", "x"]),
        ("", []),
    ],
)
def test_tokens(text, tokens):
    assert latex.tokens(text) == tokens


@pytest.mark.parametrize(
    "text, found",
    [
        ("$x$", "$"), (" $$x$$\n", "$$"), (r"\[x\]", r"\["), (r"\(x\)", r"\("), ("x", ""), ("$a$+$b$", ""), ("$", ""),
        (r"\begin{equation*}x\end{equation*}", r"\begin{equation*}"), (r"\begin{array}{c}x\end{array}", ""),
    ],
)  # fmt: skip
def test_what_stands_around_a_formula(text, found):
    assert latex.delimiter(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "$$", "{", "}", "{x", "x}", "}{", r"\frac", r"\frac{a}", r"x^", "x^2^3", "x_1_2", r"x^{2}'",
        r"\left( x",
        r"x \right)", r"\left a \right)", "$x", r"\[x", r"\begin{array}{c} x", r"\begin{array}{c} x \end{matrix}",
        r"\begin{array}{c} a & b \end{array}", r"\begin{array}{c?} a \end{array}", r"\hspace{x}", r"\kern x",
        r"\limits_x",
        "{" * 5000 + "}" * 5000, r"\hat" * 5000 + "x", "x^{" * 5000 + "}" * 5000, r"\left(" * 500 + r"\right)" * 500,
    ],
)  # fmt: skip
def test_what_is_not_latex(text):
    assert latex.looks(text) is None and not latex.same(text, text)
    assert latex.spelled(text) == text
    assert isinstance(latex.normalized(text), list)


# ---------------------------------------------------------------------------------------------------------------------
# Real formulas in other spellings
# ---------------------------------------------------------------------------------------------------------------------

SPACE = r"(?<!\\)(?:\\[,;:! ]|~|\\q?quad\b|\\(?:enspace|nonumber)\b)\s*"
OVER = re.compile(r"(?:\\!\s*){2,}|\\hspace \{ -")  # two signs over one another: that is seen
RESPELLED = {  # what people write in place of what the data set has, each by a rule
    "spacing": lambda text: text if OVER.search(text) else re.sub(rf"{SPACE}(?!\s*(?:\{{ \}} )?[_^])", "", text + " "),
    "left and right": lambda text: re.sub(r"\\(left|right)(?=[^a-z])\s*(\.|(?=[^<>.]))", "", text),
    "operatorname": lambda text: re.sub(
        r"\\operatorname \{ ((?:\w )+)\}",
        lambda found: f"\\{name} " if (name := found[1].replace(" ", "")) in NAMES else found[0],
        text,
    ),
    "bar and overline": lambda text: re.sub(r"\\bar \{ (\w|\\[a-z]+) \}", r"\\overline \1", text),
    "big": lambda text: re.sub(r"\\[bB]igg?[lr]? ", "", text),
    "array and matrix": lambda text: re.sub(
        r"\\begin\{array\} \{ [c ]+\}(((?!\\begin).)*?)\\end\{array\}", r"\\begin{matrix}\1\\end{matrix}", text
    ),
    "primes": lambda text: re.sub(r"\^ \{ ((?:\\prime )+)\}", lambda found: "'" * found[1].count("p"), text),
    "vert": lambda text: re.sub(r"\\(?:vert|mid)\b", "|", text).replace(r"\Vert", r"\|"),
    "empty groups": lambda text: re.sub(r"(?<=& )\{ \}|\{ \}(?= (?:&|\\\\))", "", text),
    "displaystyle": lambda text: re.sub(r"^\\displaystyle|(?<=\\sqrt \{ )\\displaystyle", "", text),
    "bf": lambda text: re.sub(r"\{ \\(bf|cal) (\w(?: \w)*) \}", r"\\math\1 { \2 }", text),
    "dots": lambda text: re.sub(r"\\l?dots\b", r"\\dots", text).replace(r"\dots ", ". . . "),
    "primes and powers": lambda text: re.sub(r"([_^]) \{ (\w) \}(?! ')", r"\1 \2", text),
    "no needless spaces": lambda text: re.sub(
        r"(\\[A-Za-z]+)\s+(?=[A-Za-z])|(\\\s)|\s+", lambda m: m[1] + " " if m[1] else m[2] or "", text
    ),
    "more braces": lambda text: "{ " + re.sub(r"([_^]) \{ (\w) \}", r"\1 { { \2 } }", text) + " }",
    "in dollars": lambda text: f"$ {text} $",
}
NAMES = {"ln", "log", "sin", "cos", "tan", "exp", "sinh", "cosh", "tanh", "cot", "coth", "dim", "arg", "ker", "deg"}


@real
@pytest.mark.parametrize("rule", RESPELLED)
def test_other_spellings_of_real_formulas_look_the_same(rule, texts):
    pairs = [(text, RESPELLED[rule](text)) for text in texts]
    changed = [(old, new) for old, new in pairs if latex.tokens(old) != latex.tokens(new) or "spaces" in rule]
    assert changed or rule == "in dollars", "the rule changes nothing"
    assert [pair for pair in changed if not latex.same(*pair)] == []


@real
def test_spelled_formulas_are_drawn_as_before(texts, drawing):
    chance, drawn = random.Random(1), 0
    for text in texts:
        spelled = latex.spelled(text)
        assert latex.same(spelled, text) and latex.spelled(spelled) == spelled
    for text in chance.sample(texts, 20):
        # matplotlib does not take ' for a superscript in a superscript.
        if "'" not in text and (before := drawing(text)) and (after := drawing(latex.spelled(text))):
            assert before == after, text
            drawn += 1
    assert drawn > 8


@pytest.mark.parametrize(
    "text, spelled",
    [
        (r"$ \frac 1 2 x ^ 2 $", r"\frac { 1 } { 2 } x ^ { 2 }"),
        (r"{ \bf a } \le α _ 1 ^ { \prime }", r"\mathbf { a } \leq \alpha _ { 1 } '"),
        (r"\operatorname { l n } { ( x ) }", r"\ln { ( x ) }"),
        (
            r"\left( \begin{array} { c c } { 1 } & { } \\ \end{array} \right)",
            r"\left ( \begin{array} { c c } 1 & \end{array} \right )",
        ),
        (r"\text{for all } x", r"\text{for all } x"),
        (r"\textrm { f o r } \, x", r"\textrm{for} \, x"),
        (r"{n \choose k} + {a \atop b}", r"\binom { n } { k } + { a \atop b }"),
        (r"x^2_1 \, .", r"x _ { 1 } ^ { 2 } \, ."),
        (r"∑_{i=1}^∞ x²", r"\sum _ { i = 1 } ^ { \infty } x ^ { 2 }"),
        (r"x \quad", "x"),
        (r"\hspace { 0 . 3 c m } a \hspace { 2 e m } b", r"a \hspace{2em} b"),
        ("50% of {x", "50% of {x"),
    ],
)
def test_one_spelling(text, spelled):
    assert latex.spelled(text) == spelled == latex.spelled(spelled)


def test_characters_have_commands_that_look_like_them():
    for character, found in CHARACTERS.items():
        assert all(map(str.isascii, found)), character
        assert found[0] in ("'", "^") or latex.same(character, " ".join(found)), character


# ---------------------------------------------------------------------------------------------------------------------
# Real formulas, changed
# ---------------------------------------------------------------------------------------------------------------------


def closing(tokens, at):
    """Where the group that begins at `at` ends."""
    depth = 0
    for place in range(at, len(tokens)):
        depth += (tokens[place] == "{") - (tokens[place] == "}")
        if not depth:
            return place
    return None


def changed(tokens, words, chance):
    """The tokens of a formula with one change at random, or None."""
    tokens, at = [*tokens], chance.randrange(len(tokens))
    kind = chance.choice(["delete", "swap", "replace", "insert", "double", "unbrace", "brace"])
    if kind == "delete":
        del tokens[at]
    elif kind == "swap":
        tokens[at : at + 2] = tokens[at : at + 2][::-1]
    elif kind == "replace":
        tokens[at] = chance.choice(words)
    elif kind in ("insert", "double"):
        tokens.insert(at, tokens[at] if kind == "double" else chance.choice(words))
    elif kind == "brace":
        tokens.insert(min(at + chance.randint(1, 4), len(tokens)), "}")
        tokens.insert(at, "{")
    else:
        groups = [place for place, token in enumerate(tokens) if token == "{"]
        if not groups or not (end := closing(tokens, start := chance.choice(groups))):
            return None
        del tokens[end], tokens[start]
    return tokens


# Commands that draw nothing by themselves: they may come and go where what they change is not there.
QUIET = r"""
    { } & \\ \left \right \displaystyle \textstyle \scriptstyle \scriptscriptstyle \limits \mathrm \mathbf \mathcal
    \mathit \mathsf \cal \bf \it \rm \tt \sl \sf \mit \operatorname \operatorname* \big \Big \bigg \Bigg \bigl \bigr
    \Bigl \Bigr \biggl \biggr \Biggl \Biggr \smash \mathord \mathbin \mathrel \textrm \textup \textit \textnormal
    \makebox \emph
"""
QUIET = {*QUIET.split(), *MU}
GROUP = r"(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\S+)"
HIDDEN = re.compile(rf"\\(?:[hv]space|label|h?phantom|vphantom|begin\{{array\}}) {GROUP}")


def shown(tokens):
    """The tokens that are seen as a sign, in their order."""
    seen = HIDDEN.sub("", " ".join("~" if token == r"\ " else token for token in tokens))
    seen = seen.replace(r"\prime", "'").replace(r"\sb ", "_ ").replace(r"\sp ", "^ ")
    return [token for token in seen.split() if token not in QUIET]


@real
def test_changed_formulas_look_the_same_only_if_nothing_is_seen_of_it(drawing):
    """The whole set, 35,000 changes, takes half a minute (and more to draw): here a tenth."""
    every = [text for split in load_dataset(str(REAL)).values() for text in split["text"]]
    chance = random.Random(2)
    words = {token for text in every[:2000] for token in latex.tokens(text)}
    words = sorted(token for token in words if token not in "{}" and not token.startswith((r"\begin", r"\end")))
    counts, alike = Counter(), []
    for text in chance.sample(every, 600):
        tokens, before = latex.tokens(text), latex.looks(text)
        for _ in range(4):
            new = changed(tokens, words, chance)
            if new is None or new == tokens or (after := latex.looks(" ".join(new))) is None:
                continue
            counts[after == before] += 1
            if after == before:
                assert shown(tokens) == shown(new), (text, " ".join(new))
                alike.append((text, " ".join(new)))
    assert counts[True] > 300 and counts[False] > 900
    drawn = 0
    for one, other in chance.sample(alike, 40):
        # matplotlib's fonts change brackets and small Greek letters, too; it knows no limits beside an operator.
        if re.search(
            r"\\(left|right|[bB]ig|bf|mathbf|operatorname|rm|sum|prod|bar|hat|tilde|overline|wide)", one + other
        ):
            continue
        if (before := drawing(one)) and (after := drawing(other)):
            assert before == after, (one, other)
            drawn += 1
    assert drawn > 3


@real
def test_another_symbol_looks_different(texts):
    named = r"\\(operatorname\*?|hspace\*?|begin) \{[^}]*$|\\begin\{array\} \{[^}]*$"
    checked = 0
    for text in texts:
        tokens = text.split()
        for at, token in enumerate(tokens):
            if re.fullmatch(r"[A-Za-z0-9]|\\(alpha|theta|mu|pi|phi|Delta|infty)", token):
                if re.search(named, " ".join(tokens[:at])):
                    continue
                other = " ".join([*tokens[:at], "Q" if token != "Q" else "q", *tokens[at + 1 :]])
                assert not latex.same(text, other)
                checked += 1
                break
    assert checked > 450


@real
def test_judging_is_quick(texts):
    began = time.process_time()
    assert all(latex.looks(text) and latex.normalized(text) for text in texts)
    assert time.process_time() - began < 3  # measured: 0.15 s


# ---------------------------------------------------------------------------------------------------------------------
# In a run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, uniform, said",
    [
        (["x", "y"], False, ""),
        (["$x$", "y", "$z$"], False, "2 of 3 texts stand in $...$: the model learns all of that; --normalize_latex "),
        (["$x$", r"\[y\]"], False, r"1 of 2 texts stand in $...$, 1 of 2 texts stand in \[...\]: the model learns all"),
        (["$x$", "$y$"], False, "2 of 2 texts stand in $...$, and so will readings"),
        (["$x$", "y"], True, "1 of 2 texts stand in $...$: that is taken off"),
    ],
)
def test_delimiters_are_told(texts, uniform, said, monkeypatch):
    monkeypatch.setattr(run, "extra", SimpleNamespace(normalize_latex=uniform))
    sentence = rows.delimited(texts)
    assert sentence.startswith(said) and bool(sentence) == bool(said)


def test_a_run_in_one_spelling(tiny, tmp_path, capsys):
    data = load_dataset("parquet", data_files=tiny[3], split="train")
    ways = "{}", "${}$", r"\[ {} \]", r"\begin{{equation}} {} \end{{equation}}"
    data.map(lambda row, at: {"text": ways[at % 4].format(row["text"])}, with_indices=True).to_parquet(
        tmp_path / "rows.parquet"
    )
    options = [*tiny, "--dataset_name", tmp_path / "rows.parquet", "--output_dir", tmp_path / "out", "--max_steps", "2"]
    names = execute(*options, "--normalize_latex", "true")
    answers = [sample["answer"].removesuffix("<|im_end|>") for sample in names["train_set"]]
    plain = {latex.spelled(text) for text in data["text"]}
    assert {*answers, *names["truths"]} <= plain and len({*answers}) > 2
    said = capsys.readouterr().out
    assert "texts stand in" in said and "that is taken off" in said and "in one spelling" in said
    assert names["metrics"]["settings"]["save_steps"] == 1
    text = (tmp_path / "out/metrics.json").read_text()
    assert '"normalize_latex": true' in text
    with pytest.raises(SystemExit):
        execute(*options, "--resume_from_checkpoint", "true", "--max_steps", "3")
    assert "was made with --normalize_latex True, not False" in capsys.readouterr().err
