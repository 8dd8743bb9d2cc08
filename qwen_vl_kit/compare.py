"""Compares two runs on the held-out rows that they share: a page with both, and the paired interval of the difference.

    python -m qwen_vl_kit report outputs/one outputs/other

It wraps no step, and leaves both runs as they are.
"""

import hashlib
import sys
from collections import Counter

from PIL import Image

from qwen_vl_kit.curves import curves
from qwen_vl_kit.finished import last_part, metrics_of, predictions_of
from qwen_vl_kit.recipe import APART, facts, in_words, typed_names
from qwen_vl_kit.report_page import make_page
from qwen_vl_kit.scores import as_text, score

# Settings that say where a run was, or what its machine made of it.
OF_NO_MATTER = APART | {"logging_dir", "train_batch_size", "eval_batch_size", "local_rank"}


def compare(one, other):
    """The page as text, names and scores as `report.print_summary` wants them, and how many rows were compared."""
    if one.resolve() == other.resolve():
        sys.exit(f"{one} and {other} are the same run: name two.")
    names = {"before": str(one), "after": str(other)}
    runs = [metrics_of(folder) for folder in (one, other)]
    found = [predictions_of(folder) for folder in (one, other)]
    keyed = [rows_by_content(folder, rows) for folder, rows in zip((one, other), found, strict=True)]
    shared = [key for key in keyed[0] if key in keyed[1]]
    if not shared:
        sys.exit(
            f"{one} and {other} held out no row in common, so their scores can't be compared. Score both models on the "
            f"same rows: python -m qwen_vl_kit score {one} --against {other}"
        )
    predictions = [
        keyed[0][key] | {"before": keyed[0][key]["after"], "after": keyed[1][key]["after"]} for key in shared
    ]
    limit = max(metrics["settings"].get("max_new_tokens", 128) for metrics in runs)
    scores = score(predictions, runs[0]["settings"]["seed"], limit)
    tables = [
        facts(folder, metrics, rows) | typed_names(metrics)
        for folder, metrics, rows in zip((one, other), runs, found, strict=True)
    ]
    about = {what: [table.get(what, "") for table in tables] for what in tables[0] | tables[1]}
    matches = [as_text("formula_match", part["formula_match"]) for part in scores[:2]]
    images = f"{len(shared)} image{'s' * (len(shared) != 1)}"
    sentence = f"On {images} that both held out, {matches[1]} of the readings by {other} match the formula, and "
    sentence += f"{matches[0]} of those by {one}."
    page = make_page(
        one,
        predictions,
        names,
        scores,
        about,
        sentence=sentence,
        note=others(names, found, shared),
        curve=curves(dict(zip(names.values(), (metrics["train"]["log"] for metrics in runs), strict=True))),
        differences=differences(runs),
    )
    return page, names, scores, len(shared)


def rows_by_content(folder, predictions):
    """{what a row shows and says: prediction}, whatever its number and its data set are called by now."""
    found, copies = {}, Counter()
    for prediction in predictions:
        with Image.open(folder / prediction["image"]) as image:
            pixels = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
            key = (prediction["truth"], image.size, pixels)
        copies[key] += 1
        found[(*key, copies[key])] = prediction
    return found


def others(names, found, shared):
    """A sentence on rows that only one run held out, or None. The other one may have been trained on them."""
    counts = [
        f"{name} held out {len(rows) - len(shared)} others" for name, rows in zip(names.values(), found, strict=True)
    ]
    if all(len(rows) == len(shared) for rows in found):
        return None
    return f"{counts[0]}, {counts[1]}: these are not compared, as the other run may have been trained on them."


def differences(runs):
    """{setting: its value in each run} of those that differ."""
    settings = [metrics["settings"] for metrics in runs]
    found = {}
    for name in settings[0] | settings[1]:
        values = [str(part.get(name, "")) for part in settings]
        if name not in OF_NO_MATTER and values[0] != values[1]:
            found[name] = [*map(in_words, values)]
    return found


def file_of(one, other):
    """Where the page of the comparison goes: beside the report of the second run."""
    return other / f"report_against_{last_part(str(one))}.html"
