"""The 95% confidence intervals: against published ones, and by a shorter run of `benchmarks/coverage.py`."""

import functools
import importlib.util
import math
import random

import numpy as np
import pytest
from conftest import ROOT
from test_scores import corpus, reading

from qwen_vl_kit import intervals, scores

spec = importlib.util.spec_from_file_location("simulation", ROOT / "benchmarks/coverage.py")
simulation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simulation)


@pytest.fixture(scope="module")
def truths():
    """400 formulas, as long as the demo's."""
    chance = random.Random(1)
    return [" ".join(chance.choices(["x", "y", "+", "1", "2", r"\alpha"], k=chance.randint(4, 9))) for _ in range(400)]


@pytest.mark.parametrize(
    "gained, lost, rows, low, high",
    [
        # Cavo et al. 2012, complete response before and after therapy: 59, 6, 16 and 80 patients. The interval is in
        # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, 2017, chapter 8, and in the tests
        # of the R package contingencytables.
        (6, 16, 161, -0.1240, -0.0054),
        # Where no row has changed it is Wilson's interval of 0 of n rows, to both sides: z^2 / (n + z^2).
        (0, 0, 44, -0.0803, 0.0803),
        (0, 0, 8, -0.3244, 0.3244),
        # Where all rows have, Wilson's of n of n: n / (n + z^2).
        (64, 0, 64, 0.9434 - 0.0566, 1),
    ],
)
def test_shares_have_tango_s_interval(gained, lost, rows, low, high):
    assert intervals.of_share(gained, lost, rows) == pytest.approx([low, high], abs=1e-4)
    assert intervals.of_share(lost, gained, rows) == pytest.approx([-high, -low], abs=1e-4)


@pytest.mark.parametrize(
    "count, rows, low, high",
    [
        # The "rule of three", with both tails: 1 - 0.025 ** (1 / n); and Brown, Cai and DasGupta, Statistical Science
        # 16, 2001, table 5, and tables of the binomial distribution.
        (0, 10, 0, 1 - 0.025**0.1),
        (10, 10, 0.025**0.1, 1),
        (1, 10, 0.0025, 0.4450),
        (5, 10, 0.1871, 0.8129),
        (81, 263, 0.2527, 0.3676),
    ],
)
def test_one_share_has_clopper_s_and_pearson_s_interval(count, rows, low, high):
    assert intervals.of_one_share(count, rows) == pytest.approx([low, high], abs=1e-4)


@pytest.mark.parametrize("rows", [8, 64, 500])
def test_intervals_of_one_share_cover(rows):
    """Computed, not simulated: the chances of all counts whose interval has the share in it."""
    found = [intervals.of_one_share(count, rows) for count in range(rows + 1)]
    for share in (0.001, 0.0027, 0.01, 0.1, 0.5, 0.68, 0.99):
        chances = [math.comb(rows, n) * share**n * (1 - share) ** (rows - n) for n in range(rows + 1)]
        covers = (low <= share <= high for low, high in found)
        assert sum(chance for chance, covered in zip(chances, covers, strict=True) if covered) >= 0.95 - 1e-9


@pytest.mark.parametrize("rows, how", [(8, {}), (64, {"runaways": (0, 0.03)}), (64, {"repeats": True})])
def test_intervals_of_one_cer_cover(rows, how, truths):
    everything = simulation.population(truths, **how)[1]
    true, covered = simulation.cer(everything.sum(axis=0)[None])[0], 0
    for seed in range(200):
        held_out = everything[np.random.default_rng(seed).integers(len(everything), size=rows)]
        ends = scores.extremes(held_out, simulation.LIMIT)
        ((low, high),) = intervals.of_one_sum(lambda sums: simulation.cer(sums)[:, None], held_out, *ends, seed)
        covered += low <= true <= high
    assert covered >= 0.93 * 200


@pytest.mark.parametrize("rows", [8, 64, 100])
@pytest.mark.parametrize("gains, losses", [(0, 0), (0.01, 0), (0.25, 0.05), (0.025, 0.005)])
def test_intervals_of_shares_cover(gains, losses, rows):
    held_out = functools.partial(simulation.of_a_share, gains, losses, rows)
    found = simulation.simulate(gains - losses, held_out, 1000)
    assert found["covered"] >= 0.93
    if 0 < gains < 0.1 and rows < 100:
        assert found["bootstrap covered"] < 0.9, "a bootstrap does as well: then take it"


@pytest.mark.parametrize(
    "rows, how",
    [
        (8, {}),
        (64, {}),
        (64, {"runaways": (0, 0.03)}),
        (100, {"runaways": (0, 0.03)}),
        (64, {"runaways": (0.03, 0)}),
        (64, {"repeats": True}),
    ],
)
def test_intervals_of_cer_cover(rows, how, truths):
    everything = simulation.population(truths, **how)
    before, after = simulation.cer(everything.sum(axis=1))
    held_out = functools.partial(simulation.of_a_sum, simulation.cer, everything, rows)
    found = simulation.simulate(after - before, held_out, 200)
    assert found["covered"] >= 0.93
    if how:
        assert found["bootstrap covered"] < 0.93, "a bootstrap does as well: then take it"


def test_no_change_in_any_row_is_no_certainty():
    """The old interval had no width: 0 of 64 rows changed, so none of a million would."""
    same = corpus(*[("x", "x"), ("x + y", "x - y")] * 32)
    for prediction in same:
        prediction["before"] = dict(prediction["after"])
    for name, difference in scores.score(same, seed=1)[2].items():
        low, high = difference["interval"]
        assert difference["value"] == 0 and low < -0.03 and high > 0.03, name
        assert scores.verdict(name, difference) == "no clear change"


def test_what_few_rows_happen_not_to_show_is_allowed_for():
    """Of 64 readings none has run to the limit. If 3% of all do, that is so in one of seven times."""
    truth = "x + y - z * 1 2 3 4 5"  # 13 characters
    rows = corpus(*[(truth, truth), (truth, truth.replace("x", "y"))] * 32)
    for prediction in rows:
        prediction["before"] = reading(truth, "x + y")
    difference = scores.score(rows, seed=1, max_new_tokens=128)[2]["cer"]
    low, high = difference["interval"]
    assert high > difference["value"] + 0.03 * 128 / 13
    assert low < difference["value"] - 0.03 * 128 / 13
    # A lower limit leaves less to be allowed for, and the values are those of the rows.
    shorter = scores.score(rows, seed=1, max_new_tokens=32)[2]["cer"]
    assert low < shorter["interval"][0] < shorter["value"] == difference["value"] < shorter["interval"][1] < high
    # A longer text that was seen counts more than the limit.
    rows[0]["after"] = reading(truth, "x" * 500)
    assert scores.score(rows, seed=1, max_new_tokens=32)[2]["cer"]["interval"][1] > 500 / 13 / 64


def test_a_value_is_in_its_interval():
    chance = random.Random(1)
    for rows in (1, 2, 3, 8, 40):
        for seed in range(5):
            readings = corpus(*[("x + y", chance.choice(["x + y", "x", "", "y y y y y y", "{x"])) for _ in range(rows)])
            for prediction in readings:
                prediction["before"] = reading("x + y", chance.choice(["x + y", "", "1", "x" * 300]))
            for name, difference in scores.score(readings, seed)[2].items():
                low, high = difference["interval"]
                assert low <= difference["value"] <= high and low < high, (name, rows, seed)
                assert name in ("cer", "normalized_cer") or -1 - 1e-9 <= low <= high <= 1 + 1e-9
    assert scores.score(readings, seed=1) == scores.score(readings, seed=1), "not decided by the seed"


def test_thousands_of_rows_take_no_gigabytes():
    counts = np.ones((20_000, 3))
    (interval,) = intervals.of_sums(
        lambda sums: sums[:, :1] / sums[:, 1:2], counts, counts, [0, 1, 1], [9, 1, 1], seed=1
    )
    assert interval == pytest.approx([0, 0], abs=2e-3)


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("cer", 0.0, "0.000"), ("cer", 0.0003, "0.0003"), ("cer", 0.0941, "0.094"), ("bleu", 0.99996, "0.99996"),
        ("bleu", 1 + 2e-16, "1.000"),
        ("exact_match", 1.0, "100.0%"), ("exact_match", 0.9998, "99.98%"), ("exact_match", 0.0002, "0.02%"),
        ("exact_match", 0.7, "70.0%"),
    ],
)  # fmt: skip
def test_no_score_is_rounded_to_all_or_nothing(name, value, text):
    assert scores.as_text(name, value) == text


def test_no_change_is_rounded_to_none():
    change = {"value": -0.0004, "interval": [-0.0007, -0.00002]}
    assert scores.change_as_text("cer", change) == "-0.0004 (-0.001 to -0.00002)"
    assert scores.change_as_text("exact_match", change) == "-0.04 points (-0.1 to -0.002)"
    assert scores.verdict("cer", change) == "better" and scores.verdict("exact_match", change) == "worse"
    assert scores.change_as_text("cut", {"value": 0.0, "interval": [-0.057, 0.057]}) == "+0.0 points (-5.7 to +5.7)"
    assert scores.verdict("cer", {"interval": [-0.1, 0]}) == "no clear change"


def test_few_rows_are_named():
    assert scores.warning(8) == "Only 8 held-out images: too few to show more than large changes."
    assert scores.warning(1).startswith("Only 1 held-out image:")
    assert not scores.warning(30)
