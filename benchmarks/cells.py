"""The script's cells, to be executed and timed one by one: what the benchmarks share."""

import re
import statistics
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "finetune_qwen_vl.py"


class Script:
    """The script's cells, executed one by one as `__main__`, so that each can be timed, and `Train` repeated."""

    def __init__(self, *arguments):
        titles = re.split(r"^# %% \[markdown\]\n# ## (.*)\n", SCRIPT.read_text(), flags=re.MULTILINE)
        self.cells = dict(zip(titles[1::2], titles[2::2], strict=True))
        self.seconds = {}
        main = sys.modules["__main__"] = types.ModuleType("__main__")  # where checkpoints look for its classes
        self.names = main.__dict__
        sys.argv = [str(SCRIPT), *map(str, arguments)]
        sys.path[0] = str(ROOT)  # where guard.py lies

    def run(self, title, until=None):
        """Executes the cell named `title`, or its beginning, up to the line `until`."""
        started = time.perf_counter()
        exec(compile(self.cells[title].partition(until)[0] if until else self.cells[title], SCRIPT, "exec"), self.names)
        self.seconds[title] = time.perf_counter() - started

    def prepare(self):
        """Everything before training, without the readings."""
        for title in ("Install", "Settings", "Question", "Data", "Model", "Samples"):
            self.run(title)
        self.run("Before", until="to_inference(model)\n")
        self.cuda = self.names["torch"].cuda if self.names["torch"].cuda.is_available() else None
        parameters = self.names["model"].named_parameters()
        self.untrained = {name: value.detach().clone() for name, value in parameters if value.requires_grad}

    def train(self, steps, effective=8, splits=None, limit_gib=None):
        """Trains the adapters from their beginning; `limit_gib` limits the GPU memory. Returns what was measured."""
        torch, args = self.names["torch"], self.names["training_args"]
        for name, value in self.names["model"].named_parameters():
            if name in self.untrained:
                value.data = self.untrained[name].clone()
        ticks = []

        class Clock(self.names["ProgressCallback"].__mro__[1]):
            def on_train_begin(self, *_, **__):
                ticks[:] = [time.perf_counter()]

            def on_step_end(self, *_, **__):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                ticks.append(time.perf_counter())

        from transformers import trainer

        known = list(trainer.DEFAULT_CALLBACKS)
        trainer.DEFAULT_CALLBACKS.append(Clock)
        args.max_steps, args.save_strategy, args.disable_tqdm = steps, "no", True
        args.splits = splits or [
            (effective >> halving, 1 << halving, recompute)
            for recompute, halvings in ((False, 2), (True, 4))
            for halving in range(halvings)
        ]
        self.names["effective_batch"], self.names["checkpoint"] = effective, None
        if self.cuda:
            self.names["gc"].collect()
            self.cuda.empty_cache()
            memory = self.cuda.mem_get_info()[1]
            self.cuda.set_per_process_memory_fraction(min(1, limit_gib * 2**30 / memory) if limit_gib else 1.0)
        started = time.perf_counter()
        try:
            self.run("Train")
        except SystemExit as error:
            return {"failed": str(error).strip()}
        finally:
            trainer.DEFAULT_CALLBACKS[:] = known
            if self.cuda:
                self.cuda.set_per_process_memory_fraction(1.0)
        each = [after - before for before, after in zip(ticks, ticks[1:], strict=False)]
        log = self.names["trainer"].state.log_history
        return {
            "train_s": time.perf_counter() - started,
            "finding_the_split_s": ticks[0] - started,
            "split": [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.gradient_checkpointing],
            "first_step_s": each[0],
            "step_s": statistics.median(each[1:]),
            "samples_per_s": effective / statistics.median(each[1:]),
            "peak_gib": self.cuda.max_memory_reserved() / 2**30 if self.cuda else None,
            "losses": [entry["loss"] for entry in log if "loss" in entry],
            "gradient_norms": [entry["grad_norm"] for entry in log if "loss" in entry],
        }

    def unfuse(self):
        """Gives the layers PEFT's own way of computing back."""
        for layer in self.names["model"].modules():
            if isinstance(layer, self.names["LoraLayer"]):
                layer.__dict__.pop("forward", None)
