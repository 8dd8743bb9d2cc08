"""What a run is made of: written down when it begins and in each checkpoint, compared when it resumes.

Wraps `load_processor` (the base model) and `order_rows` (the data, and the rows trained on so far): a run that resumes
with something else, which would make its result untrue, ends in a sentence before the model is loaded. What may change
is named, on the terminal, in metrics.json and in the report.
"""

import hashlib
import json
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from shlex import quote
from uuid import uuid4

import torch
from huggingface_hub import try_to_load_from_cache

from qwen_vl_kit import checkpoints, run
from qwen_vl_kit.results import machine
from qwen_vl_kit.sentences import fail

# What a resumed run must share with the run it resumes: with another seed or other rows, rows that were trained on
# would be held out; other adapters or another optimizer can't take up the state; the rest is what the model learns.
FIXED = (
    "seed", "batch_size", "num_test_rows", "num_validation_rows", "instruction", "min_pixels", "max_pixels",
    "normalize_latex", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "optim",
)  # fmt: skip
# Schedules with a learning rate of their own, which a checkpoint restores.
STATEFUL, RATES = {"reduce_lr_on_plateau", "greedy"}, ("lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate")
# Where a run is and how it was started is no part of it; model and data are compared by what they are.
LEFT_OUT = ("output_dir", "resume_from_checkpoint", "run_name", "model_name_or_path", "dataset_name")


def settings(options, extra):
    """All options of a run, as JSON has them, but for those of LEFT_OUT."""
    given = options.to_sanitized_dict() | {field.name: getattr(extra, field.name) for field in fields(extra)}
    named = {field.name for field in (*fields(options), *fields(extra))} - {*LEFT_OUT}
    return {name: value for name, value in given.items() if name in named}


def begin(options, extra, checkpoint, error):
    """Starts the record of this run, or takes up that of `checkpoint`; calls `error` with a sentence if it can't."""
    asked, here = settings(options, extra), machine()
    here = {"processes": options.world_size, "hardware": here["hardware"], **here["versions"]}
    run.resumed = old = checkpoints.record_of(checkpoint) if checkpoint else None
    if not old:
        run.record = {"id": uuid4().hex, "settings": asked, "machine": here, "seconds": 0}
        run.record |= {"resumed": [], "earlier": []}  # where it was resumed, and the ids it had by then
        return
    if asked["num_validation_rows"] and not old["settings"].get("num_validation_rows"):
        error(
            f"{checkpoint} was made without validation rows: leave out --eval_strategy, --num_validation_rows and "
            "--early_stopping_patience, or start a new run in another --output_dir"
        )
    new = {field.name: field.default for field in fields(extra)}  # what an option was before the kit had it
    for name in FIXED:
        then = old["settings"].get(name, new.get(name))
        if asked[name] != then:
            then, now = quote(str(then)), quote(str(asked[name]))
            error(
                f"{checkpoint} was made with --{name} {then}, not {now}: resume it with --{name} {then}, or start a "
                "new run in another --output_dir"
            )
    schedules = {old["settings"]["lr_scheduler_type"], asked["lr_scheduler_type"]}
    if schedules & STATEFUL and any(asked[name] != old["settings"][name] for name in RATES):
        error(
            f"{checkpoint} can't be resumed with another --learning_rate or schedule, as {min(schedules & STATEFUL)} "
            "keeps its own: resume it with the same, or start a new run in another --output_dir"
        )
    # Settings that are new in this version of the kit did not change.
    changed = {name: [old["settings"][name], new] for name, new in asked.items() if name in old["settings"]}
    changed = {name: values for name, values in changed.items() if values[0] != values[1]}
    changed |= {name: [then, here.get(name)] for name, then in old["machine"].items() if then != here.get(name)}
    resumed = [*old["resumed"], {"step": old["step"], "date": f"{datetime.now():%Y-%m-%d %H:%M}", "changed": changed}]
    earlier = [*old["earlier"], [old["id"], old["step"]]]
    run.record = {**old, "id": uuid4().hex, "earlier": earlier, "settings": asked, "machine": here, "resumed": resumed}


def announce(checkpoint):
    """Says what is resumed, and with what changed."""
    changed = run.record["resumed"][-1]["changed"].items()
    said = "; ".join(f"{name} changed from {then} to {now}" for name, (then, now) in changed)
    print(f"Resuming from {checkpoint}" + f" ({said})" * bool(said))


def must_equal(did, then, now, checkpoint):
    """Ends the run if something is not as it was. Both are words for people, with a fingerprint in brackets behind."""
    if then.rpartition(" ")[2] != now.rpartition(" ")[2]:
        fail(
            f"{checkpoint} {did} {then}, not {now}: resume it with the same, or start a new run in another "
            "--output_dir."
        )


def load_processor(step, options):
    processor = step(options)
    base = f"{options.model_name_or_path} ({fingerprint_of_model(options.model_name_or_path)})"
    if run.resumed:
        must_equal("was trained from", run.resumed["base"], base, options.resume_from_checkpoint)
    run.record["base"] = base
    return processor


def fingerprint_of_model(name):
    """Of a hub name its commit. Of a folder a digest of its small files, and of 64 places in each large one.

    Reading all of 6 GB would take as long as loading them; another training changes all layers.
    """
    folder = Path(name)
    if not folder.is_dir():
        file = try_to_load_from_cache(name, "config.json")
        return Path(file).parent.name[:12] if isinstance(file, str) else "unknown"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".safetensors", ".txt"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as opened:
                for place in range(0, size, max(size // 64, 1 << 16)):
                    opened.seek(place)
                    digest.update(opened.read(1 << 16))
    return digest.hexdigest()[:12]


def fingerprint_of_texts(rows, column):
    """A digest of all texts of a split, in their order."""
    digest, texts = hashlib.sha256(), rows.select_columns(column).with_format("arrow")  # as they are in the data set
    for start in range(0, len(texts), 10_000):
        some = texts[start : start + 10_000][column].to_pylist()
        digest.update(json.dumps(some, default=str).encode())
    return digest.hexdigest()[:12]


def order_rows(step, lengths, options):
    order = step(lengths, options)
    train, test = (
        f"{len(rows):,} rows of {options.dataset_name} {split} ({fingerprint_of_texts(rows, options.text_column)})"
        for rows, split in (
            (run.train_rows, options.dataset_train_split),
            (run.test_rows, str(run.test_rows.split)),
        )
    )
    held_out, validation = (
        [[number, digest.hex()[:12]] for (part, number), digest in run.digests.items() if part == kind]
        for kind in ("held-out", "validation")
    )
    now = {"train": train, "test": test, "held_out": held_out, "validation": validation}
    if old := run.resumed:
        checkpoint, step_taken = options.resume_from_checkpoint, old["step"]
        checkpoints.check_steps(options, run.extra)
        must_equal("was trained on", old["train"], train, checkpoint)
        must_equal("held out some of", old["test"], test, checkpoint)
        if old["held_out"] != held_out:
            fail(
                f"{checkpoint} held out other images than this run would ({describe(old['held_out'])}, now "
                f"{describe(held_out)}): bring back the data as it was, or start a new run in another --output_dir."
            )
        if old["validation"] != validation:
            fail(
                f"{checkpoint} was validated on other images than this run would be ({describe(old['validation'])}, "
                f"now {describe(validation)}): bring back the data, or start a new run in another --output_dir."
            )
        if old["seen"] != seen(step_taken):
            fail(
                f"The {step_taken * options.batch_size:,} samples that {checkpoint} was trained on can't be found in "
                f"{options.dataset_name} again (digest {old['seen']}, now {seen(step_taken)}): bring back the data and "
                "the limits of its rows as they were, or start a new run in another --output_dir."
            )
    run.record |= now
    if options.process_index == 0:
        checkpoints.write_whole(Path(options.output_dir, checkpoints.RECORD), run.record)
        lines = "".join(json.dumps(row) + "\n" for row in run.skipped)
        Path(options.output_dir, "skipped.jsonl").write_text(lines, encoding="utf-8")
    return order


def describe(held_out):
    numbers = [str(number) for number, _ in held_out[:3]]
    digest = hashlib.sha256(json.dumps(held_out).encode()).hexdigest()[:12]
    return f"{len(held_out)} rows, {', '.join(numbers)}, ..., digest {digest}"


def seen(steps):
    """A digest of the samples of the first `steps` steps, in their order."""
    digest = hashlib.sha256()
    for number in run.order[: steps * run.options.batch_size]:
        digest.update(run.digests["training", number])
    return digest.hexdigest()[:12]


def at_step(trainer, seconds):
    """The record of this run as it belongs into a checkpoint that `trainer` makes now, after `seconds` of training."""
    step = trainer.state.global_step
    now = {"step": step, "seen": seen(step), "seconds": seconds}
    if torch.cuda.is_available():
        now["peak_memory_gb"] = max(torch.cuda.max_memory_reserved() / 1e9, run.record.get("peak_memory_gb", 0))
    return run.record | now | trainer.unlogged()
