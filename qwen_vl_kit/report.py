"""Shows what a run has learned: a page, more scores, a model card.

    python -m qwen_vl_kit report outputs
    python -m qwen_vl_kit report outputs/one outputs/other

Wraps `save`: when that has written `metrics.json`, `predictions.jsonl` and `held_out/`, this makes of them

- `report.html`, one page to open from disk, without a network and without scripts;
- more scores in `metrics.json` and `predictions.jsonl`: BLEU, formula match, ..., and how sure each change is;
- the adapter's model card, `adapter/README.md`, with the scores in the hub's own form.

Of two runs the command makes one page that compares them (see `compare`).
"""

import html
import json
import sys
from pathlib import Path

from qwen_vl_kit import compare
from qwen_vl_kit.arguments import Parser
from qwen_vl_kit.card import make_card
from qwen_vl_kit.curves import curves
from qwen_vl_kit.finished import metrics_of, predictions_of
from qwen_vl_kit.recipe import changed_settings, facts, left_out, typed_names
from qwen_vl_kit.report_page import TRAINED, between, make_page
from qwen_vl_kit.scores import SCORES, as_text, change_as_text, held_out, remarks, score, warning
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
    print(*remarks(predictions, trained=True), sep="\n")
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


def page_of_run(outputs, metrics, predictions, run):
    """The page, as text. It stays on this machine, unlike the card: names as they were typed."""
    matches = {when: as_text("formula_match", metrics[when]["formula_match"]) for when in TRAINED}
    images = f"{len(predictions)} image{'s' * (len(predictions) != 1)}"
    never = " that it never trained on" * ("run" in metrics)  # who resumes the script alone is not asked
    sentence = f"On {images}{never}, {matches['after']} of its readings match the formula; "
    sentence += f"before, {matches['before']} did."
    if seen := metrics.get("rows_of_seen_formulas"):
        sentence += f" {seen} of the images show formulas that also appear in training images."
    names = typed_names(metrics)
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
        curve=curves({"": metrics["train"]["log"]}),
        changed=changed_settings(metrics),
        command=metrics.get("command"),
        left_out=left_out(outputs),
    )


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

        # Without a base of its own, a link to a row would put the notebook into the frame.
        page = page.replace("<head>", '<head><base href="about:srcdoc">', 1)
        frame = f'<iframe srcdoc="{html.escape(page)}" style="width: 100%; height: 48rem; border: 0"></iframe>'
        # Not as HTML(frame): that warns of frames, and what it advises, IFrame, would need the file to be served.
        display({"text/html": frame, "text/plain": str(file)}, raw=True)


def make_comparison(one, other):
    """Writes the page that compares two runs, given as folders; prints a summary."""
    page, names, scores, rows = compare.compare(one, other)
    file = compare.file_of(one, other)
    write(file, page)
    print_summary(names, scores, rows)
    print(f"Comparison: {file}")
    show_in_notebook(page, file)


def main(arguments, prog):
    parser = Parser(prog, "Makes the page, the scores and the model card of a run, or a page that compares two runs.")
    parser.add_argument("outputs", metavar="FOLDER", type=Path, help="the --output_dir of a run")
    against = "that of another run: both on the rows that both held out"
    parser.add_argument("other", metavar="OTHER", type=Path, nargs="?", help=against)
    wanted = parser.parse_args(arguments)
    try:
        make_comparison(wanted.outputs, wanted.other) if wanted.other else make(wanted.outputs)
    except OSError as error:  # an image that is gone, a full disk
        both = f" and {wanted.other}" if wanted.other else ""
        sys.exit(f"Could not make the report of {wanted.outputs}{both}: {first_line(error)}.")
