"""What goes wrong in readings: which symbols are confused, in formulas of which length and structure, and how narrowly.

It wraps no step. All is counted in LaTeX tokens: `\\alpha` is one, and so is `x`.
"""

from collections import Counter, defaultdict

import numpy as np
from rapidfuzz.distance import Levenshtein

from qwen_vl_kit.latex import tokens

SYMBOLS = 12  # confusions on the page
# Tokens that make a formula one with fractions, and so on. It can be several of these.
STRUCTURES = {
    "fractions": r"\frac \dfrac \tfrac \cfrac \over \atop \binom",
    "roots": r"\sqrt \root",
    "sums and integrals": r"\sum \prod \int \iint \iiint \oint \bigcup \bigcap \bigoplus \bigotimes",
    "accents": r"\hat \widehat \bar \overline \tilde \widetilde \vec \dot \ddot \check \breve \acute \grave \underline",
    "tall brackets": r"\left \big \Big \bigg \Bigg \bigl \Bigl \biggl \Biggl",
    "fonts": r"\mathrm \mathcal \mathbf \mathit \mathsf \mathbb \mathfrak \mathscr \bf \cal \rm \it \sf \text \mbox",
    "scripts": "^ _ '",
}


def is_near(truth, reading):
    """Whether a reading is wrong by one token: another, a missing or a needless one."""
    return not reading["formula_match"] and Levenshtein.distance(tokens(truth), tokens(reading["text"])) == 1


def summary(predictions, names):
    """What goes wrong in the readings that `names` names (see `report_page`), for the page."""
    of_rows = [tokens(prediction["truth"]) for prediction in predictions]
    return {
        "counts": {
            name: {
                "rows": len(predictions),
                "wrong": sum(not prediction[when]["formula_match"] for prediction in predictions),
                "near": sum(is_near(prediction["truth"], prediction[when]) for prediction in predictions),
            }
            for when, name in names.items()
        },
        "symbols": confusions(predictions, names),
        "lengths": [rates(label, rows, names) for label, rows in by_length(predictions, of_rows)],
        "structures": [rates(label, rows, names) for label, rows in by_structure(predictions, of_rows)],
    }


def confusions(predictions, names):
    """The most frequent: {"truth": token or None, "read": token or None, "counts": [of each name], "rows": [numbers]}.

    Of a reading that is more than a third wrong nothing tells which symbol stands for which. Braces are no symbols.
    """
    counts, rows = defaultdict(Counter), defaultdict(dict)
    for prediction in predictions:
        truth = tokens(prediction["truth"])
        for when in names:
            read = tokens(prediction[when]["text"])
            steps = Levenshtein.editops(truth, read)
            if prediction[when]["formula_match"] or 3 * len(steps) > len(truth):
                continue
            for step in steps:
                pair = (
                    None if step.tag == "insert" else truth[step.src_pos],
                    None if step.tag == "delete" else read[step.dest_pos],
                )
                if not {"{", "}"} & {*pair}:
                    counts[pair][when] += 1
                    rows[pair][prediction["row"]] = True
    most = sorted(counts, key=lambda pair: (-counts[pair].total(), None in pair, str(pair)))[:SYMBOLS]
    return [
        {
            "truth": truth,
            "read": read,
            "counts": [counts[truth, read][when] for when in names],
            "rows": [*rows[truth, read]],
        }
        for truth, read in most
    ]


def by_length(predictions, of_rows):
    """(label, predictions) of up to five groups of about as many rows, by the tokens of the true formula."""
    lengths = np.array([len(row) for row in of_rows])
    groups, low = [], int(lengths.min())
    for high in np.unique(np.quantile(lengths, (0.2, 0.4, 0.6, 0.8, 1), method="inverted_cdf")).tolist():
        label = f"{low} to {high}" if low < high else f"{low}"
        groups.append((label, [predictions[place] for place in np.flatnonzero((lengths >= low) & (lengths <= high))]))
        low = high + 1
    return groups


def by_structure(predictions, of_rows):
    """(label, predictions) of each kind of structure that there is, and of formulas without any."""
    found = defaultdict(list)
    for prediction, row in zip(predictions, of_rows, strict=True):
        for label in structures(row) or ["none of these"]:
            found[label].append(prediction)
    order = [*STRUCTURES, "scripts of scripts", "arrays", "none of these"]
    return [(label, found[label]) for label in order if label in found]


def structures(row):
    """The kinds of structure in a formula, given as tokens."""
    found = [label for label, known in STRUCTURES.items() if not {*known.split()}.isdisjoint(row)]
    if scripts_in_scripts(row):
        found.append("scripts of scripts")
    if any(token.startswith(r"\begin{") for token in row) or not {r"\matrix", r"\cases", r"\pmatrix"}.isdisjoint(row):
        found.append("arrays")
    return found


def scripts_in_scripts(row):
    """Whether a sub- or superscript has one of its own."""
    opened = []  # of each group that is open: whether it stands in a script
    for place, token in enumerate(row):
        if token in "^_" and any(opened):
            return True
        if token == "{":
            opened.append(place > 0 and row[place - 1] in "^_")
        elif token == "}" and opened:
            opened.pop()
    return False


def rates(label, predictions, names):
    """A line of the tables: how many rows, and of each reading CER and the share that is right."""
    parts = [[prediction[when] for prediction in predictions] for when in names]
    return {
        "label": label,
        "rows": len(predictions),
        "cer": [
            sum(reading["errors"] for reading in part) / sum(reading["length"] for reading in part) for part in parts
        ],
        "right": [sum(reading["formula_match"] for reading in part) / len(part) for part in parts],
    }
