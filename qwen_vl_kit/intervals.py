"""How far a score, or its change, could lie from the measured one, had other rows been held out: 95% confidence.

It wraps no step; `scores` asks it. How often the intervals contain the true change, `benchmarks/coverage.py` simulates.
"""

from math import lgamma
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)
TAILS = 0.025, 0.975
DRAWS = 2000
# Half a row, as in Jeffreys' prior for a share: if none of n rows is of a rare kind, 2.5 / n of all rows still may be.
# A whole row is safer than need be: intervals up to 45% wider.
UNSEEN = 1 / 2


def of_share(gained, lost, rows):
    """The interval of the change of a share, when `gained` of `rows` rows have entered it and `lost` have left it.

    It is the score interval of Tango (Statistics in Medicine 17, 1998, 891-908): all changes from which the measured
    one is at most Z standard errors away. So it has a width also where no row has changed.
    """
    measured = (gained - lost) / rows

    def possible(change):
        """Whether the measured change is at most Z standard errors from this one."""
        linear = (2 * rows - gained + lost) * change - gained - lost
        root = np.sqrt(max(linear**2 + 8 * rows * lost * change * (1 - change), 0))
        lost_share = (root - linear) / (4 * rows)
        return rows * (measured - change) ** 2 <= Z**2 * (2 * lost_share + change * (1 - change))

    return between(possible, measured, -1.0, 1.0)


def of_one_share(count, rows):
    """The interval of a share of which `count` of `rows` rows are: Clopper and Pearson's (Biometrika 26, 1934, 404).

    All shares with which so many rows, or more, or so many or fewer, are not rarer than one time in forty. It covers
    for any share, Wilson's interval not for rare ones.
    """
    numbers = np.arange(rows + 1)
    ways = lgamma(rows + 1) - np.array([lgamma(n + 1) + lgamma(rows - n + 1) for n in numbers])

    def possible(share):
        chances = np.exp(ways + numbers * np.log(share) + (rows - numbers) * np.log1p(-share))
        return min(chances[count:].sum(), chances[: count + 1].sum()) >= TAILS[0]

    return between(possible, count / rows, 0.0, 1.0)


def between(possible, measured, *impossible):
    """The last numbers that are `possible` on the way from the measured one to each that is not."""
    ends = []
    for end in impossible:
        inside = measured
        for _ in range(40 if inside != end else 0):  # halves the distance between what is possible and what is not
            middle = (inside + end) / 2
            inside, end = (middle, end) if possible(middle) else (inside, middle)
        ends.append(inside)
    return ends


def weighted(counts, seed):
    """Sums of these rows, (rows, columns), weighted anew at random: (DRAWS, columns); and weights of one row more."""
    chance = np.random.default_rng(seed)
    # A hundred at a time: all weights of many rows would take gigabytes.
    sums = np.vstack([chance.standard_exponential((100, len(counts))) @ counts for _ in range(DRAWS // 100)])
    return sums, chance.standard_gamma(UNSEEN, (DRAWS, 1))


def of_one_sum(score, counts, best, worst, seed):
    """The intervals of scores of one set of readings, as `of_sums` has those of changes."""
    sums, weights = weighted(counts, seed)
    ends = [np.quantile(score(sums + weights * np.array(unseen)), TAILS, axis=0) for unseen in (best, worst)]
    return np.transpose([np.min(ends, axis=(0, 1)), np.max(ends, axis=(0, 1))]).tolist()


def of_sums(score, before, after, best, worst, seed):
    """The intervals of the changes of scores that are computed from sums over all rows, as CER and BLEU are.

    `before` and `after`, (rows, columns), are what is summed up; `score` turns sums, (draws, columns), into scores,
    (draws, scores). Returns (scores, low and high).

    A Bayesian bootstrap (Rubin, Annals of Statistics 9, 1981, 130-134): the rows are weighted anew, at random, 2,000
    times. That alone would know nothing of what these rows happen not to show, such as one reading in fifty that runs
    to the length limit. So one more row takes part: the `best` reading, (columns), before and the `worst` after for one
    end, and the other way round for the other. With a whole row's weight that is the bound of Gaffke (2005) and of
    Learned-Miller and Thomas (arXiv 1905.06208, 2019) for a mean.
    """
    sums, weights = weighted(np.hstack([before, after]), seed)
    ends = []
    for unseen in ((best, worst), (worst, best)):
        old, new = map(score, np.split(sums + weights * np.hstack(unseen), 2, axis=1))
        ends.append(np.quantile(np.subtract(new, old), TAILS, axis=0))
    return np.transpose([np.min(ends, axis=(0, 1)), np.max(ends, axis=(0, 1))]).tolist()
