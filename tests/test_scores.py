"""The scores of the kit, against cases counted by hand and against real formulas spelled in other ways."""

import math
import random
import re

import pytest
from conftest import ROOT
from datasets import load_dataset
from rapidfuzz.distance import Levenshtein

from qwen_vl_kit import report_page, scores

REAL = ROOT.parent / "shared" / "latex_ocr"


def reading(truth, text, cut=False):
    """A reading as the script writes it."""
    truth, read = ("".join(latex.split()) for latex in (truth, text))
    return {"text": text, "cut": cut, "errors": Levenshtein.distance(truth, read), "length": len(truth)}


def corpus(*pairs):
    """Predictions of which the readings before are empty and those after are the second of each pair."""
    return [
        {"truth": truth, "before": reading(truth, "", cut=True), "after": reading(truth, text)} for truth, text in pairs
    ]


def after(*pairs):
    return scores.score(corpus(*pairs), seed=1)[1]


def test_scores_counted_by_hand():
    assert after(("a b", "a b")) == {
        "cer": 0, "bleu": pytest.approx(1), "exact_match": 1, "formula_match": 1, "is_latex": 1, "cut": 0
    }  # fmt: skip
    # 1 of 3 and 2 of 5 characters: 3 of 8.
    assert after(("abc", "abd"), ("a b c d e", "abc"))["cer"] == 3 / 8
    assert after(("x", "x"), ("x", "y"), (r"x ^ 2 _ 1", "x_1^2"), ("x", "{x"))["formula_match"] == 2 / 4
    assert after(("x", "x"), ("x", "y"), (r"x ^ 2 _ 1", "x_1^2"), ("x", "{x"))["exact_match"] == 1 / 4
    assert after(("x", "x"), ("x", "{x"), ("x", r"\frac"), ("x", ""))["is_latex"] == 1 / 4
    # All runs agree, but one of five tokens is missing: only the brevity penalty.
    assert after(("a b c d e", "abcd"))["bleu"] == pytest.approx(math.exp(1 - 5 / 4))
    # 4 of 5 tokens, 3 of 4 pairs, 2 of 3 triples and 1 of 2 runs of four; a command is one token.
    assert after((r"a b c d \alpha", r"abcd\beta"))["bleu"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))
    predictions = corpus(("x", "x"), ("x", "x"))
    predictions[0]["after"]["cut"] = True
    assert scores.score(predictions, seed=1)[1]["cut"] == 1 / 2


@pytest.mark.parametrize(
    "one, other",
    [
        ("x^2_1", "x _ { 1 } ^ { 2 }"),
        (r"\frac12", r"{\frac{1}{2}}"),
        (r"\frac { 1 2 } { a }", r"\frac{12}a"),
        (r"\sqrt { { x } }", r"\sqrt x"),
        (r"x'", r"x^{\prime}"),
        (r"a \le b", r"a\leq b"),
        (r"\operatorname* { l i m } _ { x }", r"\operatorname*{lim}_x"),
        (r"\begin{array}{cc} a & b \\ c & d \end{array}", r"\begin{array}{cc}a&b\\c&d\end{array}"),
    ],
)
def test_spelling_does_not_count(one, other):
    assert scores.mathml(one) == scores.mathml(other) is not None


@pytest.mark.parametrize(
    "one, other",
    [
        ("x^2", "x_2"), ("x_{12}", "x_12"), (r"\alpha x", r"\alphax"), ("a+b", "a-b"), (r"\mathrm{x}", "x"),
        (r"\left( x \right)", "( x )"), (r"\frac{a}{b}", r"\frac{b}{a}"), ("ab", "ba"), (r"\hat{a}b", r"\hat{ab}"),
    ],
)  # fmt: skip
def test_what_is_seen_counts(one, other):
    assert scores.mathml(one) != scores.mathml(other)


@pytest.mark.parametrize(
    "text", ["", " ", "{", "}", "{x", "x}", "}{", r"\frac", r"x^", r"\left( x", "{" * 5000 + "}" * 5000]
)
def test_what_is_not_latex(text):
    assert scores.mathml(text) is None and report_page.drawing(text) is None


def swap_scripts(latex):
    """`x _ { a } ^ { b }` becomes `x ^ { b } _ { a }`."""
    tokens, out, i = latex.split(), [], 0

    def group(start):
        """Where the group or token that begins at `start` ends."""
        depth = 0
        for place in range(start, len(tokens)):
            depth += (tokens[place] == "{") - (tokens[place] == "}")
            if depth == 0:
                return place + 1
        return None

    while i < len(tokens):
        middle = group(i + 1) if tokens[i] in "_^" else None
        if middle and middle < len(tokens) and tokens[middle] in "_^" and tokens[middle] != tokens[i]:
            end = group(middle + 1)
            out += tokens[middle:end] + tokens[i:middle]
            i = end
        else:
            out.append(tokens[i])
            i += 1
    return " ".join(out)


RULES = {
    "no needless spaces": lambda latex: re.sub(
        r"(\\[A-Za-z]+)\s+(?=[A-Za-z])|(\\\s)|\s+", lambda m: m[1] + " " if m[1] else m[2] or "", latex
    ),
    "no needless braces": lambda latex: re.sub(r"([_^]) \{ (\w) \}(?! ')", r"\1 \2", latex),
    "more braces": lambda latex: "{ " + re.sub(r"([_^]) \{ (\w) \}", r"\1 { { \2 } }", latex) + " }",
    "scripts in the other order": swap_scripts,
}


def formulas():
    """200 real ones where they are at hand, else the demo's."""
    texts = load_dataset(str(REAL) if REAL.is_dir() else "demo/data", split="test")["text"]
    # A backslash at the very end is half of a token; the converter has to understand the formula in the first place.
    usable = [text for text in texts if not text.endswith("\\") and scores.mathml(text)]
    return random.Random(1).sample(usable, 200)


@pytest.mark.parametrize("rule", RULES)
def test_other_spellings_of_real_formulas_match(rule, monkeypatch):
    monkeypatch.chdir(ROOT)
    texts = formulas()
    respelled = [RULES[rule](text) for text in texts]
    assert sum(old != new for old, new in zip(texts, respelled, strict=True)) > 0, "the rule changes nothing"
    assert after(*zip(texts, respelled, strict=True))["formula_match"] == 1


def test_another_symbol_does_not_match(monkeypatch):
    monkeypatch.chdir(ROOT)
    pairs, symbol = [], r"[A-Za-z0-9]|\\(alpha|theta|mu|pi|phi|Delta|infty)"
    for text in formulas():
        tokens = text.split()
        # The first letter or digit, but for those in the names of operators, lengths and columns, which are no symbols.
        named = r"\\(operatorname\*?|hspace\*?|begin) \{[^}]*$|\\begin\{array\} \{[^}]*$"
        places = (
            i
            for i, token in enumerate(tokens)
            if re.fullmatch(symbol, token) and not re.search(named, " ".join(tokens[:i]))
        )
        place = next(places)
        tokens[place] = "Q" if tokens[place] != "Q" else "q"
        pairs.append((text, " ".join(tokens)))
    assert after(*pairs)["formula_match"] == 0


def test_the_script_s_own_count_is_what_counts():
    """CER and exact match are computed once, by the script."""
    (row,) = predictions = corpus(("abcd", "abcx"))
    row["after"] |= {"errors": 0, "length": 8}
    assert scores.score(predictions, seed=1)[1]["cer"] == 0
    assert row["after"]["exact_match"] and row["after"]["formula_match"]


def test_intervals_say_what_the_rows_can_show():
    # Half of 400 rows are put right: by the normal approximation the interval is 0.5 +- 1.96 * sqrt(0.25 / 400).
    half = corpus(*[("x", "x"), ("x", "y")] * 200)
    difference = scores.score(half, seed=1)[2]["exact_match"]
    assert difference["value"] == 0.5
    assert difference["interval"] == pytest.approx([0.5 - 0.049, 0.5 + 0.049], abs=0.001)
    assert scores.score(half, seed=1)[2]["exact_match"] == difference, "not decided by the seed"
    assert scores.verdict("exact_match", difference) == "better"
    assert scores.verdict("cer", {"interval": [0.1, 0.2]}) == "worse"
    assert scores.verdict("cer", {"interval": [-0.1, 0.2]}) == "no clear change"


def test_marks_are_on_what_differs():
    assert report_page.marked("a + b", "a - b") == [
        ["a ", False], ["+", True], [" b", False]
    ]  # fmt: skip
    assert report_page.marked("x _ 1", "x_1") == [["x _ 1", False]]
    assert report_page.marked("", "x") == []
    assert (
        "".join(piece for piece, _ in report_page.marked(r"\frac { a } { b }", r"\frac{a}{c}")) == r"\frac { a } { b }"
    )
