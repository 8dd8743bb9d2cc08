"""Checkpoints and results: there as a whole or not at all; one run in a folder.

Wraps `save`; `training` makes its trainer out of `WholeCheckpoints`, and `options` asks `check` before a run starts. A
full disk is told in a sentence, and nothing is lost by it or by a kill.
"""

import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from qwen_vl_kit.sentences import fail


def check(outputs, checkpoint, max_steps, error):
    """Calls `error` with a sentence if a run can't write to the folder `outputs`, or would overwrite an unfinished one.

    `checkpoint` is what it resumes from, if anything. If that run has finished and taken its `max_steps`, this ends.
    """
    try:
        tempfile.TemporaryFile(dir=outputs).close()
    except OSError as reason:
        error(f"can't write to {outputs} ({reason.strerror}): choose another folder with --output_dir")
    if int(os.environ.get("RANK", 0)) == 0:
        put_back(outputs)  # where a run was killed between two renames
    if shutil.disk_usage(outputs).free < 1e8:
        error(f"less than 0.1 GB is free in {outputs}: make room, or choose another disk with --output_dir")
    finished = outputs / "adapter" / "adapter_model.safetensors"  # what a run moves last, and nothing writes later
    finished = finished.stat().st_mtime if finished.exists() else 0
    unfinished = any(folder.stat().st_mtime > finished for folder in outputs.glob("checkpoint-*"))
    own = checkpoint and Path(checkpoint).resolve().parent == outputs.resolve()
    if own and not unfinished:
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
        if 0 < max_steps <= state["global_step"]:
            print(
                f"The run in {outputs} has already finished, after {max_steps} steps. To continue it, raise --max_steps"
            )
            sys.exit()
    if unfinished and not own:
        error(
            f"{outputs} holds a run that has not finished. Resume it with --resume_from_checkpoint true, or leave it "
            "and write to another folder with --output_dir"
        )


def how_to_resume(outputs):
    """What is safe, and what to type, in words."""
    last = get_last_checkpoint(outputs)
    return f"{last} is whole: the same command with --resume_from_checkpoint true resumes from it." if last else ""


def put_back(outputs):
    """Gives what was moved aside for something newer its place again, if that never took it."""
    for old in (outputs / "part").glob("old *"):
        if not (outputs / old.name.removeprefix("old ")).exists():
            old.rename(outputs / old.name.removeprefix("old "))


@contextmanager
def saving(outputs, what):
    """A folder to write `what` to; at the end all that is in it is moved to `outputs`, each part in one rename.

    What was there before goes only then. Ends the run with a sentence where the disk is full or gone.
    """
    part = outputs / "part"  # what is being written, or deleted: nobody takes it for something whole
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened)
        for new in sorted(part.iterdir(), reverse=True):  # the adapter last (see `check`)
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
    part = Path(checkpoint).with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    Path(checkpoint).rename(part)
    shutil.rmtree(part)


def make_room(outputs, gigabytes, resumed):
    """Ends the run if `outputs` has no room for checkpoints of this size; discards those of a finished run."""
    if shutil.disk_usage(outputs).free < gigabytes * (1 if resumed else 3) * 1e9:
        fail(
            f"Not enough disk space in {outputs} for checkpoints of {gigabytes:.2f} GB: make room, or choose another "
            "folder with --output_dir."
        )
    if not resumed:
        for folder in outputs.glob("checkpoint-*"):
            discard(folder)


class WholeCheckpoints:
    """Has a trainer write each checkpoint aside, and move it to its place when it is whole.

    `_save_checkpoint` is private (transformers 5.17): callbacks are told of a checkpoint only when it is in its place.
    """

    def create_model_card(self, *_, **__):
        """No card of TRL's beside checkpoints: it would not know the base model. The room `report` makes one."""

    def _save_checkpoint(self, model, trial=None):
        outputs, best = Path(self.args.output_dir), self.state.best_global_step
        name = f"checkpoint-{self.state.global_step}"
        with saving(outputs, name) if self.args.should_save else nullcontext():
            self.accelerator.wait_for_everyone()
            self.args.output_dir = str(outputs / "part")
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(outputs)
            if best and (best == self.state.global_step or (outputs / f"checkpoint-{best}").exists()):
                self.state.best_model_checkpoint = str(outputs / f"checkpoint-{best}")
            if best and self.args.should_save:
                self.state.save_to_json(outputs / "part" / name / "trainer_state.json")
            self.accelerator.wait_for_everyone()
        if self.args.should_save and (limit := self.args.save_total_limit):
            best = self.state.best_model_checkpoint
            for old in sort_checkpoints(outputs, use_mtime=True, best_model_checkpoint=best)[:-limit]:
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
