"""Judges readings of formulas: BLEU, formula match, whether they are LaTeX, and how sure a change is.

It wraps no step. The script writes for each held-out row how many characters are wrong, out of how many; that is the
character error rate (CER) and exact match. What this adds is what spelling can't fool: whether two LaTeX strings are
one formula, and by how much the scores could have differed on other rows.
"""

import re
from itertools import accumulate, chain
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from latex2mathml.converter import convert_to_element
from sacrebleu.metrics import BLEU


class Score(NamedTuple):
    """What a score is called, what it means, whether less is better, and how it is printed."""

    label: str
    meaning: str
    less_is_better: bool
    format: str


SCORES = {
    "cer": Score("CER", "character error rate: edit distance over the length of the truth", True, ".3f"),
    "bleu": Score("BLEU-4", "LaTeX tokens in common with the truth, in runs of up to four", False, ".3f"),
    "exact_match": Score("exact match", "the same characters, spaces aside", False, ".1%"),
    "formula_match": Score("formula match", "the same formula, however it is spelled", False, ".1%"),
    "is_latex": Score("is LaTeX", "can be typeset at all", False, ".1%"),
    "cut": Score("cut off", "stopped by the length limit", True, ".1%"),
}
SHARES = ("exact_match", "formula_match", "is_latex", "cut")  # those that are a share of the rows

corpus_bleu = BLEU(tokenize="none", force=True, effective_order=True)
LATEX_TOKEN = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+\*?|\\.|\S")


def mathml(latex):
    """The MathML of a formula, as a string that is the same for all its spellings. None if `latex` is not LaTeX.

    Spaces, braces and the order of sub- and superscript don't count. What can't be LaTeX: braces that don't match,
    commands without their arguments. A command that the converter does not know stands for itself.
    """
    tokens = LATEX_TOKEN.findall(latex)
    depth = [*accumulate((token == "{") - (token == "}") for token in tokens)]
    if not tokens or min(depth) < 0 or depth[-1] != 0:
        return None
    try:
        return ElementTree.tostring(without_needless_rows(convert_to_element(" ".join(tokens))), encoding="unicode")
    except Exception:  # the converter raises its own kinds, IndexError, RecursionError, ...
        return None


def without_needless_rows(formula):
    """Replaces every <mrow> that has one child, or stands in another row, by its children, from the inside out."""
    for node in reversed([*formula.iter()]):
        in_row = node.tag in ("math", "mrow", "mstyle", "msqrt", "mtd")
        parts = ([*child] if child.tag == "mrow" and (in_row or len(child) == 1) else [child] for child in node)
        node[:] = chain.from_iterable([*parts])
    return formula


def judge(truth, reading):
    """Adds its scores to a reading, {"text", "cut", "errors", "length"}. Returns the counts that `rates` sums up."""
    wanted, read = (" ".join(LATEX_TOKEN.findall(latex)) for latex in (truth, reading["text"]))
    bleu, formula, exact = corpus_bleu.sentence_score(read, [wanted]), mathml(reading["text"]), reading["errors"] == 0
    reading |= {
        "cer": reading["errors"] / reading["length"],
        "bleu": bleu.score / 100,
        "exact_match": exact,
        "formula_match": exact or (formula is not None and formula == mathml(truth)),
        "is_latex": formula is not None,
    }
    counts = [reading["errors"], reading["length"], bleu.sys_len, bleu.ref_len, *bleu.counts, *bleu.totals]
    return counts + [reading[name] for name in SHARES]


def rates(sums, rows):
    """The scores of many readings, from their number and the sums of what `judge` counted."""
    errors, length, tokens, wanted_tokens, *rest = sums
    bleu = corpus_bleu.compute_bleu(rest[:4], rest[4:8], tokens, wanted_tokens, "exp", effective_order=True)
    shares = {name: count / rows for name, count in zip(SHARES, rest[8:], strict=True)}
    return {"cer": errors / length, "bleu": bleu.score / 100} | shares


def score(predictions, seed):
    """Adds its scores to each reading. Returns the scores of all rows before and after, and their differences.

    A difference is {"value": float, "interval": [low, high]}, with the 95% confidence interval of a paired bootstrap:
    the rows are drawn anew, with replacement, 1,000 times.
    """
    rows = len(predictions)
    counts = [[judge(row["truth"], row[when]) for row in predictions] for when in ("before", "after")]
    before, after = (rates(np.sum(parts, axis=0).tolist(), rows) for parts in counts)
    resamples = np.random.default_rng(seed).multinomial(rows, [1 / rows] * rows, size=1000)
    drawn = [[rates(sums, rows) for sums in (resamples @ parts).tolist()] for parts in counts]
    difference = {}
    for name in before:
        changes = [new[name] - old[name] for old, new in zip(*drawn, strict=True)]
        low, high = np.quantile(changes, [0.025, 0.975]).tolist()
        difference[name] = {"value": after[name] - before[name], "interval": [low, high]}
    return before, after, difference


def verdict(name, difference):
    """What the interval of a difference allows to say."""
    low, high = difference["interval"]
    if low <= 0 <= high:
        return "no clear change"
    return "better" if (high < 0) == SCORES[name].less_is_better else "worse"


def as_text(name, value):
    """A score as people read it: 0.094 or 70.0%."""
    return format(value, SCORES[name].format)


def change_as_text(name, difference):
    """A difference with its interval as people read it: -0.655 (-0.751 to -0.568), +69.0 points (+60.0 to +78.0)."""
    percent = "%" in SCORES[name].format
    numbers = (difference["value"], *difference["interval"])
    value, low, high = (f"{100 * number:+.1f}" if percent else f"{number:+.3f}" for number in numbers)
    return f"{value}{' points' * percent} ({low} to {high})"
