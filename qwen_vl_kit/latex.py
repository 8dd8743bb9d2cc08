r"""LaTeX: its tokens, one spelling for all ways to write a formula, and when two formulas look the same.

Wraps no step. `scores` compares formulas with it, `rows` respells texts with it for --normalize_latex.

A formula is parsed as TeX would (`Parser`). From there it is written in two ways:

- `spelled` keeps what is seen, spaces and sizes included, and makes the spelling uniform: for training.
- `normalized` drops what does not count as different, too: `TABLE` says what does and what does not, row by row.
  Two formulas look the same if that leaves the same tokens.

A command that is not known stands for itself, with the groups right after it: where it is not certain that two
spellings look the same, they count as different.
"""

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, groupby

from qwen_vl_kit.latex_commands import (
    ACCENTS,
    ALIASES,
    ALIGNED,
    ANGLES,
    ARGUMENTS,
    AROUND_TABLES,
    BIG,
    BIGGER,
    BRACES,
    BRACKETED,
    BRACKETS,
    BY_BRACES,
    CHARACTERS,
    CLASSES,
    CLOSING,
    DECLARED,
    DISPLAYED,
    DOTS,
    DRAWN,
    FILLS,
    FONT,
    FONTS,
    FRACTIONS,
    FUNCTIONS,
    GREEK,
    INFIX,
    INTEGRALS,
    KERNS,
    LENGTHS,
    LIMITS,
    MU,
    NEGATED,
    OPENING,
    OPTIONAL,
    ORDINARY,
    OTHER_TABLES,
    PHANTOMS,
    RAISED,
    ROW_ENDS,
    SIZES,
    SMALL_GREEK,
    SPACES,
    STACKS,
    STYLES,
    TEXTS,
    UNITS,
    UNSEEN,
    WIDE,
    is_known,
)

LENGTH = re.compile(r"=?([+-]*)(\d*[.,]?\d*)(?:true)?(mu|em|ex|pt|bp|pc|mm|cm|in)")


class NotLatex(ValueError):
    """Why a text can't be LaTeX: braces that don't match, a command without its arguments, two superscripts."""


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------

# `%` is a sign like others: formulas to be read have no comments. Of the commands with a star, these are in use.
TOKEN = re.compile(
    r"\\(?:begin|end)\s*\{[^{}]*\}|\\(?:operatorname|hspace|vspace|tag)\s*\*|\\[A-Za-z]+|\\.|\\$|\S", re.DOTALL
)
ENVIRONMENTS = ["equation", "equation*", "displaymath", "math"]
DELIMITERS = [(["$", "$"], ["$", "$"]), (["$"], ["$"]), ([r"\["], [r"\]"]), ([r"\("], [r"\)"])]
AROUND = {"$": "$...$", "$$": "$$...$$", r"\[": r"\[...\]", r"\(": r"\(...\)"}
AROUND |= {rf"\begin{{{name}}}": rf"\begin{{{name}}}...\end{{{name}}}" for name in ENVIRONMENTS}
DELIMITERS += [([rf"\begin{{{name}}}"], [rf"\end{{{name}}}"]) for name in ENVIRONMENTS]


def tokens(text):
    """The TeX tokens of a formula, [str], without the delimiters around it (`$`, `\\[`, `equation`, ...).

    Spaces are no tokens, `\\ ` is one, and so is `\\begin{array}`. Unicode is composed (NFC).
    """
    return bare(all_tokens(text))[0]


def all_tokens(text):
    found = TOKEN.findall(unicodedata.normalize("NFC", text))
    # A backslash at the very end is `\ ` whose space was stripped.
    return [r"\ " if token == "\\" or token[1:].isspace() else "".join(token.split()) for token in found]


def bare(found):
    """The tokens inside of the delimiters, and the first of the outermost delimiter, "" if there is none."""
    outermost = ""
    while True:
        for opening, closing in DELIMITERS:
            size = len(opening)
            inner = found[size:-size]
            if len(found) >= 2 * size and found[:size] == opening and found[-size:] == closing:
                if not stands_alone(inner, closing[0]):
                    continue
                outermost = outermost or "".join(opening)
                found = inner
                break
        else:
            return found, outermost


def stands_alone(inner, closing):
    """Whether a delimiter is not closed before the end: in `$a$ + $b$` it is."""
    depth = 0
    for token in inner:
        depth += (token == "{") - (token == "}")
        if depth == 0 and token == closing:
            return False
    return True


def delimiter(text):
    """What stands around a formula, such as "$", or "" if nothing does."""
    text = text.strip()
    return bare(all_tokens(text))[1] if text[:1] == "$" or text[:2] in (r"\[", r"\(", r"\b") else ""


def with_commands(found):
    """Tokens with commands in place of Unicode characters: `α²` becomes `\\alpha ^ { 2 }`."""
    if all(map(str.isascii, found)):
        return found
    out = []
    for script, run in groupby(found, key=lambda token: RAISED.get(token, [""])[0]):
        if script:
            out += [script, "{", *(RAISED[token][1] for token in run), "}"]
        else:
            for token in run:
                out += [token] if token.isascii() else CHARACTERS.get(token, [token])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Parsing
# ---------------------------------------------------------------------------------------------------------------------

DEEPEST = 80  # things in one another; Python's own limit would end the run


class Parser:
    """Parses the tokens of a formula into nodes, tuples whose first element says what they are.

    ("symbol", token), ("space", tokens, width in mu), ("group", nodes), ("command", name, option, arguments),
    ("scripts", base, below, above, limits), ("declare", tokens), ("text", name, nodes), ("formula", nodes), in a text,
    ("pair", opening, nodes, closing), ("bracket", size, token), ("table", name, position, columns, rows). Raises
    NotLatex.
    """

    def __init__(self, found):
        self.tokens, self.at, self.depth, self.in_text = found, 0, 0, False

    def formula(self):
        nodes = self.row()
        if self.at < len(self.tokens):
            raise NotLatex(f"{self.tokens[self.at]} without its beginning")
        return nodes

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def next(self):
        if self.at == len(self.tokens):
            raise NotLatex("it ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, token):
        if self.next() != token:
            raise NotLatex(f"{token} is missing")

    def row(self, ends=()):
        """The nodes up to one of `ends`, or to the end of what surrounds them."""
        self.deeper()
        nodes = []
        while (token := self.peek()) is not None:
            if token in ("}", r"\right", *ends) or token.startswith(r"\end{"):
                break
            if token in INFIX:
                self.at += 1
                above = [node for node in nodes if node[0] == "declare"]  # these hold on
                nodes = [("command", INFIX[token], None, [nodes, above + self.row(ends)])]
                break
            nodes.append(self.with_scripts())
        self.depth -= 1
        return nodes

    def deeper(self):
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotLatex("too many things in one another")

    def with_scripts(self):
        """The next node with its sub- and superscript."""
        token = self.peek()
        base = ("group", []) if self.is_script(token) else self.atom()
        if base[0] in ("space", "declare"):
            return base
        below = above = limits = None
        while (token := self.peek()) is not None:
            if token in (r"\limits", r"\nolimits", r"\displaylimits"):
                limits = self.next()
            elif not self.is_script(token):
                break
            elif token in ("_", r"\sb"):
                if below is not None:
                    raise NotLatex("two subscripts")
                self.at += 1
                below = self.script()
            else:
                if above is not None:
                    raise NotLatex("two superscripts")
                above = []
                while self.peek() == "'":
                    above.append(("symbol", r"\prime"))
                    self.at += 1
                if self.peek() in ("^", r"\sp"):
                    self.at += 1
                    above += self.script()
        return base if below is above is limits is None else ("scripts", base, below, above, limits)

    def is_script(self, token):
        return token in ("_", "^", r"\sb", r"\sp") or (token == "'" and not self.in_text)

    def script(self):
        if self.peek() in MU or self.peek() in KERNS:
            raise NotLatex("a space as a script")
        return self.argument()

    def argument(self):
        """The nodes of a command's argument: a group, or what comes next."""
        token = self.peek()
        if token == "{":
            return self.group()
        if token is None or token in ("}", "&", r"\\", r"\cr", r"\right", "^", "_") or token.startswith(r"\end{"):
            raise NotLatex("an argument is missing")
        return [self.atom()]

    def group(self):
        self.expect("{")
        nodes = self.row()
        self.expect("}")
        return nodes

    def option(self):
        """The nodes in brackets, or None."""
        if self.peek() != "[":
            return None
        self.at += 1
        nodes = self.row(("]",))
        self.expect("]")
        return nodes

    def atom(self):
        """The next node, with its arguments and without scripts."""
        self.deeper()
        node = self.node(self.next())
        self.depth -= 1
        return node

    def node(self, token):
        if token == "{":
            self.at -= 1
            return ("group", self.group())
        if token in MU:
            return ("space", [SPACES.get(token, token)], MU[token])
        if token in KERNS:
            return self.kern(token)
        if token in DECLARED or token in STYLES or token in SIZES:
            return ("declare", [token])
        if token in TEXTS:
            return self.text(token)
        if token == "$" and self.in_text:
            return self.formula_in_text()
        if token in ("$", r"\(", r"\)", r"\[", r"\]") and not self.in_text:
            raise NotLatex(f"{token} within a formula")
        if token == r"\left":
            return self.pair()
        if token == r"\middle" or token in BIGGER:
            return ("bracket", token, self.bracket())
        if token.startswith(r"\begin{"):
            return self.table(token[7:-1])
        if token in BY_BRACES:
            self.expect("{")
            rows = self.rows("}")
            return ("table", BY_BRACES[token], None, [], rows)
        if token in ARGUMENTS:
            return self.command(token)
        if token == r"\buildrel":
            above = self.row((r"\over",))
            self.expect(r"\over")
            return ("command", r"\stackrel", None, [above, self.argument()])
        if token in (r"\color", r"\cline"):
            return ("declare", [token, *self.raw()])
        if token in (r"\limits", r"\nolimits", r"\displaylimits"):
            raise NotLatex(f"{token} without an operator")
        if token[0] == "\\" and token[1:].isalpha() and not is_known(token):
            arguments = []
            while self.peek() == "{":
                arguments.append(self.group())
            return ("command", token, None, arguments)
        return ("symbol", token)

    def command(self, name):
        option = self.option() if name in OPTIONAL else None
        if name in LENGTHS:
            found = self.raw()
            length = "".join(found[1:-1])
            if "\\" not in length and not LENGTH.match(length):
                raise NotLatex(f"{name} without a length")
            return ("space", [name, *found], width_of(length) if name.startswith(r"\h") else 0)
        if name == r"\label":
            self.argument()
            return ("space", [], 0)
        start = self.at
        if name == r"\not":  # \not\!\!D
            spaces = []
            while self.peek() in MU:
                spaces.append(self.atom())
            return ("command", name, None, [spaces + self.argument()])
        arguments = [self.argument() for _ in range(ARGUMENTS[name])]
        if name in PHANTOMS:
            return ("space", [name, *self.tokens[start : self.at]], 0 if name == r"\vphantom" else 18)
        return ("command", name, option, arguments)

    def kern(self, name):
        """A length without braces, as TeX's own commands have them."""
        found = LENGTH.match("".join(self.tokens[self.at : self.at + 16]))
        if not found:
            raise NotLatex(f"{name} without a length")
        start = self.at
        while len("".join(self.tokens[start : self.at])) < found.end():
            self.at += 1
        return ("space", [name, *self.tokens[start : self.at]], width_of(found[0]))

    def raw(self):
        """The tokens of a group as they are, with its braces."""
        start, depth = self.at, 0
        if self.peek() != "{":
            return ["{", self.next(), "}"]
        while True:
            token = self.next()
            depth += (token == "{") - (token == "}")
            if not depth:
                return self.tokens[start : self.at]

    def text(self, name):
        outer, self.in_text = self.in_text, True
        nodes = self.argument()
        self.in_text = outer
        return ("text", name, nodes)

    def formula_in_text(self):
        self.in_text = False
        nodes = self.row(("$",))
        self.expect("$")
        self.in_text = True
        return ("formula", nodes)

    def bracket(self):
        token = self.next()
        if token not in BRACKETS:
            raise NotLatex(f"{token} is no bracket")
        return ALIASES.get(ANGLES.get(token, token), ANGLES.get(token, token))

    def pair(self):
        opening = self.bracket()
        nodes = self.row()
        self.expect(r"\right")
        return ("pair", opening, nodes, self.bracket())

    def table(self, name):
        position, columns = None, []
        if name == "array" or name in ALIGNED:
            position = self.raw_option()
        if name in ("array", "tabular", "alignedat"):
            columns = self.raw()[1:-1]
        return ("table", name, position, columns, self.rows(rf"\end{{{name}}}"))

    def raw_option(self):
        """The letter of an option, such as [t], or None."""
        if self.tokens[self.at : self.at + 1] == ["["] and self.tokens[self.at + 2 : self.at + 3] == ["]"]:
            self.at += 3
            return self.tokens[self.at - 2]
        return None

    def rows(self, end):
        """The rows of a table up to `end`, each its cells' nodes and the tokens of the gap below it, such as [2pt]."""
        rows = [([], [])]
        while True:
            rows[-1][0].append(self.row(("&", *ROW_ENDS)))
            token = self.next()
            if token == end:
                return rows
            if token != "&" and token not in ROW_ENDS:
                raise NotLatex(f"{end} is missing")
            if token == "&":
                continue
            if self.peek() == "*":
                self.at += 1
            if re.match(rf"\[\s*{LENGTH.pattern}", "".join(self.tokens[self.at : self.at + 16])):
                start = self.at
                while self.next() != "]":
                    pass
                rows[-1][1].extend(self.tokens[start : self.at])
            rows.append(([], []))


def width_of(length):
    """A length in mu, 1/18 em, at 10 points. What is no length has none."""
    found = LENGTH.match(length)
    if not found or not found[2].strip(".,"):
        return 0
    return float(found[2].replace(",", ".")) * UNITS[found[3]] * (-1) ** found[1].count("-")


@lru_cache(maxsize=4096)
def parsed(text):
    """The nodes of a formula, without what stands around it. Raises NotLatex."""
    found = with_commands(tokens(text))
    if not found:
        raise NotLatex("nothing")
    return Parser(found).formula()


# ---------------------------------------------------------------------------------------------------------------------
# What is seen
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """What surrounds a node, as far as it decides how the node looks."""

    display: bool = True  # whether limits stand above and below
    level: int = 0  # 1 in a script, 2 in a script of a script
    font: str = ""
    bold: bool = False
    text: bool = False
    table: bool = False

    def script(self):
        return replace(self, display=False, level=min(self.level + 1, 2), table=False)


@dataclass
class Item:
    """Something drawn, with what stands below and above it.

    kind: "symbol"; "operator" (a large one); "name" (of an operator, `parts`); "brace"; "stack" (with limits); "box"
    (anything else); "empty" (scripts of nothing); "null" (a bracket that is not drawn); "scope" (changes all that
    follows in a group, which then is one item, "scoped"); "space".
    """

    tokens: tuple
    kind: str
    font: str = ""
    below: tuple = None
    above: tuple = None
    limits: bool = False
    width: float = 0
    parts: tuple = ()

    def bare(self):
        return self.below is None and self.above is None


def items_of(nodes, context):
    """The items of a row, in their order."""
    items = []
    for node in nodes:
        if node[0] == "declare":
            context, scope = declared(node[1], context)
            items += scope
        else:
            items += SEEN[node[0]](context, *node[1:])
    return items


def declared(found, context):
    """The context after a declaration, and what has to be said about it."""
    name = found[0]
    if name in DECLARED:
        return replace(context, font=FONT[name]), []
    if name in STYLES:
        level, same = STYLES[name], STYLES[name] == context.level
        context = replace(context, display=name == r"\displaystyle", level=level)
        return context, [] if same else [Item((r"\textstyle" if level == 0 else name,), "scope")]
    return context, [Item(tuple(found), "scope")]


def seen_symbol(context, token):
    token = ALIASES.get(token, token)
    token = DRAWN.get(token, token)
    if token in DOTS:
        return [Item((dot,), "symbol") for dot in DOTS[token]]
    if token in NEGATED:
        return [Item((r"\not", "{", NEGATED[token], "}"), "symbol")]
    if token in FUNCTIONS:
        return upright(FUNCTIONS[token])
    if token in LIMITS:
        return [Item((), "name", parts=tuple(upright(LIMITS[token])))]
    if token in BIG or token in INTEGRALS:
        return [Item((token,), "operator")]
    if token == r"\bmod":
        return upright("mod")
    if context.text and token in ("-", "*", "'", "`", '"', "<", ">", "|"):
        return [Item((r"\text", "{", token, "}"), "symbol")]
    return [Item((token,), "symbol", font_of(token, context))]


def upright(letters):
    return [Item((letter,), "symbol", "rm") for letter in letters]


def font_of(token, context):
    """The font of a symbol, "" for the usual one. Only letters and digits have others.

    Which ones small Greek letters have depends on what draws them, so those that are asked for are told apart.
    """
    letter, other = len(token) == 1 and token.isalpha(), token.isdigit() or token in GREEK
    font = context.font if letter or other or token in SMALL_GREEK else ""
    if (letter and font in ("it", "mit")) or (other and font == "rm"):
        font = ""
    if context.bold and not font:
        return "bf" if other else "bold"
    return ("bf" if font == "rm" else font if font == "bf" else f"bold {font}") if context.bold else font


def seen_space(context, found, width):
    if found and found[0] in FILLS and context.table:
        return [Item(tuple(found), "scope")]
    return [Item((), "space", width=width)]


def seen_group(context, nodes):
    return grouped(items_of(nodes, replace(context, table=False) if not has_fill(nodes) else context))


def has_fill(nodes):
    """Whether there is an \\hfill in nodes, or in the group that is all of them."""
    inner = nodes[0][1] if len(nodes) == 1 and nodes[0][0] == "group" else nodes
    return any(node[0] == "space" and node[1] and node[1][0] in FILLS for node in inner)


def grouped(items):
    """The items of a group: as if there were no braces, unless something in it changes what follows up to the brace."""
    items = [replace(item, kind="box") if item.kind == "operator" and item.bare() else item for item in items]
    if any(item.kind == "scope" for item in items):
        return [Item(("{", *written(items), "}"), "scoped")]
    return [part for item in items for part in (item.parts if item.kind == "name" else [item])]


def seen_scripts(context, base, below, above, limits):
    inner = SEEN[base[0]](context, *base[1:])
    below, above = (written(items_of(nodes or [], context.script())) or None for nodes in (below, above))
    if below is above is None:
        return inner
    last = inner[-1] if inner else None
    if len(inner) == 1 and last.kind in ("operator", "name", "brace", "stack"):
        usual = last.kind in ("brace", "stack") or (context.display and last.tokens[:1] not in INTEGRAL_TOKENS)
        if last.kind != "stack" and (limits == r"\limits" or (usual and limits != r"\nolimits")):
            return stacked(inner, below, above)
    if base[0] == "pair":
        return [*inner[:-1], replace(last, below=below, above=above)]
    return beside(inner, below, above)


INTEGRAL_TOKENS = {(name,) for name in INTEGRALS}


def beside(inner, below, above):
    """Items with scripts to the right of the last one, or of all together if that is seen."""
    if len(inner) == 1 and inner[0].kind == "name":
        inner = [*inner[0].parts]
    if not inner:
        return [Item((), "empty", below=below, above=above)]
    last, drawn = inner[-1], [item for item in inner if item.kind != "space"]
    simple = all(item.kind == "symbol" and item.bare() for item in drawn)
    bracketed = drawn and drawn[0].tokens[:1] in OPENING_TOKENS and drawn[-1].tokens[:1] in CLOSING_TOKENS
    if last.bare() and last.kind != "space" and (len(inner) == 1 or simple or bracketed):
        return [*inner[:-1], replace(last, below=below, above=above)]
    return [Item(("{", *written(inner), "}"), "box", below=below, above=above)]


OPENING_TOKENS, CLOSING_TOKENS = ({(token,) for token in tokens} for tokens in (OPENING, CLOSING))


def stacked(inner, below, above):
    """Items with others below and above them."""
    kept = inner[0] if len(inner) == 1 else Item((), "box")
    large = kept.kind == "operator" and (kept.bare() or kept.limits)
    taken = (below and kept.below) or (above and kept.above)
    if taken or not (large or kept.kind == "stack"):
        found = written(inner)
        one = len(inner) == 1 and (kept.kind == "name" or kept.bare())
        kept = Item(found if one else ("{", *found, "}"), "stack", limits=True)
    return [replace(kept, below=below or kept.below, above=above or kept.above, limits=True)]


def seen_pair(context, opening, nodes, closing):
    ends = [[Item((), "null")] if end == "." else seen_symbol(context, end) for end in (opening, closing)]
    return [*ends[0], *grouped(items_of(nodes, context)), *ends[1]]


def seen_bracket(context, size, token):
    return [] if token == "." else seen_symbol(context, token)


def seen_text(context, name, nodes):
    return grouped(items_of(nodes, replace(context, font=TEXTS[name], text=True)))


def seen_formula(context, nodes):
    return grouped(items_of(nodes, replace(context, font="", text=False)))


def seen_command(context, name, option, arguments):
    if name in FONT:
        font = FONT[name]
        inner = replace(context, bold=True) if font == "bold" else replace(context, font=font)
        return grouped(items_of(arguments[0], inner))
    if name in CLASSES:
        return grouped(items_of(arguments[0], context))
    if name == r"\operatorname":
        return grouped(items_of(arguments[0], replace(context, font="rm")))
    if name in (r"\operatorname*", r"\mathop"):
        inner = items_of(arguments[0], replace(context, font="rm") if name != r"\mathop" else context)
        if len(inner) == 1 and inner[0].kind == "operator" and inner[0].tokens[:1] not in INTEGRAL_TOKENS:
            return inner
        return [Item((), "name", parts=tuple(grouped(inner)))]
    if name == r"\pmod":
        inner = [*upright("mod"), *grouped(items_of(arguments[0], context))]
        return [Item(("(",), "symbol"), *inner, Item((")",), "symbol")]
    if name in STACKS:
        script = written(items_of(arguments[0], context.script()))
        base = items_of(arguments[1], context)
        return stacked(base, *((script, None) if name == r"\underset" else (None, script)))
    return of_parts(context, name, option, arguments)


def of_parts(context, name, option, arguments):
    """The items of a command that draws something of its own around its arguments."""
    if name in FRACTIONS or name in INFIX.values():
        inner = replace(context, display=name == r"\cfrac")
        parts = [written(items_of(nodes, inner)) for nodes in arguments]
        name = name.replace("dbinom", "binom").replace("tbinom", "binom")
        opening, closing = BRACKETED.get(name, ("", ""))
        line = r"\frac" if name.endswith("frac") else r"\atop"
        drawn = [Item((line, *(token for part in parts for token in ("{", *part, "}"))), "box")]
        if opening:
            return [Item((opening,), "symbol"), *drawn, Item((closing,), "symbol")]
        return drawn
    inner = [items_of(nodes, context) for nodes in arguments]
    if name in WIDE and len(shown := finished(inner[0])) == 1 and shown[0].kind == "symbol" and shown[0].bare():
        name = WIDE[name]
    found = [name]
    if option is not None:
        found += ["[", *written(items_of(option, context.script())), "]"]
    for items in inner:
        found += ["{", *written(items), "}"]
    kind = (
        "brace"
        if name in BRACES
        else "symbol"
        if name in ACCENTS
        else "box"
        if arguments or is_known(name)
        else "scope"
    )
    return [Item(tuple(found), kind)]


def seen_table(context, name, position, columns, rows):
    brackets = AROUND_TABLES.get(name, ("", ""))
    opening, closing = ([Item((bracket,), "symbol")] if bracket else [] for bracket in brackets)
    return [*opening, *of_table(context, name, position, columns, rows), *closing]


def of_table(context, name, position, columns, rows):
    inner = Context(display=name in DISPLAYED, bold=context.bold, table=True)
    cells = [[items_of(nodes, inner) for nodes in row] for row, _ in rows]
    drawn = [[written(items) for items in row] for row in cells]
    width = max(len(row) for row in drawn)
    letters, lines = columns_of(columns, name, width)
    used = [[row[at] for row in drawn if at < len(row) and row[at]] for at in range(width)]
    drawn = [[row[at] if at < len(row) else () for at in range(width) if used[at] or lines] for row in drawn]
    while drawn and not any(drawn[-1]):
        drawn.pop()
    ruled = bool(lines) or any(r"\hline" in cell or r"\cline" in cell for row in drawn for cell in row)
    if len(drawn) <= 1 and not ruled and name != "tabular":  # a line of cells: what is between them is space
        return [item for items in cells[0] for item in (Item((), "space", width=18), *grouped(items))] if drawn else []
    # How a column is aligned is only seen if it has two cells.
    aligned = [letter if len(used[at]) > 1 else "c" for at, letter in enumerate(letters) if used[at] or lines]
    kept = name if name in OTHER_TABLES else "array"
    found = [rf"\begin{{{kept}}}", *(["[", position, "]"] if position not in (None, "c") else [])]
    found += ["{", *(token for at, letter in enumerate(aligned) for token in (*lines.get(at, ()), letter))]
    found += [*lines.get(width, ()), "}"]
    for row in drawn:
        while row and not row[-1]:
            row.pop()
        for at, cell in enumerate(row):
            found += ["&", *cell] if at else cell
        found.append(r"\\")
    return [Item((*found[:-1], rf"\end{{{kept}}}"), "box")]


def columns_of(columns, name, width):
    """The alignment of so many columns, and what is drawn before them: {number of a column: tokens}."""
    if name not in ("array", "tabular"):
        return (ALIGNED.get(name, "c") * width)[:width], {}
    letters, lines, at = [], {}, 0
    columns = unrolled(columns)
    while at < len(columns):
        token, at = columns[at], at + 1
        argument = []
        if columns[at : at + 1] == ["{"]:
            end = closing_brace(columns, at)
            argument, at = columns[at : end + 1], end + 1
        if token in ("@", "!") and all(part in MU or part in "{}" for part in argument):
            continue
        if token in (">", "<") or token in ("@", "!", "|"):
            lines.setdefault(len(letters), []).extend([token, *argument])
        elif token in "lcrpmbX":
            letters.append("".join([token, *argument]))
        else:
            raise NotLatex(f"{token} is no column")
    if len(letters) < width:
        raise NotLatex(f"{width} cells in {len(letters)} columns")
    return letters[:width], lines


def closing_brace(found, at):
    """Where the group that begins at `at` ends."""
    depth = 0
    for place in range(at, len(found)):
        depth += (found[place] == "{") - (found[place] == "}")
        if not depth:
            return place
    raise NotLatex("} is missing")


def unrolled(columns):
    """Column letters without `*{3}{c}`."""
    while "*" in columns:
        at = columns.index("*")
        end = closing_brace(columns, at + 1)
        last = closing_brace(columns, end + 1) if end + 1 < len(columns) else end
        times = "".join(columns[at + 2 : end])
        if not times.isdigit() or int(times) > 100:
            raise NotLatex("columns without a number")
        columns = columns[:at] + columns[end + 2 : last] * int(times) + columns[last + 1 :]
    return columns


SEEN = {
    "symbol": seen_symbol, "space": seen_space, "group": seen_group, "scripts": seen_scripts, "pair": seen_pair,
    "bracket": seen_bracket, "text": seen_text, "formula": seen_formula, "command": seen_command,
    "table": seen_table,
}  # fmt: skip
OVERLAP = -6  # mu; two \! or more draw one symbol over the other, as in D\!\!\!\!/


def finished(items):
    """The items of a row without spaces and empty groups; `\\!` stays where one symbol is drawn over another."""
    out, width, apart = [], 0, False
    for item in chain.from_iterable(item.parts if item.kind == "name" else [item] for item in items):
        if item.kind == "space":
            width, apart = width + item.width, True
            continue
        if item.kind in ("empty", "null") and item.bare():
            continue
        if item.kind == "empty" and out and not apart and out[-1].kind == "symbol" and out[-1].bare():
            out[-1] = replace(out[-1], below=item.below, above=item.above)  # x{}_1
            continue
        # After a large operator there is space of its own.
        if out and width <= (OVERLAP if out[-1].tokens[:1] not in OPERATOR_TOKENS else 2.5 * OVERLAP):
            out.append(Item((r"\!",), "box"))
        out.append(item)
        width, apart = 0, False
    return out


ABOVE_AND_BELOW = BIG | BRACES  # where limits stand if nothing is said
OPERATOR_TOKENS = {(name,) for name in INTEGRALS | BIG}


def written(items):
    """The tokens of a row of items."""
    found, font, items = [], "", finished(items)
    if len(items) == 1 and items[0].kind == "scoped" and items[0].bare():
        return items[0].tokens[1:-1]  # the row ends where the group does
    for item in items:
        if item.font != font or not item.font:
            found += ["}"] * len(font.split())
            found += [token for name in item.font.split() for token in (FONTS[name][0], "{")]
            font = item.font
        found += item.tokens or ("{", "}")
        if item.bare():
            continue
        found += ["}"] * len(font.split())  # scripts are those of the last letter
        font = ""
        usual = bool(item.tokens) and item.tokens[0] in ABOVE_AND_BELOW
        if item.limits != usual:
            found.append(r"\limits" if item.limits else r"\nolimits")
        for sign, script in (("_", item.below), ("^", item.above)):
            found += [sign, "{", *script, "}"] if script else []
    return tuple(found + ["}"] * len(font.split()))


@lru_cache(maxsize=4096)
def looks(text):
    """What is seen of a formula, as a tuple of tokens, the same for all that look the same. None if it is not LaTeX."""
    try:
        return written(items_of(parsed(text), Context()))
    except NotLatex:
        return None


def normalized(text):
    """The tokens of a formula, [str], in one spelling for all that look the same. Also of what is not LaTeX."""
    seen = looks(text)
    if seen is not None:
        return [*seen]
    kept = (token for token in with_commands(tokens(text)) if token not in MU)
    return [DRAWN.get(token, token) for token in (ALIASES.get(token, token) for token in kept)]


def same(one, other):
    """Whether two formulas look the same, by `TABLE`. What is not LaTeX looks like nothing."""
    return looks(one) is not None and looks(one) == looks(other)


# ---------------------------------------------------------------------------------------------------------------------
# One spelling
# ---------------------------------------------------------------------------------------------------------------------


def spelled(text):
    """A formula in uniform spelling that is drawn as before, spaces and sizes included: for training.

    Nothing around it, commands in place of Unicode, one name for commands that do the same, braces around arguments
    and nowhere else, a space between tokens, as in the public data sets. What is not LaTeX stays as it is.
    """
    if (seen := looks(text)) is None:
        return text
    respelled = " ".join(spell(without_margins(parsed(with_spaces(text))), whole=True))
    return respelled if looks(respelled) == seen else text


def without_margins(nodes):
    """The nodes without spaces before and after, which a picture does not show."""
    seen = [at for at, node in enumerate(nodes) if node[0] != "space"]
    return nodes[seen[0] : seen[-1] + 1] if seen else []


TEXT = re.compile("(" + "|".join(re.escape(name) for name in TEXTS) + r")\s*\{")


def with_spaces(text):
    r"""The same with `\ ` for each space in \text{...}, where TeX sees it; elsewhere it does not."""
    if not TEXT.search(text) or all(len(TOKEN.findall(word)) == 1 for word in text.split()):
        return text  # all tokens have spaces around them: these mean nothing
    out, at = "", 0
    while found := TEXT.search(text, at):
        out, start, depth, dollars = out + text[at : found.end()], found.end(), 1, False
        at = start
        while depth and at < len(text):
            letter = text[at]
            dollars ^= letter == "$"
            if letter == "\\":
                out, at = out + text[at : at + 2], at + 2
                continue
            depth += (letter == "{") - (letter == "}")
            out += r"\ " if letter == " " and not dollars and not out.endswith(r"\ ") else letter
            at += 1
    return out + text[at:]


def joined(found):
    """Tokens as a text, with a space where two would run together."""
    out = ""
    for before, token in zip(["", *found], found, strict=False):
        word = before[:1] == "\\" and before[-1].isalpha()
        out += " " + token if word and token[0].isalpha() else r"\ " if word and token == " " else token
    return out


def spell(nodes, whole=False):
    """The tokens of a row. It is `whole` if it stands in braces or brackets of its own."""
    nodes = as_commands(nodes)
    while whole and len(nodes) == 1 and nodes[0][0] == "group":
        nodes = as_commands(nodes[0][1])
    return [token for node in nodes for token in SPELL[node[0]](*node[1:])]


def as_commands(nodes):
    r"""The nodes of a group, in which `\bf x` stands as `\mathbf{x}`, if that is all there is."""
    first = nodes[0] if nodes else ("",)
    if first[0] != "declare" or first[1][0] not in DECLARED or any(node[0] == "declare" for node in nodes[1:]):
        return nodes
    name = FONTS[FONT[first[1][0]]][0]
    return [("command", name, None, [nodes[1:]])] if name in ARGUMENTS and nodes[1:] else nodes


def braced(nodes):
    return ["{", *spell(nodes, whole=True), "}"]


def spell_symbol(token):
    return [ALIASES.get(token, token)]


def spell_space(found, width):
    return [] if not found or found[0] in UNSEEN else [joined(found)]  # TeX takes no spaces in a length


def spell_group(nodes, scripted=False):
    inner = as_commands(nodes)
    while len(inner) == 1 and inner[0][0] == "group":
        inner = as_commands(inner[0][1])
    part = inner[0] if len(inner) == 1 else ("",)
    if is_ordinary(part) or (part[0] == "scripts" and is_ordinary(part[1]) and not scripted):
        return spell(inner)
    return ["{", *spell(inner), "}"]


def is_ordinary(node):
    """Whether a node is to TeX what it is in braces: braces around it are needless."""
    if node[0] == "symbol":
        return (len(node[1]) == 1 and node[1].isalnum()) or node[1] in ORDINARY
    if node[0] == "command" and FONT.get(node[1]) in ("bold", "pmb"):
        return all(map(is_ordinary, node[3][0]))
    return node[0] == "group" or (node[0] == "command" and node[1] in IN_BRACES)


IN_BRACES = {*FONT, *FRACTIONS, *INFIX.values(), *ACCENTS, r"\sqrt"} - {r"\not"}  # their own definitions have them


def spell_scripts(base, below, above, limits):
    found = spell_group(base[1], scripted=True) if base[0] == "group" else SPELL[base[0]](*base[1:])
    primes = 0
    while above and primes < len(above) and above[primes] == ("symbol", r"\prime"):
        primes += 1
    below, inner = (spell(nodes or [], whole=True) for nodes in (below, above))
    if limits and (below or inner):
        found = [*found, limits]
    if below:
        found = [*found, "_", "{", *below, "}"]
    if inner and primes == len(above):
        return [*found, *"'" * primes]
    return [*found, "^", "{", *inner, "}"] if inner else found


def spell_command(name, option, arguments):
    if name in (r"\atop", r"\brack", r"\brace"):
        return ["{", *spell(arguments[0]), name, *spell(arguments[1]), "}"]
    if name in (r"\operatorname", r"\operatorname*"):
        letters = "".join(node[1] for node in arguments[0] if node[0] == "symbol")
        named = FUNCTIONS if name == r"\operatorname" else LIMITS
        if "\\" + letters in named and all(node[0] == "symbol" for node in arguments[0]):
            return ["\\" + letters]
    name = {r"\bm": r"\boldsymbol", r"\frak": r"\mathfrak", r"\Bbb": r"\mathbb"}.get(name, name)
    found = [name] if option is None else [name, "[", *spell(option), "]"]
    if name in (r"\textcolor", r"\colorbox"):
        found, arguments = [joined([*found, *braced(arguments[0])])], arguments[1:]
    return found + [token for nodes in arguments for token in braced(nodes)]


def spell_pair(opening, nodes, closing):
    return [r"\left", opening, *spell(nodes), r"\right", closing]


def spell_text(name, nodes):
    inner = spell(nodes)
    # Here TeX sees spaces.
    return [joined([name, "{", *(" " if token == r"\ " else token for token in inner), "}"])]


def spell_table(name, position, columns, rows):
    plain = name not in ALIGNED or name == "cases"  # others put something of their own into each cell
    lines = []
    for row, gap in rows:
        cells = [spell(nodes, whole=plain and not has_fill(nodes)) if nodes != [("group", [])] else [] for nodes in row]
        cells = [cell if cell[:1] not in (["["], ["*"]) else ["{", "}", *cell] for cell in cells]
        lines.append(
            [*(token for at, cell in enumerate(cells) for token in (["&"] * bool(at) + cell)), joined([r"\\", *gap])]
        )
    if lines[-1] == [r"\\"]:
        lines.pop()
    content = [token for line in lines for token in line]
    content = content[:-1] if content[-1:] == [r"\\"] else content
    if name == "substack":
        return [r"\substack", "{", *content, "}"]
    opening = [rf"\begin{{{name}}}", *(["[", position, "]"] if position else [])]
    opening += ["{", *columns, "}"] if name in ("array", "tabular", "alignedat") else []
    return [*opening, *content, rf"\end{{{name}}}"]


SPELL = {
    "symbol": spell_symbol, "space": spell_space, "group": spell_group, "scripts": spell_scripts, "pair": spell_pair,
    "bracket": lambda size, token: [size, token], "text": spell_text, "command": spell_command, "table": spell_table,
    "formula": lambda nodes: ["$", joined(spell(nodes)), "$"], "declare": lambda found: [joined(found)],
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What counts as the same
# ---------------------------------------------------------------------------------------------------------------------

# Each row: what it is about, two spellings, and whether they count as the same. Each is a test.
TABLE = [
    ("what stands around a formula", r"$x$", r"x", True),
    ("what stands around a formula", r"\[x\]", r"\begin{equation*}x\end{equation*}", True),
    ("what stands around a formula", r"$x$ and $y$", r"x$ and $y", False),
    ("spaces", r"a \, b \quad c ~ d \! e", r"abcde", True),
    ("spaces", r"\text{for all}\;x", r"\mathrm{for all}x", True),
    ("spaces", r"x \hspace{1cm} y \phantom{z}", r"xy", True),
    ("spaces", r"\alpha x", r"\alphax", False),
    ("spaces", r"a \ x i", r"a \xi", False),
    ("one symbol drawn over another", r"D\!\!\!\!/", r"D\hspace{-0.5em}/", True),
    ("one symbol drawn over another", r"D\!\!\!\!/", r"D/", False),
    ("sizes of brackets", r"\left(\frac{a}{b}\right)^2", r"(\frac{a}{b})^2", True),
    ("sizes of brackets", r"\Big[ a \Big]", r"[a]", True),
    ("sizes of brackets", r"\left.\frac{a}{b}\right|_0", r"\frac{a}{b}\bigg|_0", True),
    ("sizes of brackets", r"\left<x\right>", r"\langle x\rangle", True),
    ("sizes of brackets", r"\left<x\right>", r"<x>", False),
    ("sizes of brackets", r"(x)", r"[x]", False),
    ("styles", r"\displaystyle\frac{a}{b}", r"\frac{a}{b}", True),
    ("styles", r"\dfrac{a}{b}+\tfrac{a}{b}", r"\frac{a}{b}+\frac{a}{b}", True),
    ("styles", r"\textstyle\sum_i a", r"\sum_i a", False),
    ("styles", r"\frac{\sum_i a}{b}", r"\frac{\displaystyle\sum_i a}{b}", False),
    ("styles", r"e^{\displaystyle x}", r"e^x", False),
    ("styles", r"a{\scriptstyle b}", r"ab", False),
    ("styles", r"{\tiny a}b", r"ab", False),
    ("limits", r"\sum\limits_i a", r"\sum_i a", True),
    ("limits", r"\int\nolimits_a^b x", r"\int_a^b x", True),
    ("limits", r"\sum\nolimits_i a", r"\sum_i a", False),
    ("limits", r"\int\limits_a^b x", r"\int_a^b x", False),
    ("limits", r"{\sum}_i a", r"\sum_i a", False),
    ("limits", r"\underset{x}{\lim}f", r"\lim_x f", True),
    ("limits", r"\mathrm{lim}_x f", r"\lim_x f", False),
    ("names", r"\operatorname{ln} x", r"\ln x", True),
    ("names", r"\mathrm{ln} x", r"\ln x", True),
    ("names", r"\operatorname*{lim}_x", r"\lim_x", True),
    ("names", r"\operatorname{lim}_x", r"\lim_x", False),
    ("names", r"\sin x", r"sin x", False),
    ("accents over one symbol", r"\bar x", r"\overline{x}", True),
    ("accents over one symbol", r"\hat x", r"\widehat{x}", True),
    ("accents over one symbol", r"\tilde x", r"\widetilde{x}", True),
    ("accents over one symbol", r"\vec x", r"\overrightarrow{x}", False),
    ("accents over more", r"\bar{ab}", r"\overline{ab}", False),
    ("accents over more", r"\hat{a}b", r"\hat{ab}", False),
    ("accents", r"\hat{i}", r"\hat{\imath}", False),
    ("primes", r"f''", r"f^{\prime\prime}", True),
    ("primes", r"f_1'", r"f^{\prime}_1", True),
    ("primes", r"f'^2", r"f^{\prime 2}", True),
    ("primes", r"f^{'}", r"f'", False),
    ("primes", r"f'", r"f^1", False),
    ("scripts", r"x^2_1", r"x_{1}^{2}", True),
    ("scripts", r"x\sp2\sb1", r"x_1^2", True),
    ("scripts", r"{ab}^2", r"ab^2", True),
    ("scripts", r"{\left(x\right)}^2", r"(x)^2", True),
    ("scripts", r"x_{}^2", r"x^2", True),
    ("scripts", r"{x_1}^2", r"x_1^2", False),
    ("scripts", r"{x'}^2", r"x'^2", False),
    ("scripts", r"x_{12}", r"x_12", False),
    ("scripts", r"x^2", r"x_2", False),
    ("scripts", r"x^{a^b}", r"x^{ab}", False),
    ("empty groups", r"x{}_1", r"x_1", True),
    ("empty groups", r"{}a{}+{}b", r"a+b", True),
    ("empty groups", r"R^a{}_b", r"R^a_b", False),
    ("empty groups", r"a\,{}_1F_1", r"a_1F_1", False),
    ("needless braces", r"\frac12", r"{\frac{1}{2}}", True),
    ("needless braces", r"\sqrt{{x}}+{y}", r"\sqrt x+y", True),
    ("needless braces", r"\sqrt{x}y", r"\sqrt{xy}", False),
    ("fonts", r"{\bf ab}", r"\mathbf{ab}", True),
    ("fonts", r"\mathbf{a}\mathbf{b}", r"\mathbf{ab}", True),
    ("fonts", r"{\bf k \cdot r}", r"\mathbf{k}\cdot\mathbf{r}", True),
    ("fonts", r"{\cal L}", r"\mathcal{L}", True),
    ("fonts", r"\mathit{x}", r"x", True),
    ("fonts", r"\mathrm{2\Gamma}", r"2\Gamma", True),
    ("fonts", r"\text{if $x$}", r"\mathrm{if}x", True),
    ("fonts", r"\bm{x}", r"\boldsymbol{x}", True),
    ("fonts", r"\mathbf{x}", r"\boldsymbol{x}", False),
    ("fonts", r"\mathbf{x}", r"x", False),
    ("fonts", r"\mathrm{x}", r"x", False),
    ("fonts", r"\mathbf{\omega}", r"\omega", False),
    ("fonts", r"\mathscr{L}", r"\mathcal{L}", False),
    ("fonts", r"\mathbf{1}", r"1", False),
    ("fonts", r"\text{a-b}", r"\mathrm{a-b}", False),
    ("equivalent commands", r"a\le b\ge c\ne d", r"a\leq b\geq c\neq d", True),
    ("equivalent commands", r"\vert x\vert", r"|x|", True),
    ("equivalent commands", r"a\mid b", r"a|b", True),
    ("equivalent commands", r"\|x\|", r"\Vert x\Vert", True),
    ("equivalent commands", r"\|x\|", r"||x||", False),
    ("equivalent commands", r"\lbrace a\rbrace\lbrack b\rbrack", r"\{a\}[b]", True),
    ("equivalent commands", r"a\to b\land c", r"a\rightarrow b\wedge c", True),
    ("equivalent commands", r"a\not=b", r"a\neq b", True),
    ("equivalent commands", r"a^\dag\ast b", r"a^\dagger*b", True),
    ("equivalent commands", r"\epsilon\phi\theta", r"\varepsilon\phi\theta", False),
    ("equivalent commands", r"\epsilon\phi\theta", r"\epsilon\varphi\theta", False),
    ("equivalent commands", r"\setminus", r"/", False),
    ("dots", r"a,\dots,b", r"a,\ldots,b", True),
    ("dots", r"a,\ldots,b", r"a,...,b", True),
    ("dots", r"a+\cdots+b", r"a+\dotsb+b", True),
    ("dots", r"a+\cdots+b", r"a+\ldots+b", False),
    ("dots", r"\vdots", r"\ddots", False),
    ("fractions", r"{a\over b}", r"\frac{a}{b}", True),
    ("fractions", r"\binom{n}{k}", r"{n\choose k}", True),
    ("fractions", r"\binom{n}{k}", r"\left({n\atop k}\right)", True),
    ("fractions", r"\binom{n}{k}", r"(\frac{n}{k})", False),
    ("fractions", r"\frac{a}{b}", r"\frac{b}{a}", False),
    ("fractions", r"\frac{a}{b}", r"a/b", False),
    ("one above the other", r"\stackrel{?}{=}", r"\overset{?}{=}", True),
    ("one above the other", r"\overset{a}{b}", r"b^a", False),
    ("one above the other", r"\underbrace{a}_b", r"\underbrace{a}b", False),
    ("tables", r"\begin{array}{cc}a&b\\c&d\end{array}", r"\begin{matrix}a&b\\c&d\end{matrix}", True),
    ("tables", r"\begin{pmatrix}a&b\\c&d\end{pmatrix}", r"\left(\begin{array}{cc}a&b\\c&d\\\end{array}\right)", True),
    ("tables", r"\begin{cases}a&b\\c&d\end{cases}", r"\left\{\begin{array}{ll}a&b\\c&d\end{array}\right.", True),
    ("tables", r"\begin{aligned}a&=b\\&=c\end{aligned}", r"\begin{array}{rl}a&=b\\&=c\end{array}", True),
    ("tables", r"\begin{aligned}a&=b\end{aligned}", r"a=b", True),
    ("tables", r"\begin{array}{c}x\end{array}", r"x", True),
    ("tables", r"\begin{array}{lc}a&b\\c&d\end{array}", r"\begin{array}{cc}a&b\\c&d\end{array}", False),
    ("tables", r"\begin{array}{c|c}a&b\\c&d\end{array}", r"\begin{array}{cc}a&b\\c&d\end{array}", False),
    ("tables", r"\begin{matrix}a&b\\c&d\end{matrix}", r"\begin{matrix}a&b\\d&c\end{matrix}", False),
    ("tables", r"\begin{matrix}a&b\\c&d\end{matrix}", r"\begin{matrix}a&b&c&d\end{matrix}", False),
    ("tables", r"\begin{pmatrix}a\\b\end{pmatrix}", r"\begin{bmatrix}a\\b\end{bmatrix}", False),
    ("Unicode", "α≤∞", r"\alpha\leq\infty", True),
    ("Unicode", "x²³+a₁", r"x^{23}+a_1", True),
    ("Unicode", "𝐱 + ℝ − 𝑦", r"\mathbf{x}+\mathbb{R}-y", True),
    ("Unicode", "\\text{caf\u00e9}", "\\text{cafe\u0301}", True),
    ("Unicode", "\\text{caf\u00e9}", r"\text{cafe}", False),
    ("Unicode", "ε", r"\epsilon", False),
    ("Unicode", "φ", r"\phi", False),
    ("what is not seen", r"x \label{eq:one} \nonumber", r"x", True),
    ("what is not seen", r"x \tag{1}", r"x", False),
    ("commands that are not known", r"{\strange a}b", r"{\strange ab}", False),
    ("commands that are not known", r"\strange{ab}", r"\strange{a}b", False),
    ("other formulas", r"a+b", r"a-b", False),
    ("other formulas", r"ab", r"ba", False),
    ("other formulas", r"x", r"X", False),
    ("other formulas", r"a", r"\alpha", False),
]  # fmt: skip
