"""Watches any training by transformers' Trainer from inside. Python runs this at its start, if it is on PYTHONPATH.

With WATCH_CLOCK=FILE, the file gets what `Clock` notes; with WATCH_PROFILE=FILE and WATCH_STEPS=FIRST,COUNT, PyTorch's
trace of these optimizer steps. What is watched stays as it is, but for one more callback in each of its trainers.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path

HERE = Path(__file__).resolve().parent


def now():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def watchers(TrainerCallback):
    """The callbacks that the environment asks for."""

    class Clock(TrainerCallback):
        """Notes when training began and when each optimizer step was done, the losses, and the peak memory."""

        def __init__(self):
            self.notes = {"ticks": [], "losses": []}

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            size, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
            recomputed = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
            self.notes |= {"begun": now(), "layout": [size, times, recomputed]}

        def on_step_end(self, args, state, control, **kwargs):
            import torch

            self.notes["ticks"].append(now())
            if torch.cuda.is_available():
                self.notes["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
            self.write()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.notes["losses"].append(float(logs["loss"]))
                self.write()

        def write(self):
            Path(os.environ["WATCH_CLOCK"]).write_text(json.dumps(self.notes))

    class Profile(TrainerCallback):
        """Has PyTorch's profiler trace some optimizer steps, from the first one's begin to the last one's end."""

        def __init__(self):
            self.first, count = map(int, os.environ["WATCH_STEPS"].split(","))
            self.last, self.profiler = self.first + count - 1, None

        def on_step_begin(self, args, state, control, **kwargs):
            from torch.profiler import ProfilerActivity, profile, supported_activities

            if state.global_step + 1 == self.first:  # the CPU's own work is left out if possible: it slows launching
                on_gpu = ProfilerActivity.CUDA in supported_activities()
                self.profiler = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
                now()
                self.profiler.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.last and self.profiler:
                now()
                self.profiler.stop()
                self.profiler.export_chrome_trace(os.environ["WATCH_PROFILE"])

    wanted = {"WATCH_CLOCK": Clock, "WATCH_PROFILE": Profile}
    return [kind for variable, kind in wanted.items() if os.environ.get(variable)]


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module of transformers' callbacks as the others do, and adds ours to every trainer."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.trainer_callback":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            kinds, make = watchers(module.TrainerCallback), module.CallbackHandler.__init__

            def __init__(handler, callbacks, *arguments, **options):
                make(handler, [kind() for kind in kinds] + callbacks, *arguments, **options)

            module.CallbackHandler.__init__ = __init__

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
hidden = PathFinder.find_spec("sitecustomize", [folder for folder in sys.path if Path(folder).resolve() != HERE])
if hidden:  # the machine's own, which has to run all the same
    hidden.loader.exec_module(importlib.util.module_from_spec(hidden))
