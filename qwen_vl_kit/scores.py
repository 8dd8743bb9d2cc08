"""Judges readings of formulas: BLEU, formula match, whether they are LaTeX, and how sure a change is.

It wraps no step. The script writes for each held-out row how many characters are wrong, out of how many, spaces aside;
that is the character error rate (CER). What this adds is what spelling can't fool: by `latex`, whether two texts are
the same tokens, or look the same, and the CER of both in one spelling; and by how much the scores could have differed
on other rows.
"""

from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein
from sacrebleu.metrics import BLEU

from qwen_vl_kit import intervals, latex


class Score(NamedTuple):
    """What a score is called, what it means, and whether less is better."""

    label: str
    meaning: str
    less_is_better: bool


SCORES = {
    "cer": Score("CER", "character error rate: edit distance over the length of the truth, both without spaces", True),
    "normalized_cer": Score(
        "CER, spelling aside",
        "CER of both in one spelling; what CER is higher by is LaTeX that is written otherwise and looks the same",
        True,
    ),
    "bleu": Score("BLEU-4", "LaTeX tokens in common with the truth, in runs of up to four", False),
    "exact_match": Score("exact match", "the same LaTeX tokens", False),
    "formula_match": Score("formula match", "it looks the same, however it is spelled", False),
    "is_latex": Score("is LaTeX", "braces match, no command lacks an argument", False),
    "cut": Score("cut off", "stopped by the length limit", True),
}
RATIOS = ("cer", "normalized_cer", "bleu")  # those that are computed from sums over the rows
SHARES = ("exact_match", "formula_match", "is_latex", "cut")  # those that are a share of the rows
FEW = 30  # with fewer rows, a share that has risen from 50 to 70% shows no clear change more often than not

corpus_bleu = BLEU(tokenize="none", force=True, effective_order=True)


def characters(tokens):
    """Tokens as the characters that are compared. A command ends in a space, so `\\alpha x` is not `\\alphax`."""
    return "".join(f"{token} " if token[0] == "\\" and token[-1].isalpha() else token for token in tokens)


def judge(truth, reading):
    """Adds its scores to a reading, {"text", "cut", "errors", "length"}. Returns the counts that `rates` sums up."""
    wanted, read = latex.tokens(truth), latex.tokens(reading["text"])
    bleu, exact = corpus_bleu.sentence_score(" ".join(read), [" ".join(wanted)]), read == wanted
    plain_truth, plain = (characters(latex.normalized(text)) for text in (truth, reading["text"]))
    errors, length = Levenshtein.distance(plain, plain_truth), max(len(plain_truth), 1)
    reading |= {
        "cer": reading["errors"] / reading["length"],
        "normalized_errors": errors,
        "normalized_length": length,
        "normalized_cer": errors / length,
        "bleu": bleu.score / 100,
        "exact_match": exact,
        "formula_match": exact or latex.same(truth, reading["text"]),
        "is_latex": latex.looks(reading["text"]) is not None,
    }
    counts = [reading["errors"], reading["length"], errors, length, bleu.sys_len, bleu.ref_len]
    return [*counts, *bleu.counts, *bleu.totals, *(reading[name] for name in SHARES)]


def ratios(sums):
    """The RATIOS of many readings, from the sums of what `judge` counted, a list."""
    errors, length, normalized_errors, normalized_length, *counts = sums
    tokens, wanted_tokens, *runs = (round(count) for count in counts[:10])  # sacrebleu prints them as whole numbers
    bleu = corpus_bleu.compute_bleu(runs[:4], runs[4:], tokens, wanted_tokens, "exp", effective_order=True)
    return errors / length, normalized_errors / normalized_length, bleu.score / 100


def rates(sums, rows):
    """All scores of many readings, from their number and the sums of what `judge` counted."""
    shares = (count / rows for count in sums[-len(SHARES) :])
    return dict(zip((*RATIOS, *SHARES), (*ratios(sums), *shares), strict=True))


def extremes(counts, max_new_tokens):
    """What `judge` would count in a reading without an error, and in one that ran to the length limit.

    `counts` is what it counted in others, (readings, columns).
    """
    (_, length, _, normalized_length, _, wanted, *_), most = counts.mean(axis=0), counts.max(axis=0)
    errors, longest, normalized_errors, normalized_longest, tokens, longest_wanted, *_ = most
    # A token has as many characters as in the truths. What is longer has been seen, so it is possible.
    errors = max(errors, longest, max_new_tokens * length / wanted)
    normalized_errors = max(normalized_errors, normalized_longest, max_new_tokens * normalized_length / wanted)
    tokens = max(tokens, longest_wanted, max_new_tokens)
    runs = np.arange(4)  # of two tokens there is one less than there are tokens, ...
    best = [
        0,
        length,
        0,
        normalized_length,
        wanted,
        wanted,
        *np.maximum(wanted - runs, 0),
        *np.maximum(wanted - runs, 0),
    ]
    worst = [errors, length, normalized_errors, normalized_length, tokens, wanted]
    worst += [*[0] * 4, *np.maximum(tokens - runs, 0)]
    return [extreme + [0] * len(SHARES) for extreme in (best, worst)]


def score(predictions, seed, max_new_tokens=128):
    """Adds its scores to each reading. Returns the scores of all rows before and after, and their differences.

    A difference is {"value": float, "interval": [low, high]}, the latter with 95% confidence. It depends on how long a
    reading could have become: `max_new_tokens`, or as long as any that was seen.
    """
    rows = len(predictions)
    counts = np.array([[judge(row["truth"], row[when]) for row in predictions] for when in ("before", "after")], float)
    before, after = (rates(part.sum(axis=0).tolist(), rows) for part in counts)
    best, worst = extremes(np.vstack(counts), max_new_tokens)
    ends = intervals.of_sums(lambda drawn: [*map(ratios, drawn.tolist())], *counts, best, worst, seed)
    for change in (counts[1] - counts[0])[:, -len(SHARES) :].T:
        ends.append(intervals.of_share(int(sum(change > 0)), int(sum(change < 0)), rows))
    difference = {}
    for name, (low, high) in zip(before, ends, strict=True):
        value = after[name] - before[name]
        difference[name] = {"value": value, "interval": [min(low, value), max(high, value)]}
    return before, after, difference


def score_one(predictions, seed, max_new_tokens=128):
    """The same of one set of readings, those "after": the scores of all rows, and {name: [low, high]} of each."""
    rows = len(predictions)
    counts = np.array([judge(row["truth"], row["after"]) for row in predictions], float)
    scores = rates(counts.sum(axis=0).tolist(), rows)
    best, worst = extremes(counts, max_new_tokens)
    ends = intervals.of_one_sum(lambda drawn: [*map(ratios, drawn.tolist())], counts, best, worst, seed)
    ends += [intervals.of_one_share(int(sum(share)), rows) for share in counts[:, -len(SHARES) :].T]
    found = {}
    for (name, value), (low, high) in zip(scores.items(), ends, strict=True):
        found[name] = [min(low, value), max(high, value)]
    return scores, found


def compare(truth, reading):
    """Adds to a reading, {"text"}, what the script counts: edit distance and length of the truth, without spaces."""
    truth, text = "".join(truth.split()), "".join(reading["text"].split())
    reading |= {"errors": Levenshtein.distance(text, truth), "length": len(truth)}


def remarks(predictions, trained=False):
    """Sentences on what the scores of the readings "after" mean.

    `trained` says that it was a run of the script, which has printed some of them before.
    """
    readings = [row["after"] for row in predictions]
    of, alike = " after training" * trained, [one for one in readings if one["formula_match"] and one["errors"]]
    part = sum(one["errors"] for one in alike) / sum(one["length"] for one in readings)
    said = [
        f"{len(alike)} reading{'s' * (len(alike) != 1)} that look{'s' * (len(alike) == 1)} right "
        f"{'is' if len(alike) == 1 else 'are'} spelled otherwise, which is {as_text('cer', part)} of the CER{of}."
        if alike
        else "Each reading that looks right is also spelled like the truth."
    ]
    if trained and any((one["errors"] == 0) != one["exact_match"] for one in readings):
        by_characters = sum(one["errors"] == 0 for one in readings) / len(readings)
        said.append(
            "Exact match compares LaTeX tokens, without $...$ around a formula; by characters without spaces, as said "
            f"right after training, it is {as_text('exact_match', by_characters)}."
        )
    return said


def verdict(name, difference):
    """What the interval of a difference allows to say."""
    low, high = difference["interval"]
    if low <= 0 <= high:
        return "no clear change"
    return "better" if (high < 0) == SCORES[name].less_is_better else "worse"


def rounded(number, digits, *ends, sign=""):
    """A number with so many decimals, and with more where it would look like one of `ends` without being it."""
    while digits < 6 and any(round(number, digits) == end and abs(number - end) > 1e-9 for end in ends):
        digits += 1
    return f"{number:{sign}.{digits}f}"


def as_text(name, value):
    """A score as people read it: 0.094 or 70.0%."""
    return f"{rounded(100 * value, 1, 0, 100)}%" if name in SHARES else rounded(value, 3, 0, 1)


def change_as_text(name, difference):
    """A difference with its interval as people read it: -0.655 (-0.751 to -0.568), +69.0 points (+60.0 to +78.0)."""
    numbers = (difference["value"], *difference["interval"])
    if name in SHARES:
        value, low, high = (rounded(100 * number, 1, 0, sign="+") for number in numbers)
        return f"{value} points ({low} to {high})"
    value, low, high = (rounded(number, 3, 0, sign="+") for number in numbers)
    return f"{value} ({low} to {high})"


def held_out(rows):
    """The rows as people name them: 8 held-out images."""
    return f"{rows} held-out image{'s' * (rows != 1)}"


def warning(rows):
    """What has to be said about scores from few rows, or nothing."""
    return f"Only {held_out(rows)}: too few to show more than large changes." if rows < FEW else ""
