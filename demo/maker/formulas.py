"""What is written: formulas of a grammar, and real formulas taken apart and put together anew.

All are spelled as the public LaTeX OCR sets spell them, with a space between tokens (`\\frac { 1 } { 2 }`).
"""

import hashlib
import re
from collections import Counter, defaultdict

# ---------------------------------------------------------------------------------------------------------------------
# The grammar: random formulas, one canonical spelling each
# ---------------------------------------------------------------------------------------------------------------------


def words(text):
    return text.split()


PAPER = {
    "latin": list("xxxxyyzabcdefghijklmnnopqrsttuvwABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "greek": words(r"""
        \alpha \alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \theta \kappa \lambda \mu \mu \nu \xi
        \pi \pi \rho \sigma \tau \phi \varphi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Pi \Sigma \Phi \Psi
        \Omega"""),
    "constants": words(r"\infty \partial \nabla \hbar \ell \ldots \cdots"),
    "binary": words(r"+ + + + + - - - - - \times \cdot \pm / \otimes \wedge \div \mp \circ"),
    "relations": words(r"= = = = = = = < > \leq \geq \neq \approx \equiv \sim \simeq \rightarrow \in"),
    "functions": words(r"\sin \cos \tan \log \ln \exp \sinh \cosh \tanh \cot \arctan \det \max \min"),
    "accents": words(r"\hat \bar \vec \dot \tilde \bar \hat \ddot \overline \widehat"),
}
# A school's blackboard: fewer signs, and none that look alike (o, O and 0; x and \chi).
SCHOOL = {
    "latin": list("xxxyyabdhkmntABDFGHR"),
    "greek": words(r"\alpha \theta \lambda \mu \pi \phi \Delta \Omega"),
    "constants": words(r"\infty \pi"),
    "binary": words(r"+ + + - - - \pm"),
    "relations": words(r"= = = < >"),
    "functions": words(r"\sin \cos \tan \log"),
    "accents": words(r"\bar \vec"),
}
# What the blackboard of `demo/data` shows of it: no pairs that differ by a hair at this size (h, n and k, D and 0, \bar
# and \vec, small \lambda and \Omega), so that a few minutes of fine-tuning suffice to read them.
BLACKBOARD = SCHOOL | {
    "latin": list("xxxyyabdmntABFGR"),
    "greek": words(r"\alpha \theta \mu \pi \phi \Delta"),
    "accents": [r"\bar"],
}
FONTS = words(r"\mathrm \mathbf \mathcal")
TALL = {r"\frac", r"\sum", r"\prod", r"\int", r"\sqrt", r"\lim", r"\binom"}


class Grammar:
    """Draws formulas as lists of LaTeX tokens, of the `signs` that printed articles have (PAPER), or of fewer."""

    def __init__(self, rng, signs=PAPER):
        self.rng, self.paper, self.signs = rng, signs is PAPER, signs

    def digit(self):
        return self.rng.choice("0112223456789")

    def number(self):
        """One to three digits, now and then a decimal: each digit a token of its own."""
        digits = [self.rng.choice("123456789")] + [self.digit() for _ in range(self.rng.choice([0, 0, 0, 1, 1, 2]))]
        return digits + ([".", self.digit()] if self.rng.random() < 0.06 else [])

    def letter(self):
        return self.rng.choice(self.signs["latin" if self.rng.random() < 0.66 else "greek"])

    def symbol(self):
        draw = self.rng.random()
        if draw < 0.80:
            return [self.letter()]
        return [self.digit()] if draw < 0.95 else [self.rng.choice(self.signs["constants"])]

    def any_symbol(self):
        """A single symbol, all equally likely: without these a model learns how formulas go, and never looks."""
        pool = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", *"()[]|,.!"]
        pool += [r"\sum", r"\int", r"\prod", r"\prime"]
        for kind in ("greek", "constants", "binary", "relations", "functions"):
            pool += set(self.signs[kind])
        return [self.rng.choice(sorted(pool))]

    def script(self, depth):
        """What stands in an index or an exponent, mostly one symbol."""
        draw = self.rng.random()
        if draw < 0.62 or depth <= 0:
            return [self.digit()] if self.rng.random() < 0.45 else [self.letter()]
        if draw < 0.72:
            return ["-"] + self.symbol()
        if draw < 0.82:
            return self.symbol() + self.symbol()
        if draw < 0.88 and self.paper:
            return [r"\prime"] if self.rng.random() < 0.6 else self.rng.choice([[r"\dagger"], ["*"], ["+"], ["-"]])
        return self.expression(depth - 2, self.rng.choice([1, 2, 2]))

    def scripted(self, base, depth, chance=1.0):
        """`base` with a subscript, a superscript or both, in this order."""
        if self.rng.random() > chance:
            return base
        kind = self.rng.random()
        out = list(base)
        if kind < 0.55:
            out += ["_", "{", *self.script(depth), "}"]
        if kind > 0.42:
            out += ["^", "{", *self.script(depth), "}"]
        return out

    def fenced(self, inside):
        """Brackets: growing ones round what is tall, plain ones round the rest."""
        left, right = self.rng.choice(["()", "()", "()", "()", "[]", "||"])
        if TALL & set(inside):
            return [r"\left" + left, *inside, r"\right" + right]
        return [left, *inside, right]

    def big(self, depth):
        """Sums, products, integrals and limits, with what they apply to."""
        rng = self.rng
        body = self.term(depth - 1)
        draw = rng.random()
        if draw < 0.42:
            out = [rng.choice([r"\sum", r"\sum", r"\prod"])]
            index = rng.choice("ijkmn")
            if rng.random() < 0.85:
                out += ["_", "{", index, *(["=", rng.choice("01")] if rng.random() < 0.8 else []), "}"]
                if rng.random() < 0.8:
                    out += ["^", "{", *rng.choice([[r"\infty"], ["n"], ["N"], ["m"], ["k"]]), "}"]
            return out + body
        if draw < 0.86:
            out = [r"\int"]
            if rng.random() < 0.65:
                low = rng.choice([["0"], ["a"], ["1"], ["-", r"\infty"], ["-", "1"], self.symbol()])
                high = rng.choice([["1"], ["b"], [r"\infty"], [r"\pi"], ["x"], self.symbol()])
                out += ["_", "{", *low, "}", "^", "{", *high, "}"]
            return out + body + ["d", rng.choice(["x", "x", "t", "y", "z", "s", r"\theta"])]
        return [r"\lim", "_", "{", self.letter(), r"\rightarrow", rng.choice(["0", r"\infty", "a"]), "}"] + body

    def primary(self, depth):
        """One factor of a term."""
        rng = self.rng
        draw = rng.random()
        if depth <= 0:
            draw *= 0.62
        if draw < 0.30:
            return self.symbol()
        if draw < 0.36:
            return self.number()
        if draw < 0.57:
            return self.scripted([self.letter()], depth)
        if draw < 0.62:
            return self.scripted([rng.choice(self.signs["accents"]), "{", self.letter(), "}"], depth, 0.3)
        if draw < 0.74:
            return self.fraction(depth)
        if draw < 0.79:
            index = ["[", rng.choice("345n"), "]"] if rng.random() < 0.15 else []
            return [r"\sqrt", *index, "{", *self.expression(depth - 1, rng.choice([1, 1, 2])), "}"]
        if draw < 0.85:
            name = self.scripted([rng.choice(self.signs["functions"])], 0, 0.2)
            return name + (self.symbol() if rng.random() < 0.5 else ["(", *self.expression(depth - 2, 1), ")"])
        if draw < 0.90:
            inside = self.expression(depth - 1, 2)
            return self.scripted(self.fenced(inside), depth - 1, 0.3)
        if draw < 0.95:
            arguments = self.symbol() + ([","] + self.symbol() if rng.random() < 0.3 else [])
            return [self.letter(), "(", *arguments, ")"]
        if draw < 0.985 or not self.paper:
            return self.big(depth)
        return self.scripted([rng.choice(FONTS), "{", rng.choice("ABCDEFGHILMNPRSTUVXZ"), "}"], depth, 0.3)

    def fraction(self, depth):
        rng = self.rng
        draw = rng.random()
        if draw < 0.12:
            sign = rng.choice(["d", r"\partial"])
            top = [sign] + ([self.letter()] if rng.random() < 0.6 else [])
            return [r"\frac", "{", *top, "}", "{", sign, self.letter(), "}"]
        if draw < 0.15:
            return [r"\binom", "{", *self.symbol(), "}", "{", *self.symbol(), "}"]
        top, bottom = (self.expression(depth - 2, rng.choice([1, 1, 1, 2])) for _ in range(2))
        return [r"\frac", "{", *top, "}", "{", *bottom, "}"]

    def term(self, depth):
        out = []
        for _ in range(self.rng.choice([1, 1, 1, 2, 2, 3])):
            factor = self.primary(depth)
            # Two numbers side by side would read as one.
            if out and factor[0].isdigit() and out[-1].isdigit():
                continue
            out += factor
        return out

    def expression(self, depth, terms):
        out = ["-"] if self.rng.random() < 0.06 else []
        out += self.term(depth)
        for _ in range(terms - 1):
            out += [self.rng.choice(self.signs["binary"]), *self.term(depth)]
        return out

    def formula(self, size):
        """A whole formula. `size`: 0 a single symbol, 1 short, 2 medium, 3 as long as in printed articles."""
        rng = self.rng
        if size == 0:
            return self.any_symbol()
        if size == 1:
            return self.expression(rng.choice([0, 1, 2]), rng.choice([1, 1, 1, 2]))
        out = self.expression(3, rng.choice([1, 2, 2, 3]))
        for _ in range(rng.choice([0, 1, 1]) if size == 2 else rng.choice([1, 1, 1, 2])):
            out += [
                rng.choice(self.signs["relations"]),
                *self.expression(3, rng.choice([1, 2] if size == 2 else [2, 3, 4])),
            ]
        if self.paper and rng.random() < 0.35:
            out += rng.choice([[], [r"\,"], [r"\,"], [r"\;"], ["~"]]) + [rng.choice(".,")]
        return out


LENGTHS = {0: (1, 1), 1: (1, 24), 2: (6, 60), 3: (30, 150)}  # tokens, for each size


def draw_formula(rng, sizes, signs=PAPER, longest=150):
    """One formula of a size drawn with the weights `sizes`, spelled with a space between tokens."""
    while True:
        size = rng.choices(range(4), sizes)[0]
        tokens = Grammar(rng, signs).formula(size)
        low, high = LENGTHS[size]
        if low <= len(tokens) <= min(high, longest):
            return " ".join(tokens)


SYNONYMS = {r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq", r"\to": r"\rightarrow", r"\dag": r"\dagger"}
INVISIBLE = {"{", "}", "~", r"\,", r"\;", r"\:", r"\!", r"\ ", r"\quad", r"\qquad", r"\left", r"\right"}
INVISIBLE |= {r"\mathrm", r"\mathbf", r"\mathcal", r"\displaystyle", r"\limits"}


def spelling_free(latex):
    """The visible symbols of a formula in order: equal for all spellings of one formula (and for a few others)."""
    tokens = re.findall(r"\\[A-Za-z]+|\\.|\S", latex)
    return tuple(SYNONYMS.get(token, token) for token in tokens if token not in INVISIBLE)


def is_held_out(latex):
    """Every tenth formula of four visible symbols or more: decided by the formula alone, the same on any machine."""
    symbols = spelling_free(latex)
    return len(symbols) >= 4 and hashlib.md5(" ".join(symbols).encode()).digest()[0] % 10 == 0


# ---------------------------------------------------------------------------------------------------------------------
# Recombination: new formulas with the statistics of real ones
# ---------------------------------------------------------------------------------------------------------------------

RELATIONS = set(words(r"= < > \leq \geq \le \ge \equiv \sim \simeq \approx \neq \ne \rightarrow \to \in \propto"))
OPENING, CLOSING = set("([") | {r"\{", r"\langle"}, set(")]") | {r"\}", r"\rangle"}
# What stands in the braces after these is no formula: lengths, column types, names.
LITERAL = set(words(r"\hspace \vspace \begin{array} \label \put \circle \setlength \makebox \raisebox \kern \line"))
TWO_ARGUMENTS = {r"\frac", r"\binom", r"\stackrel"}
WORDS = set(words(r"\mathrm \operatorname \operatorname* \textrm \mbox \text \textup \textit \mathsf"))
ONE_ARGUMENT = WORDS | set(
    words(r"""\sqrt \bar \hat \dot \ddot \vec \tilde \overline \underline \widehat \widetilde \check \breve \acute
    \mathcal \mathbf \mathit \overrightarrow \underbrace \overbrace \phantom \not \fbox \sp \sb""")
)
ALPHABETS = [list("abcdefghijklmnopqrstuvwxyz"), list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")]
ALPHABETS.append(
    words(r"""\alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \vartheta \iota \kappa \lambda \mu \nu
    \xi \pi \rho \varrho \sigma \tau \upsilon \phi \varphi \chi \psi \omega \ell \partial""")
)
ALPHABETS.append(words(r"\Gamma \Delta \Theta \Lambda \Xi \Pi \Sigma \Upsilon \Phi \Psi \Omega \nabla"))
ALPHABETS.append(list("0123456789"))


def squeezed(latex):
    """A formula without its spaces, by which two are the same."""
    return "".join(latex.split())


def groups(tokens):
    """The braces of a formula: a list of (role, first token inside, closing brace). None if they don't match.

    The role is the command and the number of the argument: what may be swapped for another.
    """
    found, stack = [], []
    last_closed = {}  # where a group closed: its role, to count arguments
    for place, token in enumerate(tokens):
        if token == "{":
            before = tokens[place - 1] if place else ""
            if before == "}" and (role := last_closed.get(place - 1)) and role[0] in TWO_ARGUMENTS and role[1] == 1:
                role = (role[0], 2)
            elif before in ("_", "^") or before in TWO_ARGUMENTS | ONE_ARGUMENT | LITERAL:
                role = (before, 1)
            else:
                role = ("", 1)
            stack.append((role, place + 1))
        elif token == "}":
            if not stack:
                return None
            role, start = stack.pop()
            last_closed[place] = role
            found.append((role, start, place))
    return None if stack else found


def cut_at_relations(tokens):
    """The parts between relations that stand in no bracket, and these relations."""
    depth, parts, relations = 0, [[]], []
    for token in tokens:
        if token == "{" or token in OPENING or token.startswith((r"\left", r"\begin")) and token != r"\leftrightarrow":
            depth += 1
        elif token == "}" or token in CLOSING or token.startswith((r"\right", r"\end")) and token != r"\rightarrow":
            depth -= 1
        if depth == 0 and token in RELATIONS:
            relations.append(token)
            parts.append([])
        else:
            parts[-1].append(token)
    return (parts, relations) if depth == 0 else ([list(tokens)], [])


def balanced(tokens):
    """Whether brackets of all kinds are closed, so that a part can stand elsewhere."""
    depth = Counter()
    for token in tokens:
        if token in ("&", r"\\") or token.startswith((r"\begin", r"\end")):
            return False
        if token in OPENING or token in CLOSING:
            kind = "([" + r"\{\langle" if token in OPENING else ""
            depth[bool(kind)] += 1
        if token.startswith(r"\left") and not token.startswith(r"\leftr") and token != r"\leftarrow":
            depth["left"] += 1
        if token.startswith(r"\right") and not token.startswith(r"\righta") and not token.startswith(r"\righth"):
            depth["left"] -= 1
    return depth[True] == depth[False] and depth["left"] == 0


class Recombiner:
    """Writes formulas as the given ones are written, none equal to one of them or to one in `forbidden`."""

    def __init__(self, texts, forbidden=()):
        self.known = {squeezed(text) for text in texts} | {squeezed(text) for text in forbidden}
        self.formulas, self.inside = [], defaultdict(list)
        self.firsts, self.middles, self.lasts, self.joints, self.counts = [], [], [], [], []
        tokens_of_all = Counter()
        for text in texts:
            tokens = text.split()
            found = groups(tokens)
            if found is None:
                continue
            self.formulas.append(tokens)
            tokens_of_all.update(tokens)
            for role, start, end in found:
                content = tokens[start:end]
                if role[0] not in LITERAL and content and balanced(content):
                    self.inside[role].append(content)
            parts, relations = cut_at_relations(tokens)
            if relations and all(map(balanced, parts)):
                self.counts.append(len(relations))
                self.joints += relations
                self.firsts.append(parts[0])
                self.lasts.append(parts[-1])
                self.middles += [part for part in parts[1:-1] if part]
        self.roles = [*self.inside]
        self.role_weights = [len(self.inside[role]) ** 0.5 for role in self.roles]
        # Which letter takes another's place: the usual ones more often, but all of them at times.
        self.letters = {}
        for alphabet in ALPHABETS:
            weights = [tokens_of_all[letter] ** 0.75 for letter in alphabet]
            for letter in alphabet:
                self.letters[letter] = alphabet, weights
        # Signs that can stand alone: no commands with arguments, nothing that is no sign.
        follows = Counter(a for tokens in self.formulas for a, b in zip(tokens, tokens[1:], strict=False) if b == "{")
        alone = {
            t for t, n in tokens_of_all.items() if n >= 3 and follows[t] < 0.3 * n and not re.search(r"[{}&_^~]", t)
        }
        stretched = re.compile(
            r"\\(left|right|big|Big|begin|end|sp$|sb$|atop|not$|it$|bf$|cal$|tt$|sf$|rm$|.*style|.*size)"
        )
        keep = {r"\leftrightarrow", r"\rightarrow", r"\rightharpoonup", r"\bigtriangleup", r"\bigcirc"}
        drop = INVISIBLE | set(
            words(r"\\ \ \nonumber \tiny \hfill \put \label \mit \boldmath \l \d \sl \small \vphantom")
        )
        drop |= {"[object", "Object]"}
        self.signs = sorted(t for t in alone if (not stretched.match(t) or t in keep) and t not in drop)

    def sign(self, rng):
        return [rng.choice(self.signs)]

    def piece(self, rng, longest):
        """What stands in braces, or one side of an equation."""
        while True:
            if rng.random() < 0.7:
                role = rng.choices(self.roles, self.role_weights)[0]
                piece = rng.choice(self.inside[role])
                if role[0] in ONE_ARGUMENT:
                    piece = [role[0], "{", *piece, "}"]
            else:
                piece = rng.choice(rng.choice([self.firsts, self.middles, self.lasts]))
            piece = self.renamed(self.swapped(piece, rng, 0.3), rng)
            if 1 <= len(piece) <= longest:
                return piece

    def swapped(self, tokens, rng, chance):
        """The formula with some of its groups replaced by others with the same role."""
        found = groups(tokens)
        if not found:
            return tokens
        out, done = [], 0
        for role, start, end in sorted(found, key=lambda group: (group[1], -group[2])):
            if start < done or rng.random() > chance or not self.inside.get(role):
                continue
            if role[0] in LITERAL or not balanced(tokens[start:end]):
                continue
            other = rng.choice(self.inside[role])
            if len(other) > 2 * (end - start) + 4:  # else formulas would grow
                continue
            out += tokens[done:start] + other
            done = end
        return out + tokens[done:]

    def renamed(self, tokens, rng):
        """The formula with some letters replaced by others, each by the same one throughout; and digits by any."""
        names = {}
        words_of_letters = {
            place
            for role, start, end in groups(tokens) or []
            if role[0] in LITERAL | WORDS
            for place in range(start, end)
        }
        out = []
        for place, token in enumerate(tokens):
            if token in self.letters and place not in words_of_letters:
                if token.isdigit():
                    token = rng.choice("0123456789") if rng.random() < 0.3 else token
                else:
                    if token not in names:
                        names[token] = token
                        if rng.random() < 0.4:
                            names[token] = rng.choices(*self.letters[token])[0]
                    token = names[token]
            out.append(token)
        return out

    def formula(self, rng, longest=150):
        """A whole new formula, or None: some attempts come to nothing."""
        if rng.random() < 0.5 or not self.counts:
            tokens = rng.choice(self.formulas)
        else:
            tokens = list(rng.choice(self.firsts))
            count = min(rng.choice(self.counts), 3)
            for number in range(count):
                tokens.append(rng.choice(self.joints))
                last = number == count - 1 or not self.middles
                tokens += rng.choice(self.lasts if last else self.middles)
        tokens = self.renamed(self.swapped(tokens, rng, 0.35), rng)
        if not 2 <= len(tokens) <= longest:
            return None
        return tokens
