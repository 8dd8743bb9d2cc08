"""Training: the fastest split into micro-batches that fits, a clean stop, and no step taken on NaN.

Wraps `split_batch` (which splits there are), `order_rows` (what an epoch is) and `make_trainer`: a trainer that tries
them and resumes where memory ran out, that finishes its step and saves on Ctrl-C or SIGTERM, and that ends a run before
it learns from a loss or a gradient that is not finite.
"""

import gc
import heapq
import math
import os
import signal
import sys
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from qwen_vl_kit import checkpoints, graphs, lock, record, run
from qwen_vl_kit.checkpoints import WholeCheckpoints, bring_best, how_to_resume, make_room
from qwen_vl_kit.feeding import feed
from qwen_vl_kit.memory import TooLarge, is_shortage, must_fit
from qwen_vl_kit.sentences import fail

# ---------------------------------------------------------------------------------------------------------------------
# Micro-batches
# ---------------------------------------------------------------------------------------------------------------------


def layouts(batch, size, times, recompute, processes=1):
    """How an optimizer step can be split: [(samples at once, micro-batches, whether activations are recomputed), ...].

    `batch` are its samples in all processes; `size`, `times` and `recompute` are parts of a layout that the user has
    set, or None. The fastest come first: a quarter of the samples at once, activations kept, is slower than all at
    once, recomputed, and takes more memory. Raises ValueError with a sentence if there is no such split.
    """
    if any(number is not None and number < 1 for number in (batch, size, times)):
        raise ValueError("--batch_size and the numbers that it is split into must be at least 1")
    if batch is None and not (size or times):
        batch = 8
    if batch is None:
        batch = (size or 8) * (times or 1) * processes  # the trainer's own defaults
    share = batch // processes
    powers = [2**power for power in range(share.bit_length())]
    found = [
        (share // count, count, recomputed)
        for recomputed, choice in ((False, powers[:2]), (True, powers))
        for count in ([times] if times else [share // size] if size else choice)
        if count and share % count == 0 and size in (None, share // count) and recompute in (None, recomputed)
    ]
    if batch % processes or not found:
        asked = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times}
        asked = "".join(f" as --{name} {value}" for name, value in asked.items() if value)
        shared = f" over {processes} processes" * (processes > 1)
        raise ValueError(f"--batch_size {batch} can't be split evenly{shared}{asked}: choose numbers that divide it")
    return found


def apply(layout, options):
    """Sets the trainer's options to a layout."""
    options.per_device_train_batch_size, options.gradient_accumulation_steps, options.gradient_checkpointing = layout


def split_batch(step, options, free):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    size, times = options.per_device_train_batch_size, options.gradient_accumulation_steps
    run.layouts = layouts(options.batch_size, size, times, options.gradient_checkpointing, processes)
    apply(run.layouts[0], options)
    options.batch_size = run.layouts[0][0] * run.layouts[0][1] * processes


def order_rows(step, lengths, options):
    steps_of_epoch = math.ceil(len(lengths) / options.batch_size)  # the trainer takes the whole run for one epoch
    for what in ("eval", "save", "logging"):
        if getattr(options, f"{what}_strategy") == "epoch":
            setattr(options, f"{what}_strategy", type(getattr(options, f"{what}_strategy"))("steps"))
            setattr(options, f"{what}_steps", min(steps_of_epoch, options.max_steps))
    if options.eval_strategy != "no" and (options.eval_delay or 0) > options.max_steps:
        fail(f"--eval_delay {options.eval_delay} is longer than the run ({options.max_steps} steps): lower it.")
    return step(lengths, options)


# ---------------------------------------------------------------------------------------------------------------------
# The trainer
# ---------------------------------------------------------------------------------------------------------------------


class LossBar(ProgressCallback):
    """The trainer's progress bar with the loss in it, instead of a line for every step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")
        elif self.training_bar is not None and "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}")

    def close(self):
        """Takes the bars off the terminal, so that nothing is drawn below a last sentence."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()


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
            print("\nStopping after this step, to save it. Interrupt again to stop at once.", file=sys.stderr)

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
    """Runs the longest samples once before training, to see whether every process has enough memory.

    This way memory runs out at once or not at all. If one of several processes gave up in the middle of a training
    step, the others would wait for it forever.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        fits, devices = True, [model.device] * (model.device.type == "cuda")
        longest = heapq.nlargest(
            args.train_batch_size, range(len(run.order)), key=lambda at: run.lengths[run.order[at]]
        )
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        with torch.random.fork_rng(devices):  # training draws what it would have drawn
            try:
                adam = torch.empty(2 * trainable, device=model.device)  # noqa: F841 (as much as the optimizer takes)
                batch = self.trainer.data_collator([self.trainer.train_dataset[at] for at in longest])
                self.compute(model, batch)
            except RuntimeError as error:
                if not is_shortage(error):
                    raise
                fits = False
            model.zero_grad(set_to_none=True)
            if not all(gather_object([fits])):
                raise TooLarge("the longest samples don't fit into memory")
            if self.trainer.graphs:
                other = self.trainer.data_collator([self.trainer.train_dataset[at] for at in reversed(longest)])
                self.trainer.apart = graphs.check(self.trainer.graphs, partial(self.compute, model), batch, other)
                model.zero_grad(set_to_none=True)

    def compute(self, model, batch):
        """The loss of a batch, and in the model the gradients, in fp16 times a number that keeps them from being 0."""
        with self.trainer.accelerator.autocast():
            loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
        (loss * 1024 if self.trainer.args.fp16 else loss).backward()
        return float(loss.detach())


# Of a resumed run these would have the time and the losses of its last part beside the samples and steps of all.
SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")


class Resumption(TrainerCallback):
    """Has a run that resumes take its settings from its options, and only its state from the checkpoint.

    An optimizer and a schedule are restored with the learning rate, weight decay, ... that they were saved with, and
    the state of a trainer with when it saves, logs and evaluates: those of the options would be ignored.
    """

    def __init__(self, trainer, checkpoint):
        self.trainer, self.outputs = trainer, Path(trainer.args.output_dir)
        self.record = checkpoints.record_of(checkpoint)

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        state.compute_steps(args, state.max_steps)
        args.eval_on_start = False  # it was then
        self.trainer.take_up(self.record)
        for group, options in zip(optimizer.param_groups, self.trainer.asked, strict=True):
            group.update({name: value for name, value in options.items() if name != "lr"})
        if isinstance(lr_scheduler, LambdaLR):  # others carry the learning rate in their state
            rates, at = [options["lr"] for options in self.trainer.asked], lr_scheduler.last_epoch
            now = [rate * factor(at) for rate, factor in zip(rates, lr_scheduler.lr_lambdas, strict=True)]
            lr_scheduler.base_lrs, lr_scheduler._last_lr = rates, now  # private (torch 2.10): what the log shows
            for group, first, rate in zip(optimizer.param_groups, rates, now, strict=True):
                group["initial_lr"], group["lr"] = first, rate
        best = self.outputs / f"checkpoint-{state.best_global_step}"
        wrong = checkpoints.damage(best, to_resume=False) if state.best_global_step else ""
        if state.best_global_step and not wrong:
            state.best_model_checkpoint = str(best)
        elif state.best_global_step:
            print(f"{best.name}, the best so far, can't be used ({wrong}): the best of the steps to come is kept.")
            state.best_global_step = state.best_metric = state.best_model_checkpoint = None
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
                callback.early_stopping_patience_counter = saved.get("early_stopping_patience_counter", 0)


class Trainer(WholeCheckpoints, SFTTrainer):
    """TRL's trainer, for runs that are left alone."""

    def __init__(self, *arguments, train_dataset, eval_dataset=None, **options):
        if eval_dataset is not None:
            how = train_dataset.format
            eval_dataset = run.validation_set.with_format(how["type"], **how["format_kwargs"])
        super().__init__(*arguments, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)
        self.bar, self.graphs, self.apart = LossBar(), None, None
        if run.extra.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(run.extra.early_stopping_patience))
        if self.pop_callback(ProgressCallback):  # in a notebook it is another one, and there may be none
            self.add_callback(self.bar)

    def train(self, resume_from_checkpoint=None, **kwargs):
        outputs = Path(self.args.output_dir)
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        if self.args.should_save:
            lock.take(outputs, fail)
            make_room(outputs, 12 * trainable / 1e9, resume_from_checkpoint)  # AdamW has two numbers for each parameter
            if resume_from_checkpoint:
                bring_best(outputs, resume_from_checkpoint)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint:
            step = checkpoints.record_of(resume_from_checkpoint)["step"]
            print(f"Steps 1 to {step} are done; resuming with step {step + 1}")
            self.add_callback(Resumption(self, resume_from_checkpoint))
        stopper = Stopper()
        self.add_callback(stopper)
        if (self.args.world_size > 1 or torch.cuda.is_available()) and not self.is_fsdp_enabled:
            self.add_callback(Rehearsal(self))
        try:
            result = super().train(resume_from_checkpoint, **kwargs)
        finally:
            stopper.let_go()
            self.bar.close()
            if self.graphs:
                self.recorded = self.graphs.recorded()
                self.graphs.release()
        if stopper.asked:
            print(f"\nStopped after step {self.state.global_step}. {how_to_resume(outputs)}")
            sys.exit(128 + stopper.asked)
        return result

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        return feed(loader) if torch.cuda.is_available() and not self.args.dataloader_num_workers else loader

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        self.asked = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
        return optimizer

    def describe(self):
        return record.at_step(self, run.record["seconds"] + time.perf_counter() - run.began)

    def evaluation_loop(self, dataloader, *arguments, metric_key_prefix="eval", **options):
        """The loss on all answers' tokens. The library's own is a mean over batches: it depends on their size."""
        rows, sharded = dataloader.dataset, self.is_fsdp_enabled  # with weights in parts, all take every step together
        mine = range(len(rows)) if sharded else range(self.args.process_index, len(rows), self.args.world_size)
        size, loss, tokens = min(self.args.eval_batch_size, self.args.train_batch_size), 0.0, 0
        self.model.eval()
        for start in range(0, len(mine), size):
            batch = self.data_collator([rows[at] for at in mine[start : start + size]])
            answered = int((batch["labels"] != -100).sum())
            with torch.no_grad(), self.accelerator.autocast():
                loss += float(self.model(**self._prepare_inputs(batch)).loss) * answered
            tokens += answered
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        sums = [(loss, tokens)] if sharded else gather_object([(loss, tokens)])
        loss, tokens = (sum(part) for part in zip(*sums, strict=True))
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss / tokens}, len(rows))

    def log(self, logs, start_time=None):
        # The trainer takes the whole run for one epoch.
        rows = len(run.lengths) if self.args.num_train_epochs else len(run.train_rows)
        self.state.epoch = self.state.global_step * self.args.batch_size / rows
        super().log({name: logs[name] for name in logs if name not in SUMMARY}, start_time)

    def unlogged(self):
        """What the libraries' checkpoints lack: tokens counted, and what the next log entry is to average."""
        # Private (transformers 5.17, TRL 1.14): else a resumed run counts from 0, and averages fewer steps.
        parts = {"loss": float(self._tr_loss), "since": self._globalstep_last_logged, "means": self._metrics["train"]}
        return {"tokens": self._total_train_tokens, "unlogged": parts}

    def take_up(self, saved):
        """Restores the same."""
        self._total_train_tokens, parts = saved["tokens"], saved["unlogged"]
        if self.args.world_size == 1:  # several have a part of it each, and the checkpoint has the first one's
            self._tr_loss += parts["loss"]
            self._globalstep_last_logged = parts["since"]
            self._metrics["train"].update(parts["means"])

    def _load_best_model(self):
        # Private (transformers 5.17): it would take what is damaged, and pass the last adapter for one that is missing.
        best = Path(self.state.best_model_checkpoint)
        if wrong := checkpoints.damage(best, to_resume=False):
            print(f"{best.name}, the best, can't be used ({wrong}): the adapter is that of the last step.")
            self.state.best_global_step = self.state.best_model_checkpoint = None
        else:
            super()._load_best_model()

    def save_now(self):
        """Saves a checkpoint between two steps, to resume from."""
        # What a part of the next step has added is dropped: that step is taken again.
        entry = next((entry for entry in reversed(self.state.log_history) if "num_tokens" in entry), {"step": -1})
        if entry["step"] == self.state.global_step:
            self._total_train_tokens = int(entry["num_tokens"])
        self._tr_loss, self._globalstep_last_logged = torch.zeros_like(self._tr_loss), self.state.global_step
        self._metrics["train"].clear()
        only, self.args.save_only_model = self.args.save_only_model, False
        self._save_checkpoint(self.model)
        self.args.save_only_model = only

    def finish_early(self, checkpoint):
        """Takes up a run that early stopping had ended before it was interrupted. Returns whether that is so."""
        state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
        saved = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
        patience = run.extra.early_stopping_patience
        if not patience or saved.get("early_stopping_patience_counter", 0) < patience:
            return False
        best = Path(self.args.output_dir, f"checkpoint-{state.best_global_step}")
        if self.args.should_save:
            bring_best(Path(self.args.output_dir), checkpoint)
        self.accelerator.wait_for_everyone()
        self.state, state.best_model_checkpoint, state.max_steps = state, str(best), self.args.max_steps
        self._load_from_checkpoint(checkpoint)
        self._load_best_model()
        return True

    def training_step(self, *args, **kwargs):
        if self.graphs:
            self.graphs.follow()
        loss = super().training_step(*args, **kwargs)
        self.must_be_finite("loss", loss)
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        # Private (transformers 5.17): where callbacks are told the norm, the step has been taken.
        norm = super()._get_grad_norm(*args, **kwargs)
        # In fp16, gradients are scaled up as far as possible: on overflow, the scaler tries again with a lower scale.
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() < 1:
            self.must_be_finite("gradient", norm)
        return norm

    def must_be_finite(self, what, value):
        """Ends the run, with the numbers of the step's rows, if a loss or a gradient is NaN or infinite."""
        if not math.isfinite(value):
            first = self.state.global_step * self.args.batch_size
            rows = sorted(run.order[first : first + self.args.batch_size])
            self.bar.close()
            fail(
                f"\nThe {what} of step {self.state.global_step + 1} is {float(value)}: nothing was learned from it. "
                f"Look at its training rows, {rows}, or start again with a lower --learning_rate. "
                f"{how_to_resume(self.args.output_dir)}"
            )


class Attempts:
    """Trains with the fastest layout that fits into memory; everything else is passed on to the current trainer.

    `make` makes a trainer of a class, with the options as they are by then.
    """

    def __init__(self, make):
        self.make, self.trainer = make, make(Trainer)

    def __getattr__(self, name):
        return getattr(self.trainer, name)

    def train(self, resume_from_checkpoint=None):
        if run.trained:
            fail(
                "This model has trained already, and would go on from there: run all cells from the settings on. To "
                "resume a run that was stopped, add --resume_from_checkpoint true to its options."
            )
        run.began, checkpoint, run.trained = time.perf_counter(), resume_from_checkpoint, True
        if checkpoint and self.trainer.finish_early(checkpoint):
            return self.note()
        # Where graphs are used, waiting for launches is what a split into micro-batches, or recomputing, would cost.
        used = [True] * graphs.wanted(run.model, self.args, run.extra.cuda_graphs) + [False]
        self.ways = [(layout, recorded) for recorded in used for layout in run.layouts]
        with must_fit("a training step"):
            while not (result := self.attempt(checkpoint, *self.ways[0])):
                checkpoint = self.start_over(self.ways[0][0]) or checkpoint
        self.note()
        return result

    def attempt(self, checkpoint, layout, recorded):
        """What training returns, or None if memory has run out and there is another way to try."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if recorded:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
            long = self.args.max_steps * self.args.batch_size >= graphs.LONG
            self.trainer.graphs = graphs.Graphs(self.trainer.model, dtype, recompute=layout[2], long=long)
        try:
            return self.trainer.train(resume_from_checkpoint=checkpoint)
        except RuntimeError as error:
            # Of several processes, only those that have rehearsed together can give up together.
            together = self.trainer.args.world_size == 1 or isinstance(error, TooLarge)
            only = isinstance(error, graphs.GraphsTooLarge)  # without graphs, this layout fits
            self.ways = [way for way in self.ways if way != (layout, recorded) and (only or way[0] != layout)]
            if not self.ways or not together or not is_shortage(error):
                raise

    def start_over(self, layout):
        """Makes a trainer for another layout. Returns the checkpoint to resume from, if a step has been taken."""
        print("\nNot enough memory for that; trying the next fastest way:")
        old, checkpoint = self.trainer, None
        old.model.zero_grad(set_to_none=True)
        if old.state.global_step:
            old.save_now()
            checkpoint = str(Path(old.args.output_dir, f"checkpoint-{old.state.global_step}"))
        apply(layout, old.args)
        self.trainer = old = None  # what it holds is needed by the next one
        gc.collect()
        self.trainer = self.make(Trainer)
        return checkpoint

    def note(self):
        """Keeps and prints the time that training took (s), and the memory (GB, of the GPU that needed most).

        Both are of all parts of a run that was resumed; time that was lost with steps after a checkpoint is left out.
        """
        batch, state = self.args.batch_size, self.state
        seconds = run.record["seconds"] + time.perf_counter() - run.began
        speed = state.global_step * batch / seconds
        numbers = {"train_runtime": seconds, "train_samples_per_second": speed, "samples": state.global_step * batch}
        memory = ""
        if torch.cuda.is_available():
            here = max(gather_object([torch.cuda.max_memory_reserved() / 1e9]))
            numbers["peak_memory_gb"] = max(here, run.record.get("peak_memory_gb", 0))
            memory = f", {numbers['peak_memory_gb']:.1f} GB of GPU memory at most"
        if self.trainer.graphs and self.trainer.apart:
            numbers["cuda_graphs"] = dict(zip(("loss_apart", "gradients_apart"), self.trainer.apart, strict=True))
            numbers["cuda_graphs"]["sizes"] = self.trainer.recorded
            memory += f", {self.trainer.recorded} CUDA graphs"
        parts = len(run.record["resumed"]) + 1
        resumed = f" (in {parts} parts)" * (parts > 1)
        if state.best_global_step and self.args.load_best_model_at_end:
            numbers["best_step"] = state.best_global_step
            print(f"The adapter is from step {state.best_global_step}, which had the lowest validation loss.")
        if state.global_step < state.max_steps:
            print(
                f"Stopped early, after step {state.global_step} of {state.max_steps}: the validation loss had not "
                f"improved {run.extra.early_stopping_patience} times in a row."
            )
        run.notes["train"] = numbers
        run.notes["run"] = {name: run.record[name] for name in ("id", "earlier", "resumed")}
        run.notes["run"] |= {"steps": state.global_step, "max_steps": self.args.max_steps}
        run.notes["run"]["ended"] = f"{datetime.now():%Y-%m-%d %H:%M}"
        print(f"Trained in {seconds:.0f} s{resumed}, {speed:.1f} samples/s{memory}.")


def make_trainer(step):
    return Attempts(step)
