r"""What is known of LaTeX's commands, as data: which have arguments, which are drawn alike, what Unicode stands for.

Wraps no step. It is what `latex` parses and compares formulas by. Two commands are put together here on purpose: where
they are not, they count as different.
"""

import re
import unicodedata

from latex2mathml.symbols_parser import SYMBOLS


def names(text, front="\\"):
    """The words of a text as commands."""
    return [front + word for word in text.split()]


# ---------------------------------------------------------------------------------------------------------------------
# Spaces
# ---------------------------------------------------------------------------------------------------------------------

MU = {  # how wide they are, in 1/18 em
    r"\,": 3, r"\thinspace": 3, r"\:": 4, r"\>": 4, r"\medspace": 4, r"\;": 5, r"\thickspace": 5, r"\ ": 6, "~": 6,
    r"\space": 6, r"\nobreakspace": 6, r"\enspace": 9, r"\enskip": 9, r"\quad": 18, r"\qquad": 36, r"\!": -3,
    r"\negthinspace": -3, r"\negmedspace": -4, r"\negthickspace": -5, r"\/": 0, r"\-": 0, r"\allowbreak": 0,
    r"\nobreak": 0, r"\null": 0, r"\relax": 0, r"\nonumber": 0, r"\notag": 0, r"\smallskip": 0, r"\medskip": 0,
    r"\bigskip": 0, r"\strut": 0, r"\mathstrut": 0, r"\noindent": 0, r"\protect": 0, r"\hfill": 18, r"\hfil": 18,
}  # fmt: skip
FILLS = {r"\hfill", r"\hfil"}  # in a table they decide where a cell's content stands
UNSEEN = {r"\nonumber", r"\notag", r"\relax", r"\null", r"\nobreak", r"\allowbreak", r"\-", r"\protect", r"\noindent"}
SPACES = {r"\thinspace": r"\,", r"\>": r"\:", r"\medspace": r"\:", r"\thickspace": r"\;", r"\negthinspace": r"\!"}
SPACES |= {r"\space": r"\ ", "~": r"\ ", r"\nobreakspace": r"\ ", r"\enskip": r"\enspace"}  # of one width
UNITS = {"mu": 1, "em": 18, "ex": 7.75, "pt": 1.8, "bp": 1.807, "pc": 21.6, "mm": 5.12, "cm": 51.2, "in": 130.1}
PHANTOMS = {*names("phantom hphantom vphantom")}
LENGTHS = {r"\hspace", r"\hspace*", r"\vspace", r"\vspace*"}
KERNS = {*names("kern mkern hskip mskip")}

# ---------------------------------------------------------------------------------------------------------------------
# Symbols
# ---------------------------------------------------------------------------------------------------------------------

ALIASES = {  # drawn alike and spaced alike
    r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq", r"\to": r"\rightarrow", r"\gets": r"\leftarrow",
    r"\land": r"\wedge", r"\lor": r"\vee", r"\lnot": r"\neg", r"\owns": r"\ni", r"\dag": r"\dagger",
    r"\ddag": r"\ddagger", r"\vert": "|", r"\Vert": r"\|", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[",
    r"\rbrack": "]", r"\ast": "*", r"\lt": "<", r"\gt": ">", r"\lparen": "(", r"\rparen": ")",
}  # fmt: skip
DRAWN = {  # drawn alike, but spaced otherwise
    r"\mid": "|", r"\lvert": "|", r"\rvert": "|", r"\parallel": r"\|", r"\lVert": r"\|", r"\rVert": r"\|",
    r"\colon": ":", r"\cdotp": r"\cdot", r"\ldotp": ".", r"\iff": r"\Longleftrightarrow", r"\bot": r"\perp",
    r"\implies": r"\Longrightarrow", r"\impliedby": r"\Longleftarrow", r"\bigtriangleup": r"\triangle",
    r"\backslash": r"\setminus", r"\slash": "/",
}  # fmt: skip
DOTS = dict.fromkeys(names("ldots dots dotsc dotso textellipsis mathellipsis"), ["."] * 3)
DOTS |= dict.fromkeys(names("cdots dotsb dotsm dotsi"), [r"\cdot"] * 3)
NEGATED = {r"\neq": "=", r"\notin": r"\in"}

FUNCTIONS = "arccos arcsin arctan arg cos cosh cot coth csc deg dim exp hom ker lg ln log sec sin sinh tan tanh"
FUNCTIONS = {"\\" + name: name for name in FUNCTIONS.split()}
LIMITS = "det gcd inf lim max min sup Pr liminf limsup injlim projlim"  # what belongs to them stands below
LIMITS = {"\\" + name: name for name in LIMITS.split()}
INTEGRALS = {*names("int iint iiint iiiint oint oiint idotsint smallint")}
BIG = {*names("sum prod coprod bigcup bigcap bigvee bigwedge bigoplus bigotimes bigodot biguplus bigsqcup intop")}
LETTERS = {*names("O o L l AA aa AE ae OE oe ss i j bmod dag ddag copyright pounds")}
GREEK = {*names("Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega")}

# ---------------------------------------------------------------------------------------------------------------------
# Fonts and sizes
# ---------------------------------------------------------------------------------------------------------------------

FONTS = {  # the first of each is the one that is written
    "rm": names("mathrm rm mathup"), "bf": names("mathbf bf mathbold"), "cal": names("mathcal cal"),
    "it": names("mathit it mathnormal"), "sf": names("mathsf sf"), "tt": names("mathtt tt"), "scr": names("mathscr"),
    "frak": names("mathfrak frak"), "bb": names("mathbb Bbb"), "sl": names("mathsl sl"), "mit": names("mit"),
    "sc": names("sc"), "bold": names("boldsymbol bm"), "pmb": names("pmb"),
}  # fmt: skip
FONT = {name: font for font, commands in FONTS.items() for name in commands}
DECLARED = {*names("rm bf cal it sf tt sl mit sc")}  # these change the rest of a group
TEXTS = dict.fromkeys(names("text mbox hbox textrm textnormal textup makebox"), "rm") | {r"\textbf": "bf"}
TEXTS |= {r"\textit": "it", r"\emph": "it", r"\textsf": "sf", r"\texttt": "tt", r"\textsc": "sc", r"\textsl": "sl"}
STYLES = {r"\displaystyle": 0, r"\textstyle": 0, r"\scriptstyle": 1, r"\scriptscriptstyle": 2}
SIZES = {*names("tiny scriptsize footnotesize small normalsize large Large LARGE huge Huge boldmath unboldmath")}

# ---------------------------------------------------------------------------------------------------------------------
# Commands with arguments
# ---------------------------------------------------------------------------------------------------------------------

ACCENTS = {*names("hat bar tilde vec dot ddot dddot ddddot acute grave breve check mathring overline widehat")}
ACCENTS |= {*names("widetilde widecheck underline overrightarrow overleftarrow overleftrightarrow underbar utilde")}
ACCENTS |= {*names("underrightarrow underleftarrow underleftrightarrow boxed fbox cancel bcancel xcancel slashed not")}
WIDE = {r"\overline": r"\bar", r"\widehat": r"\hat", r"\widetilde": r"\tilde"}  # over one symbol they are alike
BRACES = {r"\overbrace", r"\underbrace"}  # scripts stand above and below them
CLASSES = {*names("mathord mathbin mathrel mathopen mathclose mathpunct mathinner smash ensuremath")}  # only spacing
FRACTIONS = {*names("frac dfrac tfrac cfrac binom dbinom tbinom")}
STACKS = {*names("overset underset stackrel")}
INFIX = {r"\over": r"\frac", r"\atop": r"\atop", r"\choose": r"\binom", r"\brack": r"\brack", r"\brace": r"\brace"}
BRACKETED = {r"\binom": "()", r"\brack": "[]", r"\brace": (r"\{", r"\}")}
OPTIONAL = {*names("sqrt xrightarrow xleftarrow")}
ARGUMENTS = dict.fromkeys([*ACCENTS, *BRACES, *CLASSES, *PHANTOMS, *LENGTHS, *OPTIONAL], 1)
ARGUMENTS |= dict.fromkeys({*FONT} - DECLARED, 1) | dict.fromkeys(FRACTIONS | STACKS, 2)
ARGUMENTS |= dict.fromkeys(names("operatorname operatorname* mathop pmod tag tag* llap rlap clap lefteqn label"), 1)
ARGUMENTS |= dict.fromkeys(names("mathllap mathrlap mathclap"), 1) | dict.fromkeys(names("textcolor colorbox"), 2)
ARGUMENTS[r"\genfrac"] = 6

# ---------------------------------------------------------------------------------------------------------------------
# Brackets and tables
# ---------------------------------------------------------------------------------------------------------------------

BIGGER = {*names("big bigl bigr bigm Big Bigl Bigr Bigm bigg biggl biggr biggm Bigg Biggl Biggr Biggm")}
BRACKETS = {*"()[]/|<>.⟨⟩⌊⌋⌈⌉‖∥∣", r"\{", r"\}", r"\|", *names("langle rangle lfloor rfloor lceil rceil lbrace rbrace")}
BRACKETS |= {*names("lbrack rbrack vert Vert lvert rvert lVert rVert backslash uparrow downarrow updownarrow Uparrow")}
BRACKETS |= {*names("Downarrow Updownarrow lgroup rgroup lmoustache rmoustache ulcorner urcorner llcorner lrcorner")}
BRACKETS |= {*names("lparen rparen mid parallel slash")}
ANGLES = {"<": r"\langle", ">": r"\rangle"}  # what they are as brackets
OPENING = {"(", "[", r"\{", "|", r"\|", r"\langle", r"\lfloor", r"\lceil"}
CLOSING = {")", "]", r"\}", "|", r"\|", r"\rangle", r"\rfloor", r"\rceil"}

# The brackets around an environment, and how its columns are aligned, again and again; others are centered.
AROUND_TABLES = {"pmatrix": "()", "bmatrix": "[]", "vmatrix": "||", "Vmatrix": (r"\|", r"\|")}
AROUND_TABLES |= {"Bmatrix": (r"\{", r"\}"), "cases": (r"\{", ""), "dcases": (r"\{", ""), "rcases": ("", r"\}")}
ALIGNED = dict.fromkeys(["cases", "dcases", "rcases", "multline", "multline*"], "l")
ALIGNED |= dict.fromkeys(["aligned", "align", "align*", "alignedat", "split"], "rl")
ALIGNED |= {"eqnarray": "rcl", "eqnarray*": "rcl", "gather": "c", "gather*": "c", "gathered": "c"}
DISPLAYED = {*ALIGNED} - {"cases", "rcases"}  # limits stand above and below in their cells
OTHER_TABLES = {"substack", "smallmatrix", "tabular", "multline", "multline*"}  # these look like no array
BY_BRACES = {r"\matrix": "matrix", r"\pmatrix": "pmatrix", r"\cases": "cases", r"\substack": "substack"}
ROW_ENDS = (r"\\", r"\cr", r"\tabularnewline")

# ---------------------------------------------------------------------------------------------------------------------
# Unicode
# ---------------------------------------------------------------------------------------------------------------------

# Where a character has several commands, these are written.
PREFERRED = names("""
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi varpi rho varrho
    sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega leq
    geq neq infty partial nabla pm mp times div cdot circ bullet sum prod int oint in notin ni subset supset subseteq
    supseteq cup cap wedge vee neg forall exists emptyset rightarrow leftarrow leftrightarrow Rightarrow Leftarrow
    Leftrightarrow mapsto uparrow downarrow approx equiv sim simeq cong propto perp parallel angle triangle ell hbar Re
    Im aleph wp oplus otimes ominus odot dagger ddagger langle rangle lfloor rfloor lceil rceil ldots cdots vdots ddots
    ll gg prec succ star asymp doteq setminus iint iiint coprod bigcup bigcap bigoplus bigotimes models vdash dashv top
    imath jmath longrightarrow longleftarrow Longrightarrow hookrightarrow surd S P
""")
SMALL_GREEK = {*PREFERRED[: PREFERRED.index(r"\omega") + 1]}
# Those of them that are letters to TeX: braces around one change nothing.
ORDINARY = {*PREFERRED[: PREFERRED.index(r"\Omega") + 1], *names("infty partial nabla ell hbar imath jmath")}
STYLED = {"BOLD": r"\mathbf", "SCRIPT": r"\mathcal", "FRAKTUR": r"\mathfrak", "BLACK-LETTER": r"\mathfrak"}
STYLED |= {"DOUBLE-STRUCK": r"\mathbb", "ITALIC": "", "BOLD ITALIC": r"\boldsymbol", "SANS-SERIF": r"\mathsf"}
STYLED |= {"MONOSPACE": r"\mathtt"}


def of_characters():
    """{character: its tokens}, of Unicode characters that have a command: LaTeX's own comes first in the table."""
    found = {}
    for command in [*(name for name in PREFERRED if name in SYMBOLS), *SYMBOLS]:
        code = SYMBOLS[command]
        if not re.fullmatch("[0-9A-F]{5}", code) or not re.fullmatch(r"\\[A-Za-z]+", command) or command in ARGUMENTS:
            continue
        character = chr(int(code, 16))
        usable = not character.isascii() and unicodedata.is_normalized("NFC", character)
        if usable and unicodedata.category(character)[0] not in "MZ":  # accents follow their letter
            found.setdefault(character, [command])
    found |= {"−": ["-"], "∗": ["*"], "∕": ["/"], "∣": ["|"], "∶": [":"], "·": [r"\cdot"], "⋅": [r"\cdot"], "ℎ": ["h"]}
    found |= {"µ": [r"\mu"], "Ω": [r"\Omega"], "∆": [r"\Delta"], "′": ["'"], "″": ["'"] * 2, "‴": ["'"] * 3}
    found |= {"‖": [r"\|"], "∖": [r"\setminus"], "⊥": [r"\perp"], "〈": [r"\langle"], "〉": [r"\rangle"]}
    found |= {"∅": [r"\emptyset"], "△": [r"\triangle"], "ħ": [r"\hbar"]}
    letters = [chr(code) for code in (*range(0x2100, 0x2150), *range(0x1D400, 0x1D800))]
    styles = {letter: styled(letter, found) for letter in letters if found.get(letter, [""])[0] not in PREFERRED}
    return found | {letter: styling for letter, styling in styles.items() if styling}


def styled(character, known):
    """The tokens of a mathematical letter, such as a bold one, or nothing."""
    plain, name = unicodedata.normalize("NFKC", character), unicodedata.name(character, "")
    words = re.fullmatch(r"(?:MATHEMATICAL )?([A-Z -]+) (?:SMALL|CAPITAL|DIGIT) \w+", name)
    if not words or words[1] not in STYLED or len(plain) != 1:
        return []
    plain = known.get(plain, [plain])
    return [STYLED[words[1]], "{", *plain, "}"] if STYLED[words[1]] else plain


CHARACTERS = of_characters()
RAISED = {letter: ("^", plain) for letter, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True)}
RAISED |= {letter: ("_", plain) for letter, plain in zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙᵢⱼₖₘ", "0123456789+-=()nijkm", strict=True)}


def is_known(command):
    """Whether a command is one of LaTeX's, as far as is known here."""
    known = (SYMBOLS, ALIASES, DRAWN, DOTS, FUNCTIONS, LIMITS, INTEGRALS, BIG, ARGUMENTS, BRACKETS, LETTERS)
    return any(command in names for names in known)
