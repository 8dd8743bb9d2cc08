"""Draws what settle.py found: python benchmarks/plot_settled.py settle.json docs/images

Leaves images-and-batches.png and rank-and-rate.png. Each dot is one run, lines join their means. With
`--fill docs/rank-and-rate.md` the tables of that page get the numbers, too.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

from PIL import Image

INK, PRINTED, HAND, SECOND = "#24292f", "#0969da", "#bc4c00", "#8250df"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c959f",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eaeef2",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


class Results:
    """The runs that ended well, by experiment."""

    def __init__(self, file):
        record = json.loads(Path(file).read_text(encoding="utf-8"))
        self.area, self.runs = record["printed_area"], defaultdict(list)
        for run in sorted(record["results"], key=lambda run: (run["seed"] != 3407, run["seed"])):
            if run["finished"]:
                self.runs[run["group"], run["name"]].append(run)

    def panels(self):
        """{what a panel is called: [(x, runs), one for each setting]}; there are no runs where none ended."""
        hand, printed = ("base", "hand"), ("base", "printed")
        area = {self.area: printed} | {self.area * times: ("area", f"{times}") for times in (2, 3, 4)}
        rates = {rate: ("rate", f"{rate:g}") for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)} | {2e-3: hand}
        printed_rates = {3e-4: ("printed rate", "0.0003"), 1e-3: printed, 3e-3: ("printed rate", "0.003")}
        ranks = {8: ("rank", "8"), 16: hand, 32: ("rank", "32"), 64: ("rank", "64")}
        spellings = {"as it is": printed, "compact": ("spelling", "compact"), "uniform": ("spelling", "uniform")}
        named = {
            "area": area,
            "pixels": {pixels: ("pixels", f"{pixels}") for pixels in (9000, 18000, 36000)},
            "spelling": spellings,
            "batch": {8: ("batch", "8"), 16: ("batch", "16"), 32: hand, 64: ("batch", "64")},
            "rank": ranks,
            "alpha": {64: ("rank", "64, alpha 64")},
            "rate": rates,
            "printed rate": printed_rates,
            "steps": {300: ("rank", "64, alpha 64"), 900: ("long", "long")},
        }
        return {name: [(x, self.runs.get(key, [])) for x, key in keys.items()] for name, keys in named.items()}


def after(runs, score="cer"):
    return [run[score]["after"] for run in runs]


def dots(axes, series, color, label, places=None, score="cer", joined=True):
    """Draws a dot for each run, and a line through their means."""
    places = places or [x for x, _ in series]
    means = [statistics.mean(after(runs, score)) for _, runs in series]
    if joined and len(places) > 1:
        axes.plot(places, means, color=color, linewidth=1.6, alpha=0.55, zorder=2)
    for place, (_, runs) in zip(places, series, strict=True):
        values = after(runs, score)
        axes.scatter([place] * len(values), values, s=34, color=color, edgecolor="white", linewidth=0.8, zorder=3)
    axes.scatter([], [], s=34, color=color, label=label)


def finish(axes, title, x_label, ticks=None, labels=None):
    axes.set_title(title, pad=8)
    axes.set_xlabel(x_label)
    axes.set_ylabel("CER after training")
    axes.margins(x=0.1)
    values = [value for dots in axes.collections for _, value in dots.get_offsets()]
    if values and min(values) > 0 and max(values) > 6 * min(values):
        axes.set_yscale("log")
        if max(values) < 10:
            axes.yaxis.set_major_formatter("{x:g}")
    elif values:
        axes.set_ylim(0, 1.15 * max(values))
    if ticks is not None:
        axes.set_xticks(ticks, labels or [f"{tick:,g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)


def image_figure(plt, panels, area):
    figure, ((top, hand), (spelling, batch)) = plt.subplots(2, 2, figsize=(8, 6.6), layout="constrained")
    dots(top, panels["area"], PRINTED, "CER")
    dots(top, panels["area"], SECOND, "spelling aside", score="normalized_cer")
    ticks = [x for x, _ in panels["area"]]
    times = [f"{x:,.0f}\n({round(x / area)}×)" if x > area else "as they\nare" for x in ticks]
    finish(top, "Printed: image area", "least area (--min_pixels), pixels", ticks, times)
    top.legend()
    hand.set_xscale("log", base=2)
    dots(hand, panels["pixels"], HAND, "CER")
    finish(hand, "Handwritten: image area", "area of every image, pixels", [x for x, _ in panels["pixels"]])
    names, places = [x for x, _ in panels["spelling"]], [*range(len(panels["spelling"]))]
    dots(spelling, panels["spelling"], PRINTED, "CER", [place - 0.08 for place in places], joined=False)
    shifted = [place + 0.08 for place in places]
    dots(spelling, panels["spelling"], SECOND, "spelling aside", shifted, "normalized_cer", joined=False)
    finish(spelling, "Printed: spelling of the LaTeX", "spelling", places, names)
    spelling.set_xlim(-0.5, len(places) - 0.5)
    spelling.legend()
    batch.set_xscale("log", base=2)
    dots(batch, panels["batch"], HAND, "CER")
    finish(
        batch, "Handwritten: batch size, 9,600 samples", "samples per optimizer step", [x for x, _ in panels["batch"]]
    )
    return figure


def rank_figure(plt, panels):
    figure, ((rank, steps), (rate, printed)) = plt.subplots(2, 2, figsize=(8, 6.6), layout="constrained")
    rank.set_xscale("log", base=2)
    dots(rank, panels["rank"], HAND, "alpha 16")
    dots(rank, panels["alpha"], SECOND, "alpha 64", [x * 1.08 for x, _ in panels["alpha"]])  # beside the others
    finish(rank, "Handwritten: rank", "rank (--lora_r)", [x for x, _ in panels["rank"]])
    rank.legend()
    dots(steps, panels["steps"], SECOND, "rank 64, alpha 64")
    finish(steps, "Handwritten: training for longer", "steps of 32 samples", [x for x, _ in panels["steps"]])
    steps.set_xlim(0, 1000)
    steps.legend()
    for axes, name, color, title in (
        (rate, "rate", HAND, "Handwritten: learning rate"),
        (printed, "printed rate", PRINTED, "Printed: learning rate"),
    ):
        axes.set_xscale("log")
        dots(axes, panels[name], color, "CER")
        ticks = [x for x, _ in panels[name]]
        labels = [f"{x:.0e}".replace("e-0", "e-") for x in ticks]
        finish(axes, title, "learning rate", ticks, labels)
    return figure


def mean(runs, pick, form):
    return form.format(statistics.mean(map(pick, runs))) if runs else "…"


def each(score):
    """A function that tells the mean of some runs, and all of them in brackets."""

    def told(runs):
        every = ", ".join(f"{value:.3f}" for value in after(runs, score))
        return mean(runs, lambda run: run[score]["after"], "{:.3f}") + (f" ({every})" if len(runs) > 1 else "")

    return told


COLUMNS = {
    "CER before": lambda runs: mean(runs, lambda run: run["cer"]["before"], "{:.3f}"),
    "CER": each("cer"),
    "spelling aside": each("normalized_cer"),
    "exact match": lambda runs: mean(runs, lambda run: 100 * run["exact_match"]["after"], "{:.1f}%"),
    "samples/s": lambda runs: mean(runs, lambda run: run["samples_per_s"], "{:.0f}"),
}


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def fill(text, panels):
    """A page with the numbers in each table after a line like `<!-- table: rank, alpha -->`, which names panels.

    The table has one row for each setting of these panels; in the columns that COLUMNS names, its cells are replaced.
    """

    def filled(match):
        settings = [setting for name in match["names"].split(", ") for setting in panels[name]]
        header, line, *rows = match["table"].splitlines()
        names, new = cells(header), []
        for row, (_, runs) in zip(rows, settings, strict=True):
            told = [
                COLUMNS[name](runs) if name in COLUMNS else old for name, old in zip(names, cells(row), strict=True)
            ]
            new.append(f"| {' | '.join(told)} |")
        return "\n".join([match["marker"], header, line, *new, ""])

    return re.sub(r"(?P<marker><!-- table: (?P<names>.*) -->\n)\n(?P<table>(\|.*\n)+)", filled, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/images"))
    parser.add_argument("--fill", type=Path, nargs="+", default=[], help="pages whose tables get the numbers")
    options = parser.parse_args()
    if json.loads(options.results.read_text(encoding="utf-8")).get("tiny"):
        parser.error(f"{options.results} is of a tiny run, which says nothing")
    results = Results(options.results)
    panels = results.panels()
    for page in options.fill:
        page.write_text(fill(page.read_text(encoding="utf-8"), panels), encoding="utf-8")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    options.folder.mkdir(parents=True, exist_ok=True)
    ended = {name: [setting for setting in panel if setting[1]] for name, panel in panels.items()}
    with plt.rc_context(STYLE):  # white behind it, so that it looks the same on a dark page
        for name, figure in (
            ("images-and-batches", image_figure(plt, ended, results.area)),
            ("rank-and-rate", rank_figure(plt, ended)),
        ):
            file = options.folder / f"{name}.png"
            figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
            figure.savefig(file, dpi=160, facecolor="white")
            with Image.open(file) as drawn:  # a third of the bytes, and nobody sees it
                drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
            print(file)


if __name__ == "__main__":
    main()
