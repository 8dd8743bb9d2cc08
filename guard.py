"""Keeps a run of finetune_qwen_vl.py from losing anything. The script takes it where it lies beside it.

Checkpoints and results are there as a whole or not at all, Ctrl-C and SIGTERM save before they end a run, a loss that
is no number ends it before anything is learned from it, a disk that is full is said in a sentence, and of several
processes none waits for ever for one that has run out of memory. The hub is asked for what is not cached alone.
"""

import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import datasets
import huggingface_hub
import torch
from accelerate.utils import gather_object
from httpx import HTTPError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints
from trl import SFTTrainer


def check(outputs, checkpoint, max_steps, fail):
    """Calls `fail` with a sentence if a run can't write to the folder `outputs`, or would write over an unfinished one.

    `checkpoint` is what it goes on from, if anything. If that run has finished and taken its `max_steps`, this ends.
    """
    try:
        tempfile.TemporaryFile(dir=outputs).close()
    except OSError as error:
        fail(f"can't write to {outputs} ({error.strerror}): choose another folder with --output_dir")
    if int(os.environ.get("RANK", 0)) == 0:
        put_back(outputs)  # where a run was killed between two renames
    if shutil.disk_usage(outputs).free < 1e8:
        fail(f"less than 0.1 GB is free in {outputs}: make room, or choose another disk with --output_dir")
    finished = outputs / "adapter" / "adapter_model.safetensors"  # what a run moves last, and nothing writes later
    finished = finished.stat().st_mtime if finished.exists() else 0
    unfinished = any(folder.stat().st_mtime > finished for folder in outputs.glob("checkpoint-*"))
    own = checkpoint and Path(checkpoint).resolve().parent == outputs.resolve()
    if own and not unfinished:
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
        if 0 < max_steps <= state["global_step"]:
            print(f"The run in {outputs} has finished already, after {max_steps} steps. To train on: more --max_steps")
            sys.exit()
    if unfinished and not own:
        fail(
            f"{outputs} holds a run that has not finished. Go on with it by --resume_from_checkpoint true, or leave it "
            "and write to another folder by --output_dir"
        )


online = not datasets.config.HF_HUB_OFFLINE


def allow_network(allow):
    """Lets the hub be asked, or not; never where the user has forbidden it by HF_HUB_OFFLINE."""
    os.environ["HF_HUB_OFFLINE"] = str(int(not (allow and online)))
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = not (allow and online)


def patiently(name, get, cached=True):
    """What `get` loads by `name`: out of the cache, without the network, or else from the hub.

    A hub that is busy is asked again after 5 and 30 s (a failing connection its own client has tried again). If it
    can't be reached, that is a ConnectionError; other errors are those of `get`.
    """
    allow_network(not cached)
    if online and cached and not Path(name).exists():
        try:
            return get()
        except Exception:  # not, or not all of it, is in the cache
            allow_network(True)
    for wait in (5, 30, None):
        try:
            return get()
        except Exception as error:
            http = error
            while http and not isinstance(http, HTTPError):
                http = http.__cause__ or http.__context__
            status = getattr(getattr(http, "response", None), "status_code", 0)
            if not http or 400 <= status < 429:
                raise
            reason = (str(http).splitlines() or [type(http).__name__])[0].rstrip(".:")
            if status < 429 or not wait:
                raise ConnectionError(reason) from error
        print(f"{reason}. Once more in {wait} s")
        time.sleep(wait)


def end(sentence):
    """Ends the run with a sentence, the last thing on the terminal."""
    for bar in [*getattr(tqdm, "_instances", ())]:
        bar.close()
    sys.exit(sentence)


def how_to_go_on(outputs):
    """What is safe, and what to type, in words."""
    last = get_last_checkpoint(outputs)
    return f"{last} is whole: the same command with --resume_from_checkpoint true goes on from it." if last else ""


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
        end(
            f"\nCould not save {what}, with {free:.2f} GB free in {outputs}: {error}. Make room. "
            f"{how_to_go_on(outputs)}"
        )
    shutil.rmtree(part)


def discard(checkpoint):
    """Deletes a checkpoint; half deleted, it is none."""
    part = Path(checkpoint).with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    Path(checkpoint).rename(part)
    shutil.rmtree(part)


class Stopper(TrainerCallback):
    """Has the trainer finish its step, save and stop, when Ctrl-C or SIGTERM asks for it; again, it ends at once."""

    def __init__(self):
        self.told, self.asked, self.handlers = 0, 0, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.handlers = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        self.told = number
        signal.signal(number, self.handlers[number])
        if int(os.environ.get("RANK", 0)) == 0:
            print("\nStopping after this step, to save it. Once more, and it stops at once.", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        self.asked = self.told  # not one variable: a signal can come while this is exchanged, and must not be lost
        if args.world_size > 1:  # one may have been told before the others
            self.asked = max(gather_object([self.asked]))
        if self.asked:
            control.should_save = control.should_training_stop = True

    def let_go(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Rehearsal(TrainerCallback):
    """Takes the longest samples once before training, to see whether the memory of every process suffices.

    In training the others would wait for ever for one that gave up in the middle of a step.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        size, fits = args.train_batch_size, True
        longest = [*self.trainer.rows_of_step(0)][-size:]
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        try:
            adam = torch.empty(2 * trainable, device=model.device)  # noqa: F841 (as much as the optimizer will take)
            batch = self.trainer.data_collator([self.trainer.train_dataset[row] for row in longest])
            model(**self.trainer._prepare_inputs(batch)).loss.backward()
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            fits = False
        model.zero_grad(set_to_none=True)
        if not all(gather_object([fits])):
            raise torch.OutOfMemoryError("out of memory, as a rehearsal shows")


class Trainer(SFTTrainer):
    """TRL's trainer, for runs that are left alone. `row_numbers`: what the rows of `train_dataset` are called."""

    row_numbers = ()

    def train(self, resume_from_checkpoint=None, **kwargs):
        outputs, main = Path(self.args.output_dir), self.args.should_save
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        size = 12 * trainable / 1e9  # of a checkpoint: AdamW has two more numbers for each parameter
        if main and shutil.disk_usage(outputs).free < size * (1 if resume_from_checkpoint else 3) * 1e9:
            end(
                f"Too little is free in {outputs}, for checkpoints of {size:.2f} GB: make room, or change --output_dir."
            )
        if main and not resume_from_checkpoint:
            for folder in outputs.glob("checkpoint-*"):  # of a run that has finished
                discard(folder)
        stopper = Stopper()
        self.add_callback(stopper)
        if self.args.world_size > 1 and not self.is_fsdp_enabled:
            self.add_callback(Rehearsal(self))
        try:
            result = super().train(resume_from_checkpoint, **kwargs)
        finally:
            stopper.let_go()
        if stopper.asked:
            print(f"\nStopped after step {self.state.global_step}. {how_to_go_on(outputs)}")
            sys.exit(128 + stopper.asked)
        return result

    def _save_checkpoint(self, model, trial=None):
        outputs, best = Path(self.args.output_dir), self.state.best_global_step
        name = f"checkpoint-{self.state.global_step}"
        with saving(outputs, name) if self.args.should_save else nullcontext():
            self.accelerator.wait_for_everyone()
            self._get_output_dir = lambda trial: str(outputs / "part")
            super()._save_checkpoint(model, trial)
            del self._get_output_dir
            if best:
                self.state.best_model_checkpoint = str(outputs / f"checkpoint-{best}")
            if best and self.args.should_save:
                self.state.save_to_json(outputs / "part" / name / "trainer_state.json")
            self.accelerator.wait_for_everyone()
        if self.args.should_save and (limit := self.args.save_total_limit):
            best = self.state.best_model_checkpoint
            for old in sort_checkpoints(outputs, use_mtime=True, best_model_checkpoint=best)[:-limit]:
                discard(old)
        self.accelerator.wait_for_everyone()

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.must_be_finite("loss", loss)
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        # In fp16, the gradients are scaled up as far as they can be: what is too far is tried again with less.
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() < 1:
            self.must_be_finite("gradient", norm)
        return norm

    def rows_of_step(self, step):
        """The rows of `train_dataset` that a step of this epoch is made of."""
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        order = [*self._get_train_sampler()]
        start = step * size % len(order)
        return order[start : start + size]

    def must_be_finite(self, what, value):
        if not math.isfinite(value):
            rows = sorted(self.row_numbers[row] for row in self.rows_of_step(self.state.global_step))
            end(
                f"\nThe {what} of step {self.state.global_step + 1} is {float(value)}: nothing was learned from it. "
                f"Look at its training rows, {rows}, and lower --learning_rate. {how_to_go_on(self.args.output_dir)}"
            )
