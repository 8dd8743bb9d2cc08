"""Shows what a run has learned: a page, more scores, a model card.

    python -m qwen_vl_kit report outputs

Wraps `save`: when that has written `metrics.json`, `predictions.jsonl` and `held_out/`, this makes of them

- `report.html`, one page to open from disk, without a network and without scripts;
- more scores in `metrics.json` and `predictions.jsonl`: BLEU, formula match, is it LaTeX, and how sure each change is;
- the adapter's model card, `adapter/README.md`, with the scores in the hub's own form.
"""

import argparse
import base64
import html
import io
import json
import re
import sys
from datetime import datetime
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment
from latex2mathml.converter import convert_to_element
from PIL import Image
from rapidfuzz.distance import Levenshtein

from qwen_vl_kit.finished import local_names, metrics_of, predictions_of, shown_name
from qwen_vl_kit.scores import SCORES, as_text, change_as_text, held_out, mathml, score, verdict, warning
from qwen_vl_kit.sentences import first_line

# What became of a row, by whether the formula was right before and whether it is after.
KINDS = {
    (False, True): "fixed",
    (False, False): "still wrong",
    (True, False): "broken by training",
    (True, True): "kept right",
}
SHOWN = 240  # rows on the page: with more, it takes a browser seconds to open


def save(step, outputs, predictions, metrics):
    step(outputs, predictions, metrics)
    make(outputs)


def make(outputs):
    """Writes the page, the scores and the model card of the run in the folder `outputs`; prints a summary.

    In a notebook the page is shown as well.
    """
    outputs = Path(outputs)
    metrics, predictions, shown = of_run(outputs)
    page = make_page(outputs, metrics, predictions, shown)
    files = {
        "predictions.jsonl": "".join(json.dumps(prediction) + "\n" for prediction in predictions),
        "metrics.json": json.dumps(metrics, indent=2) + "\n",
        "report.html": page,
        "adapter/README.md": make_card(metrics, shown),
    }
    for name, text in files.items():
        write(outputs / name, text)
    print_summary(metrics, len(predictions))
    print(f"Report: {outputs / 'report.html'}")
    show_in_notebook(page, outputs / "report.html")


def of_run(outputs):
    """The content of metrics.json with all scores, of predictions.jsonl, and what page and card show of them."""
    metrics, predictions = metrics_of(outputs), predictions_of(outputs)
    settings = metrics["settings"]
    before, after, difference = score(predictions, settings["seed"], settings.get("max_new_tokens", 128))
    metrics |= {"before": before, "after": after, "difference": difference}
    run = facts(outputs, metrics, predictions)
    local = local_names(outputs, metrics)
    return metrics, predictions, what_both_show(metrics, run, len(predictions)) | {"local": local}


def write(file, text):
    """Writes a file whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def template(name):
    """The text of a file in `templates/`, also where the package is in an archive."""
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


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


def what_both_show(metrics, run, rows):
    """What the page's template and the card's are filled with."""
    scores = {name: metrics[name] for name in ("before", "after", "difference")}
    helpers = {"as_text": as_text, "change_as_text": change_as_text, "verdict": verdict}
    of_rows = {"rows": rows, "held_out": held_out(rows), "warning": warning(rows)}
    return of_rows | {"scores": SCORES, "run": run, "model": run["model"], "data": run["data"]} | scores | helpers


def make_page(outputs, metrics, predictions, shown):
    items = gallery(outputs, predictions)
    before, after = (as_text("formula_match", metrics[when]["formula_match"]) for when in ("before", "after"))
    images = f"{len(predictions)} image{'s' * (len(predictions) != 1)}"
    never = " that it never trained on" * ("run" in metrics)  # who resumes the script alone is not asked
    sentence = f"On {images}{never}, {after} of its readings match the formula; before, {before} did."
    if seen := metrics.get("rows_of_seen_formulas"):
        sentence += f" {seen} of the images show formulas that also appear in training images."
    # The page stays on this machine, unlike the card: names as they were typed, but for the folders of absolute ones.
    model, data = (Path(metrics["settings"][name]) for name in ("model_name_or_path", "dataset_name"))
    names = {"model": model.name if model.is_absolute() else model, "data": data.name if data.is_absolute() else data}
    return (
        Environment(autoescape=True)
        .from_string(template("report.html.j2"))
        .render(
            **shown | names | {"run": shown["run"] | names},
            sentence=sentence,
            settings=metrics["settings"],
            gallery=items,
            kinds={kind: sum(item["kind"] == kind for item in items) for kind in KINDS.values()},
            curve=curve(metrics["train"]["log"]),
        )
    )


def gallery(outputs, predictions):
    """What the page shows of each row: the worst, the median and the best ones if there are more than `SHOWN`."""
    ranking = sorted(predictions, key=lambda prediction: (-prediction["after"]["cer"], prediction["row"]))
    middle = len(ranking) // 2
    if len(ranking) > SHOWN:
        third = SHOWN // 3
        ranking = ranking[:third] + ranking[middle - third // 2 :][:third] + ranking[-third:]
        middle = third + third // 2
    places = {0: "worst", middle: "median", len(ranking) - 1: "best"}
    return [
        {
            "row": prediction["row"],
            "kind": KINDS[prediction["before"]["formula_match"], prediction["after"]["formula_match"]],
            "place": places.get(rank, ""),
            "order": (rank, abs(rank - middle), len(ranking) - rank),
            "image": picture(outputs / prediction["image"]),
            "readings": readings(prediction),
        }
        for rank, prediction in enumerate(ranking)
    ]


def readings(prediction):
    """The truth and both readings: their names, drawings, marked texts and scores."""
    truth = prediction["truth"]
    shown = [("truth", drawing(truth), [[truth, False]], None)]
    for when in ("before", "after"):
        text = prediction[when]["text"]
        shown.append((when, drawing(text), marked(text, truth), prediction[when]))
    return shown


def picture(file):
    """The image in `file` as a data URI, no larger than a page needs."""
    with Image.open(file) as image:
        image.thumbnail((1200, 600))
        png = io.BytesIO()
        image.save(png, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


TAGS = re.compile(
    "math|menclose|mfrac|mi|mmultiscripts|mn|mo|mover|mpadded|mphantom|mprescripts|mroot|mrow|mspace|msqrt|mstyle|msub|"
    "msubsup|msup|mtable|mtd|mtext|mtr|munder|munderover|none"
)
ATTRIBUTES = re.compile(
    "accent|accentunder|columnalign|columnlines|columnspacing|depth|display|displaystyle|fence|form|frame|height|"
    "largeop|linethickness|lspace|mathcolor|mathvariant|maxsize|minsize|movablelimits|notation|rowlines|rowspacing|"
    "rspace|scriptlevel|separator|stretchy|symmetric|voffset|width|xmlns"
)


def drawing(latex):
    """The formula as MathML for a page, or None. Readings are data: nothing in them becomes markup, style or a link."""
    if mathml(latex) is None:
        return None
    formula = convert_to_element(latex)
    for node in formula.iter():
        node.tag = node.tag if TAGS.fullmatch(node.tag) else "mrow"
        node.text = html.unescape(node.text or "")  # the converter writes entities; tostring escapes what must be
        for name, value in [*node.attrib.items()]:
            if not (ATTRIBUTES.fullmatch(name) and re.fullmatch(r"[\w#%.:/+ -]{0,40}", value)):
                del node.attrib[name]
    formula.set("displaystyle", "true")
    return ElementTree.tostring(formula, encoding="unicode")


def marked(text, other):
    """`text` in pieces, [piece, whether it differs from `other`], spaces aside."""
    letters = [place for place, letter in enumerate(text) if not letter.isspace()]
    differs = dict.fromkeys(letters, False)
    for step in Levenshtein.opcodes("".join(text.split()), "".join(other.split())):
        if step.tag != "equal":
            differs |= dict.fromkeys(letters[step.src_start : step.src_end], True)
    pieces = []
    for place, letter in enumerate(text):
        mark = differs.get(place, bool(pieces) and pieces[-1][1] and differs.get(place + 1, False))
        if pieces and pieces[-1][1] == mark:
            pieces[-1][0] += letter
        else:
            pieces.append([letter, mark])
    return pieces


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
# The model card, the terminal, the notebook
# ---------------------------------------------------------------------------------------------------------------------


def make_card(metrics, shown):
    """The model card. The base model and the data are only linked where they have a name on the hub."""
    settings, run = metrics["settings"], shown["run"]
    hub = {"base_model": "model_name_or_path", "datasets": "dataset_name"}
    result = {"task_type": "image-to-text", "dataset_type": run["data"], "dataset_name": run["data"]}
    result["dataset_split"] = metrics["test_split"]
    data = ModelCardData(
        model_name=f"{run['model']} for LaTeX OCR",
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["lora", "latex-ocr", "trl", "sft"],
        eval_results=[EvalResult(**result, metric_type=name, metric_value=metrics["after"][name]) for name in SCORES],
        **{key: settings[setting] for key, setting in hub.items() if setting not in shown["local"]},
    )
    filled = {"name": data.model_name, "instruction": settings["instruction"]} | shown
    filled |= {"layers": metrics.get("adapted_layers"), "guarded": "run" in metrics}
    return str(ModelCard.from_template(data, template_str=template("card.md.j2"), **filled))


def print_summary(metrics, rows):
    print(f"\n{held_out(rows):<20}{'before':>9}{'after':>9}   change (95% confidence interval)")
    for name, (label, *_) in SCORES.items():
        before, after = (as_text(name, metrics[when][name]) for when in ("before", "after"))
        print(f"{label:<20}{before:>9}{after:>9}   {change_as_text(name, metrics['difference'][name])}")
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
