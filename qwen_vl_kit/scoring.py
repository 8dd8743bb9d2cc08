"""Chooses rows and has models read them, for the command `score`.

It wraps no step. Rows are chosen as a run chooses its held-out ones, by the same function and seed.
"""

import json
import os
import shutil
import sys
import time
from argparse import Namespace
from datetime import datetime
from math import inf
from pathlib import Path

from datasets import Image
from tqdm.auto import tqdm

from qwen_vl_kit import hub, loading, reader, report, report_page, rows, run, scores
from qwen_vl_kit.finished import RECORD, local_names, metrics_of, parsed, text_of
from qwen_vl_kit.memory import free_memory
from qwen_vl_kit.record import fingerprint_of_texts
from qwen_vl_kit.results import machine
from qwen_vl_kit.score import SPLITS
from qwen_vl_kit.sentences import told

# What is asked of a data set, where neither the command line nor the model's run says it.
USUAL = {"image_column": "image", "text_column": "text", "num_test_rows": 64, "seed": 3407}
USUAL |= {"dataset_config": None, "max_new_tokens": 128}
INTERVALS = {1: "interval", 2: "difference"}  # what scores.json calls what comes beside so many sets of scores


def score(wanted):
    """Does what the command is asked for; `wanted` are its arguments."""
    source, other = loading.find(wanted.model, wanted.against == "base"), None
    if wanted.against:
        other = base_beside(source, wanted.against) or loading.find(wanted.against)
    if other and other.model == source.model and other.name == source.name:
        sys.exit(f"--against {wanted.against} is the same model: name another.")
    options = fill_in(wanted, source)
    wanted.max_new_tokens = options.max_new_tokens
    found = rows_of(options)  # what is wrong with them is said before the model is loaded
    reads = reader.load(wanted, source)
    chosen = choose(found, options, reads)
    about = {"data": f"{options.dataset_name}, {len(chosen):,} rows of {found.split}", "seed": options.seed}
    truths = [text.strip() for text in found.select(chosen)[options.text_column]]
    predictions = [
        {"row": row, "image": f"held_out/{row}.png", "truth": truth} for row, truth in zip(chosen, truths, strict=True)
    ]
    names = {"after": source.name}
    if other and not other.how:  # of what does not say what it was trained with, the same is asked
        wanted.instruction = reads.instruction

    def read(when, reads):
        began = time.perf_counter()
        for prediction, reading in zip(predictions, read_all(reads, found, truths, chosen, options), strict=True):
            prediction[when] = reading
        about[names[when]] = f"{len(chosen) / (time.perf_counter() - began):.1f} images/s, asked: {reads.instruction}"
        if warning := remembered(reads.source, options, found, chosen):
            print(warning)
            about[f"{names[when]}, note"] = warning

    read("after", reads)
    if other:
        names = {"before": other.name} | names
        if other.model == source.model:  # the base is there already
            with reads.model.disable_adapter():
                reads.source = other
                read("before", reads)
        else:
            del reads
            free_memory()
            read("before", reader.load(wanted, other))
    about |= {"date": f"{datetime.now():%Y-%m-%d %H:%M}", "hardware": machine()["hardware"]}
    about["versions"] = ", ".join(f"{name} {version}" for name, version in machine()["versions"].items())
    save(wanted, options, found, predictions, names, about)


def base_beside(source, against):
    """The base of an adapter as a `Source`, if `against` means that; else None.

    It is read without the adapter: in 4 bits, asked and prepared as in training, as a run's scores "before" are.
    """
    base = loading.base_of(Path(source.model)) if source.is_adapter else None
    if against == "base" and not base:
        sys.exit(f"--against base needs an adapter, which {source.name} is not: name the other model.")
    if base and (against == "base" or Path(base).resolve() == Path(against).resolve()):  # of hub names, too
        short = os.path.relpath(base) if Path(base).is_absolute() and Path(base).is_relative_to(Path.cwd()) else base
        return source._replace(name=short, run=None)
    return None


def fill_in(wanted, source):
    """The options of the data: those of the command line, else those of the model's run, else what is usual.

    Data of one's own has splits, columns and numbers of its own: the run's are not taken for them.
    """
    metrics = metrics_of(source.run) if source.run else {}
    given = {name: getattr(wanted, name) for name in ("dataset_name", "dataset_test_split", *USUAL)}
    usual = USUAL | {"dataset_test_split": None}
    if metrics and wanted.dataset_name in (None, metrics["settings"]["dataset_name"]):
        settings = {name: None if value == "None" else value for name, value in metrics["settings"].items()}
        usual = settings | {"dataset_test_split": metrics["test_split"]}
        if not Path(usual["dataset_name"]).exists():  # it may have been relative to another folder
            usual["dataset_name"] = local_names(source.run, metrics).get("dataset_name", usual["dataset_name"])
    elif not wanted.dataset_name:
        sys.exit(f"{source.name} says nothing of held-out rows: name a data set with --dataset_name.")
    filled = {name: usual[name] if value is None else value for name, value in given.items()}
    respelled = metrics.get("settings", {}).get("normalize_latex", False)  # what it has learned to write
    folder = wanted.image_folder or usual.get("image_folder")
    return Namespace(**filled, normalize_latex=respelled, max_length=None, image_folder=folder)


def rows_of(options):
    """The rows of the split to score on, their images decoded as they are asked for."""
    run.extra = Namespace(
        max_characters=4000, image_folder=options.image_folder, normalize_latex=options.normalize_latex
    )
    splits = hub.load("data set", options.dataset_name, lambda: rows.as_found(options))
    split = options.dataset_test_split or next((name for name in SPLITS if name in splits), "test")
    rows.check_columns(splits, split, "--dataset_test_split", options)
    return rows.with_spelling(rows.with_pictures(splits, options), options, options.normalize_latex)[split]


def choose(found, options, reads):
    """The numbers of the rows to score on."""
    run.processor = reads.processor
    run.test_rows = found.cast_column(options.image_column, Image(decode=False))
    lengths, _, _ = rows.pick(run.test_rows, options.num_test_rows, set(), options, "held-out")
    if not lengths:
        sys.exit(f"{options.dataset_name} has no row in {found.split} that can be used.")
    if len(lengths) < options.num_test_rows < inf:
        print(f"{options.dataset_name} has {len(lengths):,} usable rows in {found.split}.")
    return [*lengths]


def remembered(source, options, found, chosen):
    """A sentence if this model may have been trained on some of the chosen rows, or None.

    A run's record has the digest of all texts that it could train on, and the rows that it held out of them.
    """
    file = source.run and source.run / RECORD
    if not (file and file.is_file()):
        return None
    record = parsed(file, text_of(source.run, file))
    if fingerprint_of_texts(found, options.text_column) not in record.get("train", ""):
        return None
    held_out = {tuple(pair) for pair in record["held_out"] + record["validation"]}
    trained = sum((number, run.digests["held-out", number].hex()[:12]) not in held_out for number in chosen)
    return f"{source.name} may have been trained on {trained} of these rows." if trained else None


def read_all(reads, found, truths, chosen, options):
    """The readings of the chosen rows as dicts, as the script has them, and how certain the model was."""
    tokens = reads.processor.tokenizer(truths, add_special_tokens=False).input_ids
    limit = max(reads.limit, 1 + max(map(len, tokens)))  # no right answer is cut
    readings, some = [], 4 * reads.batch_size
    with tqdm(total=len(chosen), desc=f"Reading with {reads.source.name}", disable=None) as bar:
        for start in range(0, len(chosen), some):
            pictures, batches = found.select(chosen[start : start + some])[options.image_column], {}
            for batch in reads.batches(pictures, limit):
                batches |= batch
                bar.update(len(batch))
            readings += [batches[place]._asdict() for place in range(len(pictures))]
    for truth, reading in zip(truths, readings, strict=True):
        scores.compare(truth, reading)
    return readings


def save(wanted, options, found, predictions, names, about):
    """Writes the page, the readings, the numbers and the images, whole or not at all; prints the scores.

    `names` are those of the models, {"after": str} or {"before": str, "after": str}.
    """
    judge = scores.score if "before" in names else scores.score_one
    judged = judge(predictions, options.seed, wanted.max_new_tokens)
    folder, part = wanted.output_dir, wanted.output_dir.with_name(f"{wanted.output_dir.name}.part")
    with told(f"Could not write to {folder}", OSError):
        shutil.rmtree(part, ignore_errors=True)
        (part / "held_out").mkdir(parents=True)
        for prediction in predictions:
            found[prediction["row"]][options.image_column].save(part / prediction["image"])
        lines = "".join(json.dumps(prediction) + "\n" for prediction in predictions)
        (part / "predictions.jsonl").write_text(lines, encoding="utf-8")
        *sets, spread = judged
        numbers = {"models": names, **dict(zip(names, sets, strict=True)), INTERVALS[len(sets)]: spread, "about": about}
        (part / "scores.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        page = report_page.make_page(part, predictions, names, judged, about)
        (part / "report.html").write_text(page, encoding="utf-8")
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    report.print_summary(names, judged, len(predictions))
    print(*scores.remarks(predictions), sep="\n")
    print(f"Report: {folder / 'report.html'}")
