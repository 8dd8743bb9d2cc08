"""How often a 95% confidence interval of the report contains the true change. It should be 95 times of 100.

    python benchmarks/coverage.py

What a model reads is made up here: true formulas of a data set with wrong, missing and doubled tokens. 2,000 such rows,
before and after, stand for all images there are, so the true change is known. Again and again some of them are held
out, and it is counted how often the interval contains the truth, and how often a plain bootstrap's does, the kit's
interval before. Leaves `coverage.json` and `coverage.md` in `outputs/benchmark/`.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
from datasets import load_dataset
from rapidfuzz.distance import Levenshtein

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qwen_vl_kit import intervals, latex, scores  # noqa: E402

LIMIT = 128  # tokens, the script's --max_new_tokens


def counted(truth, tokens):
    """What the kit counts in a reading of these tokens."""
    wanted, read = truth.replace(" ", ""), "".join(tokens)
    reading = {"text": " ".join(tokens), "cut": len(tokens) >= LIMIT, "length": len(wanted)}
    return scores.judge(truth, reading | {"errors": Levenshtein.distance(wanted, read)})


def misread(truth, share, chance):
    """The tokens of a formula, of which about this share is wrong, missing or there twice."""
    read = []
    for token in latex.tokens(truth):
        slips = [], [token] * 2, [chance.choice("abxy012+-=")]
        read += chance.choice(slips) if chance.random() < share else [token]
    return read


def runaway(truth, chance):
    """A few tokens of the formula, again and again up to the length limit."""
    tokens = latex.tokens(truth)
    start = chance.randrange(len(tokens))
    loop = tokens[start : start + chance.randint(1, 6)]
    return (tokens[:start] + loop * LIMIT)[:LIMIT]


def population(truths, wrong=(0.4, 0.05), runaways=(0, 0), repeats=False):
    """What is counted in all rows there are, (before and after, rows, columns).

    `wrong` is how much is misread before and after, `runaways` which share of the rows runs to the length limit. With
    `repeats`, what is read after training is there again and again: mostly once, seldom often.
    """
    chance, counts = random.Random(1), ([], [])
    for truth in truths:
        for part, share, endless in zip(counts, wrong, runaways, strict=True):
            tokens = misread(truth, share * 2 * chance.random(), chance)
            if repeats and part is counts[1]:
                tokens = (tokens * int(chance.paretovariate(1.5)))[: LIMIT - 1]
            part.append(counted(truth, runaway(truth, chance) if chance.random() < endless else tokens))
    return np.array(counts, float)


def bootstrap(score, before, after, seed):
    """The interval that the kit had before: percentiles over rows drawn anew."""
    rows = len(before)
    drawn = np.random.default_rng(seed).multinomial(rows, [1 / rows] * rows, size=1000)
    return np.quantile(score(drawn @ after) - score(drawn @ before), intervals.TAILS)


def of_a_sum(score, everything, rows, seed):
    """Both intervals of the change of CER or BLEU on so many rows."""
    held_out = everything[:, np.random.default_rng(seed).integers(everything.shape[1], size=rows)]
    both = scores.extremes(np.vstack(held_out), LIMIT)
    (interval,) = intervals.of_sums(lambda sums: score(sums)[:, None], *held_out, *both, seed)
    return interval, bootstrap(score, *held_out, seed)


def of_a_share(gains, losses, rows, seed):
    """Both intervals of the change of a share of which so many rows are gained and lost by training."""
    chance = np.random.default_rng(seed)
    gained, lost, same = chance.multinomial(rows, [gains, losses, 1 - gains - losses])
    drawn = chance.multinomial(rows, np.array([gained, lost, same]) / rows, size=1000)
    old = np.quantile((drawn[:, 0] - drawn[:, 1]) / rows, intervals.TAILS)
    return intervals.of_share(gained, lost, rows), old


def cer(sums):
    return sums[:, 0] / sums[:, 1]


def bleu(sums):
    return np.array([scores.ratios(row)[-1] for row in sums.tolist()])


def cases(truths, only):
    """What is simulated: a name with `only` in it, the true change, rows, and what gives both intervals for a seed."""
    sums = {
        "CER, ordinary": (cer, {}, (8, 16, 32, 64, 100, 500)),
        "CER, nothing learned": (cer, {"wrong": (0.2, 0.2)}, (8, 64, 100)),
        "CER, 1% run to the limit after": (cer, {"runaways": (0, 0.01)}, (64, 100)),
        "CER, 3% run to the limit after": (cer, {"runaways": (0, 0.03)}, (8, 64, 100, 500)),
        "CER, 6% run to the limit after": (cer, {"runaways": (0, 0.06)}, (64, 100)),
        "CER, 1% run to the limit before": (cer, {"runaways": (0.01, 0)}, (64, 100)),
        "CER, 3% run to the limit before": (cer, {"runaways": (0.03, 0)}, (64, 100)),
        "CER, 3% run to the limit both times": (cer, {"runaways": (0.03, 0.03)}, (8, 64, 100)),
        "CER, some repeat themselves after": (cer, {"repeats": True}, (8, 16, 32, 64, 100, 500)),
        "BLEU, ordinary": (bleu, {}, (8, 16, 32, 64, 100, 500)),
        "BLEU, 3% run to the limit after": (bleu, {"runaways": (0, 0.03)}, (64, 100)),
    }
    for name, (score, how, sizes) in sums.items():
        if only not in name:
            continue
        everything = population(truths, **how)
        before, after = score(everything.sum(axis=1))
        for rows in sizes:
            yield name, after - before, rows, lambda seed, x=(score, everything, rows): of_a_sum(*x, seed)
    shares = {"0 to 0%": (0, 0), "0 to 1%": (0.01, 0), "50 to 70%": (0.25, 0.05), "97 to 99%": (0.025, 0.005)}
    for name, (gains, losses) in shares.items():
        for rows in (8, 16, 32, 64, 100, 500) if only in (of := f"a share, {name}") else ():
            yield of, gains - losses, rows, lambda seed, x=(gains, losses, rows): of_a_share(*x, seed)


def simulate(change, intervals_of, times):
    """How often each of both intervals contains the change, how often it is on one side of zero, its median width."""
    low, high = np.array([intervals_of(seed) for seed in range(times)]).transpose(2, 1, 0)  # each (both, times)
    found = {"covered": (low - 1e-9 <= change) & (change <= high + 1e-9), "clear": (low > 0) | (high < 0)}
    found = {name: which.mean(axis=1) for name, which in found.items()} | {"width": np.median(high - low, axis=1)}
    return {
        f"{method}{name}": float(value)
        for name, values in found.items()
        for method, value in zip(("", "bootstrap "), values, strict=True)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="demo/data", help="whose column `text` has the true formulas")
    parser.add_argument("--times", type=int, default=1000, help="how often rows are held out (for BLEU, a fifth)")
    parser.add_argument("--only", default="", help="simulates the cases with this in their name")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark"))
    options = parser.parse_args()
    truths = load_dataset(options.dataset, split="train").shuffle(seed=1).select(range(2000))["text"]
    found = []
    lines = ["| | rows | true change | covered | width | clear | bootstrap: covered | width |", "|---" * 8 + "|"]
    for name, change, rows, intervals_of in cases([text.strip() for text in truths], options.only):
        of = simulate(change, intervals_of, options.times // 5 if "BLEU" in name else options.times)
        found.append({"case": name, "rows": rows, "change": change} | of)
        line = f"| {name} | {rows} | {change:+.3f} | **{of['covered']:.1%}** | {of['width']:.3f} | {of['clear']:.0%} |"
        lines.append(line + f" {of['bootstrap covered']:.1%} | {of['bootstrap width']:.3f} |")
        print(lines[-1], flush=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "coverage.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output_dir / "coverage.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
