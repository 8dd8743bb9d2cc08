"""Shows what a run has learned: a page, more scores, a model card.

    python -m qwen_vl_kit report outputs

Wraps `save`: when that has written `metrics.json`, `predictions.jsonl` and `held_out/`, this makes of them

- `report.html`, one page to open from disk, without a network and without scripts;
- more scores in `metrics.json` and `predictions.jsonl`: BLEU, formula match, is it LaTeX, and how sure each change is;
- the adapter's model card, `adapter/README.md`, with the scores in the hub's own form.
"""

import argparse
import html
import json
import sys
from datetime import datetime
from pathlib import Path

import numpy as np

from qwen_vl_kit.card import make_card
from qwen_vl_kit.finished import metrics_of, predictions_of, shown_name
from qwen_vl_kit.report_page import TRAINED, between, make_page
from qwen_vl_kit.scores import SCORES, as_text, change_as_text, held_out, score, warning
from qwen_vl_kit.sentences import first_line


def save(step, outputs, predictions, metrics):
    step(outputs, predictions, metrics)
    make(outputs)


def make(outputs):
    """Writes the page, the scores and the model card of the run in the folder `outputs`; prints a summary.

    In a notebook the page is shown as well.
    """
    outputs = Path(outputs)
    metrics, predictions, run = of_run(outputs)
    page = page_of_run(outputs, metrics, predictions, run)
    files = {
        "predictions.jsonl": "".join(json.dumps(prediction) + "\n" for prediction in predictions),
        "metrics.json": json.dumps(metrics, indent=2) + "\n",
        "report.html": page,
        "adapter/README.md": make_card(outputs, metrics, len(predictions), run),
    }
    for name, text in files.items():
        write(outputs / name, text)
    print_summary(TRAINED, [metrics[name] for name in (*TRAINED, "difference")], len(predictions))
    print(f"Report: {outputs / 'report.html'}")
    show_in_notebook(page, outputs / "report.html")


def of_run(outputs):
    """The content of metrics.json with all scores, of predictions.jsonl, and what was run, as a table."""
    metrics, predictions = metrics_of(outputs), predictions_of(outputs)
    settings = metrics["settings"]
    before, after, difference = score(predictions, settings["seed"], settings.get("max_new_tokens", 128))
    metrics |= {"before": before, "after": after, "difference": difference}
    return metrics, predictions, facts(outputs, metrics, predictions)


def write(file, text):
    """Writes a file whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def facts(outputs, metrics, predictions):
    """What was run, as names and values for a table. What only the kit measures may be missing."""
    settings, train = metrics["settings"], metrics["train"]
    samples = f"{train['samples']:,} samples in " if "samples" in train else ""
    # Without the kit, the images are what a later report leaves as it is.
    ended = f"{datetime.fromtimestamp((outputs / predictions[0]['image']).stat().st_mtime):%Y-%m-%d %H:%M}"
    run = {
        "model": shown_name("model_name_or_path", outputs, metrics),
        "data": shown_name("dataset_name", outputs, metrics),
        "held out": f"{len(predictions)} rows of {metrics['test_split']}",
        "trained on": f"{samples}{train['log'][-1]['step']:,} steps",
        "learning rate": f"{settings['learning_rate']:g}, {settings['lr_scheduler_type']}",
        "adapters": f"r {settings['lora_r']}, alpha {settings['lora_alpha']}, dropout {settings['lora_dropout']}",
        "seed": settings["seed"],
    }
    if "best_step" in train:
        run["best step"] = f"{train['best_step']:,}, by validation loss: the adapter is that step's"
    if resumed := metrics.get("run", {}).get("resumed"):
        run["resumed"] = "; ".join(f"after step {part['step']:,}{changes(part['changed'])}" for part in resumed)
    if "train_runtime" in train:
        run["time"] = f"{train['train_runtime']:.0f} s, {train['train_samples_per_second']:.1f} samples/s"
    if "peak_memory_gb" in train:
        run["peak GPU memory"] = f"{train['peak_memory_gb']:.1f} GB"
    if "hardware" in metrics:
        run["hardware"] = metrics["hardware"] + (f", {n} processes" if (n := metrics.get("processes", 1)) > 1 else "")
    if "versions" in metrics:
        run["versions"] = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    return run | {"date": metrics.get("run", {}).get("ended", ended)}


def changes(changed):
    """What was changed when a run was resumed, in words; of paths only that they were."""
    words = [name if "/" in f"{then}{now}" else f"{name} {then}, then {now}" for name, (then, now) in changed.items()]
    return f" ({', '.join(words)})" if words else ""


def page_of_run(outputs, metrics, predictions, run):
    """The page, as text. It stays on this machine, unlike the card: names as they were typed, but for the folders of
    absolute ones."""
    matches = {when: as_text("formula_match", metrics[when]["formula_match"]) for when in TRAINED}
    images = f"{len(predictions)} image{'s' * (len(predictions) != 1)}"
    never = " that it never trained on" * ("run" in metrics)  # who resumes the script alone is not asked
    sentence = f"On {images}{never}, {matches['after']} of its readings match the formula; "
    sentence += f"before, {matches['before']} did."
    if seen := metrics.get("rows_of_seen_formulas"):
        sentence += f" {seen} of the images show formulas that also appear in training images."
    model, data = (Path(metrics["settings"][name]) for name in ("model_name_or_path", "dataset_name"))
    names = {"model": model.name if model.is_absolute() else model, "data": data.name if data.is_absolute() else data}
    return make_page(
        outputs,
        predictions,
        TRAINED,
        [metrics[name] for name in (*TRAINED, "difference")],
        run | names,
        title=names["model"],
        trained_on=names["data"],
        sentence=sentence,
        settings=metrics["settings"],
        curve=curve(metrics["train"]["log"]),
    )


def curve(log):
    """The training log as a drawing of 480 x 200: losses, validation losses and learning rates, and their ticks."""
    losses, validation, rates = (
        [(entry["step"], entry[name]) for entry in log if name in entry]
        for name in ("loss", "eval_loss", "learning_rate")
    )
    last = max([entry["step"] for entry in log if "step" in entry], default=1)
    most = max([loss for _, loss in losses + validation if np.isfinite(loss)], default=1) or 1
    fastest = max([rate for _, rate in rates], default=1) or 1

    def points(values, top):
        return [(round(480 * x / last, 1), round(200 - 200 * y / top, 1)) for x, y in values if np.isfinite(y)]

    return {
        "losses": points(losses, most),
        "validation": points(validation, most),
        "rates": points(rates, fastest),
        "loss_ticks": ticks(most),
        "rate_ticks": ticks(fastest),
        "last": last,
    }


def ticks(top):
    """At most six round numbers from 0 to `top`, each with its height in a drawing of 200."""
    unit = 10 ** np.floor(np.log10(top / 2))
    step = next(unit * factor for factor in (1, 2, 5, 10) if top / (unit * factor) <= 5)
    return [(200 - 200 * i * step / top, f"{i * step:.3g}") for i in range(int(top / step) + 1)]


# ---------------------------------------------------------------------------------------------------------------------
# The terminal, the notebook
# ---------------------------------------------------------------------------------------------------------------------


def print_summary(names, scores, rows):
    """Prints the scores of so many rows: one set of readings, or two and their differences, as for `make_page`."""
    *scores, spread = scores
    width = max(9, *(len(name) + 2 for name in names.values()))
    interval = "95% confidence interval"
    if len(names) == 2:
        interval = f"{'change' if names == TRAINED else 'difference'} ({interval})"
    print(f"\n{held_out(rows):<20}" + "".join(f"{name:>{width}}" for name in names.values()) + f"   {interval}")
    for name, (label, *_) in SCORES.items():
        values = "".join(f"{as_text(name, part[name]):>{width}}" for part in scores)
        print(f"{label:<20}{values}   {(change_as_text if len(names) == 2 else between)(name, spread[name])}")
    if rows_are_few := warning(rows):
        print(rows_are_few)


def show_in_notebook(page, file):
    """Shows the page in its cell's output, if this runs in a notebook."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from IPython.display import display

        frame = f'<iframe srcdoc="{html.escape(page)}" style="width: 100%; height: 48rem; border: 0"></iframe>'
        # Not as HTML(frame): that warns of frames, and what it advises, IFrame, would need the file to be served.
        display({"text/html": frame, "text/plain": str(file)}, raw=True)


def main(arguments, prog):
    parser = argparse.ArgumentParser(prog=prog, description="Makes the page, the scores and the model card of a run.")
    parser.add_argument("outputs", metavar="FOLDER", type=Path, help="the --output_dir of a run")
    outputs = parser.parse_args(arguments).outputs
    try:
        make(outputs)
    except OSError as error:  # an image that is gone, a full disk
        sys.exit(f"Could not make the report of {outputs}: {first_line(error)}.")
