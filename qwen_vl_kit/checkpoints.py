"""Checkpoints and results: there as a whole or not at all, and what is damaged is noticed.

Wraps `save`; `training` makes its trainer out of `WholeCheckpoints`, and `options` asks `find` and `check` before a run
starts. A full disk is told in a sentence, and nothing is lost by it or by a kill.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError

from qwen_vl_kit import export, lock
from qwen_vl_kit.finished import RECORD, digest_of
from qwen_vl_kit.sentences import fail, first_line

PART = ".part"  # the folder of what is not whole yet
NO_OPTIMIZER = "it has no optimizer state, as --save_only_model leaves it"


def check(outputs, checkpoint, error):
    """Calls `error` with a sentence if a run can't write to the folder `outputs`, or would overwrite an unfinished one.

    `checkpoint` is what it resumes from, if anything.
    """
    try:
        tempfile.TemporaryFile(dir=outputs).close()
    except OSError as reason:
        error(f"can't write to {outputs} ({reason.strerror}): choose another folder with --output_dir")
    if shutil.disk_usage(outputs).free < 1e8:
        error(f"less than 0.1 GB is free in {outputs}: make room, or choose another disk with --output_dir")
    own = checkpoint and Path(checkpoint).resolve().parent == outputs.resolve()
    if not checkpoint and (old := results_of(outputs)):
        print(f"When this run has finished, it replaces the one of {old['steps']} steps in {outputs}.")
    unfinished = [folder for folder in in_steps(outputs) if not is_finished(outputs, folder)]
    if unfinished and not own:
        usable = any(not damage(folder) for folder in unfinished)
        resume = "Resume it with --resume_from_checkpoint true" if usable else "Delete its checkpoints, all damaged"
        error(
            f"{outputs} holds a run that has not finished. {resume}, or leave it and write to another folder with "
            "--output_dir"
        )
    later = [folder for folder in in_steps(outputs) if own and step_of(folder) > record_of(checkpoint)["step"]]
    if any(not damage(folder) for folder in later):
        error(
            f"{outputs} holds {later[-1].name}, later than {Path(checkpoint).name}: resume from that, or write what "
            "follows the earlier one to another folder with --output_dir"
        )


def in_steps(outputs):
    """The checkpoints in a folder, the earliest first."""
    return sorted(
        (folder for folder in Path(outputs).glob("checkpoint-*") if folder.name[11:].isdecimal()), key=step_of
    )


def step_of(folder):
    """The step of a checkpoint under its own name. If it was renamed, ask its record."""
    return int(folder.name[11:])


def results_of(outputs):
    """What metrics.json says of the finished run in `outputs`: {"id", "steps", "max_steps", ...}, or {}."""
    try:
        run = json.loads((outputs / "metrics.json").read_text(encoding="utf-8"))["run"]
        there = (outputs / "adapter" / "adapter_model.safetensors").is_file()
        return run if there and {"id", "steps", "max_steps"} <= {*run} else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def is_finished(outputs, checkpoint):
    """Whether the results in `outputs` are those of the run that made this checkpoint, after it."""
    try:
        record, run = record_of(checkpoint), results_of(outputs)
    except ValueError:
        return False
    # A run gets another id whenever it resumes, as what follows may differ; the earlier ones hold up to that step.
    left = {**dict(run.get("earlier", [])), run["id"]: run["steps"]} if run else {}
    return left.get(record["id"], -1) >= record["step"]


def check_steps(options, extra):
    """Ends the program if a run that resumes has no step left to take, in a sentence, leaving all as it is.

    What it is to do at its end is done, in case it was interrupted only then.
    """
    checkpoint, outputs = options.resume_from_checkpoint, Path(options.output_dir)
    record = record_of(checkpoint)
    if is_finished(outputs, checkpoint):
        run = results_of(outputs)
        stopped_early = run["steps"] < run["max_steps"]
        if options.max_steps <= run["max_steps"] and not (stopped_early and more_patient(extra, record)):
            more = "more --early_stopping_patience" if stopped_early else "more steps"
            print(f"The run in {outputs} has already finished, after {run['steps']} steps. To continue, ask for {more}")
            if options.process_index == 0 and (wanted := export.prepare(options, extra)):
                export.run(outputs, **wanted)
            sys.exit()
    if record["step"] > options.max_steps:
        fail(
            f"{checkpoint} has taken {record['step']} steps, more than the {options.max_steps} that are asked for: "
            "raise --max_steps or --num_train_epochs."
        )


def more_patient(extra, record):
    return (extra.early_stopping_patience or math.inf) > (record["settings"].get("early_stopping_patience") or math.inf)


# ---------------------------------------------------------------------------------------------------------------------
# What tells a whole checkpoint from a damaged one
# ---------------------------------------------------------------------------------------------------------------------


def seal(checkpoint, record):
    """Writes `record`, what a checkpoint was made of, into it, with the size and digest of each of its files."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != RECORD]
    sizes = {str(file.relative_to(checkpoint)): [file.stat().st_size, digest_of(file)] for file in files}
    record = {**record, "files": sizes}
    record["digest"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    write_whole(checkpoint / RECORD, record)


def write_whole(file, content):
    """Writes JSON to a file, which is there as a whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(file)


def record_of(checkpoint):
    """What `seal` was given. Raises ValueError, with the reason in words, if it isn't there or damaged."""
    file = Path(checkpoint, RECORD)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        digest = record.pop("digest")
        if digest == hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest():
            return record
    except FileNotFoundError:
        raise ValueError(f"{RECORD} is missing, as if qwen_vl_kit had not written it") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass
    raise ValueError(f"{RECORD} is damaged")


def damage(checkpoint, to_resume=True):
    """What is wrong with a checkpoint, in words; an empty string if it is whole.

    Only to resume from it, it needs the state of the optimizer.
    """
    try:
        files = record_of(checkpoint)["files"]
        for name, (size, digest) in files.items():
            file = Path(checkpoint, name)
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
            if digest_of(file) != digest:
                return f"the content of {name} has changed"
        return NO_OPTIMIZER if to_resume and not any(name.startswith("optimizer") for name in files) else ""
    except (ValueError, OSError) as error:
        return first_line(error)


def find(options, error):
    """The whole checkpoint to resume from, or None: the named one, or the last one in a named folder ("true": ours)."""
    named = options.resume_from_checkpoint
    if not named or named.lower() == "false":
        return None
    folder = Path(options.output_dir if named.lower() == "true" else named)
    if not folder.is_dir():
        error(f"there is no checkpoint {named} to resume from: name another, or leave out --resume_from_checkpoint")
    damaged = {}
    for checkpoint in reversed(in_steps(folder) or [folder] * (named.lower() != "true")):
        if (checkpoint / "trainer_state.json").is_file() and not (checkpoint / RECORD).exists():
            error(
                f"can't resume from {checkpoint}: {RECORD} is missing, as if the script alone had written it. Name an "
                "earlier one and another --output_dir, or start a new run there"
            )
        if not (wrong := damage(checkpoint)):
            for one, why in damaged.items():
                print(f"{one} is damaged ({why}): taking the one before it.")
            return str(checkpoint)
        damaged[checkpoint] = wrong
    for one, why in damaged.items():
        error(
            f"can't resume from {folder}, which holds no usable checkpoint ({one.name}: {why}): start a new run in "
            "another --output_dir"
        )
    print(f"There is no checkpoint in {folder} yet: starting from the beginning")
    return None


def how_to_resume(outputs):
    """What is safe, and what to type, in words."""
    last = next((folder for folder in reversed(in_steps(outputs)) if not damage(folder)), None)
    return f"{last} is complete: the same command with --resume_from_checkpoint true resumes from it." if last else ""


def put_back(outputs):
    """Gives what was moved aside for something newer its place again, if that never took it."""
    for old in (outputs / PART).glob("old *"):
        if not (outputs / old.name.removeprefix("old ")).exists():
            old.rename(outputs / old.name.removeprefix("old "))


@contextmanager
def saving(outputs, what):
    """A folder to write `what` to; at the end all that is in it is moved to `outputs`, each part in one rename.

    What was there before goes only then. Ends the run with a sentence where the disk is full or gone.
    """
    if not lock.still_ours():
        fail(f"{outputs} was deleted or replaced while this run was using it: nothing more is written there.")
    part = outputs / PART  # what is being written, or deleted: nobody takes it for something whole
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened)
        for new in sorted(part.iterdir(), key=lambda new: new.name == "metrics.json"):  # that last (see `is_finished`)
            if (outputs / new.name).is_dir():
                (outputs / new.name).rename(part / f"old {new.name}")
            new.replace(outputs / new.name)
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(outputs).free / 1e9
        put_back(outputs)
        shutil.rmtree(part, ignore_errors=True)
        fail(
            f"\nCould not save {what}, with {free:.2f} GB free in {outputs}: {error}. Make room. "
            f"{how_to_resume(outputs)}"
        )
    shutil.rmtree(part)


def discard(checkpoint):
    """Deletes a checkpoint, moved aside first: one that is half deleted is never resumed from."""
    part = Path(checkpoint).with_name(PART)
    shutil.rmtree(part, ignore_errors=True)
    Path(checkpoint).rename(part)
    shutil.rmtree(part)


def make_room(outputs, gigabytes, resumed):
    """Ends the run if `outputs` has no room for checkpoints of this size. Discards those that are of no more use.

    These are the ones of a finished run, and damaged ones that are later than the checkpoint to resume from.
    """
    if shutil.disk_usage(outputs).free < gigabytes * (1 if resumed else 3) * 1e9:
        fail(
            f"Not enough disk space in {outputs} for checkpoints of {gigabytes:.2f} GB: make room, or choose another "
            "folder with --output_dir."
        )
    own = resumed and Path(resumed).resolve().parent == outputs.resolve()
    for folder in in_steps(outputs):
        if not own or step_of(folder) > record_of(resumed)["step"]:
            discard(folder)


def bring_best(outputs, resumed):
    """Copies the best checkpoint so far beside those to come, where a run resumes in another folder."""
    best = json.loads(Path(resumed, "trainer_state.json").read_text(encoding="utf-8")).get("best_global_step")
    source = Path(resumed).resolve().with_name(f"checkpoint-{best}")
    if best and source.parent != outputs.resolve() and source.is_dir() and not damage(source, to_resume=False):
        with saving(outputs, source.name) as part:
            shutil.copytree(source, part / source.name)


class WholeCheckpoints:
    """Has a trainer write each checkpoint aside, and move it to its place when it is whole.

    The trainer's own `describe()` returns the record that goes into it (see `record`).
    `_save_checkpoint` is private (transformers 5.17): callbacks are told of a checkpoint only when it is in its place.
    """

    def create_model_card(self, *_, **__):
        """No card of TRL's beside checkpoints: it would not know the base model. The room `report` makes one."""

    def _save_checkpoint(self, model, trial=None):
        outputs, best = Path(self.args.output_dir), self.state.best_global_step
        name = f"checkpoint-{self.state.global_step}"
        with saving(outputs, name) if self.args.should_save else nullcontext():
            self.accelerator.wait_for_everyone()
            self.args.output_dir = str(outputs / PART)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(outputs)
            if best and (best == self.state.global_step or (outputs / f"checkpoint-{best}").exists()):
                self.state.best_model_checkpoint = str(outputs / f"checkpoint-{best}")
            if best and self.args.should_save:
                self.state.save_to_json(outputs / PART / name / "trainer_state.json")
            self.accelerator.wait_for_everyone()  # all files of all processes are there
            if self.args.should_save:
                seal(outputs / PART / name, self.describe())
        if self.args.should_save and (limit := self.args.save_total_limit):
            others = [folder for folder in in_steps(outputs) if step_of(folder) != best]
            for old in others[: -max(limit - bool(best), 1)]:
                discard(old)
        self.accelerator.wait_for_everyone()


def save(step, outputs, predictions, metrics):
    with saving(outputs, "the results") as part:
        step(part, predictions, metrics)
        name_base(part / "adapter" / "adapter_config.json")


def name_base(file):
    """Has an adapter name a base model that lies in a folder so that it is found from any working directory."""
    config = json.loads(file.read_text(encoding="utf-8"))
    base = Path(config["base_model_name_or_path"])
    if base.is_dir():
        config["base_model_name_or_path"] = str(base.resolve())
        file.write_text(json.dumps(config, indent=2), encoding="utf-8")
