"""What has to be set before the large libraries are imported: environment, warnings, and which process prints.

Wraps no step. No telemetry, no noise, output from one process only, and Ctrl-C that exits at once and silently.
"""

import logging
import os
import signal
import sys
import threading
import warnings
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path

SETTINGS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    # Unsloth writes patched copies of its libraries: into the user's cache rather than the working directory.
    "UNSLOTH_COMPILE_LOCATION": str(Path.home() / ".cache" / "unsloth_compiled"),
    # On a CPU, threads that spin for long while they wait crawl beside another busy program: 2 samples/s for 26.
    "GOMP_SPINCOUNT": "3000",
}
NOISY = ("torchao", "bitsandbytes", "transformers.trainer_utils", "datasets.load", "datasets.packaged_modules")


def quiet():
    """Has the libraries keep to themselves what does not matter here."""
    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Could not find a config file")  # PEFT would ask the hub for the base model's
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator")


class OnlySFT(MetaPathFinder):
    """Has Unsloth patch the one trainer of TRL's that is used here: it would rewrite 14, at every start, for 6 s."""

    def find_spec(self, name, path=None, target=None):
        if name != "unsloth.models.rl":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if hasattr(module, "_patch_trl_rl_trainers"):  # private (Unsloth 2026.10); named otherwise, all are patched
                module.patch_trl_rl_trainers = partial(module._patch_trl_rl_trainers, "sft_trainer")

        spec.loader.exec_module = exec_module
        return spec


def prepare():
    """Sets all this for the process that calls it, once, at its start."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    quiet()
    if "LOCAL_RANK" not in os.environ:  # without a launcher, the trainer would spread a step over all the GPUs it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if int(os.environ.get("RANK", 0)):  # launchers start a process for each GPU, and the first speaks for all
        sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"  # noqa: SIM115
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        sys.modules["unsloth"] = None  # it can't share a model out: importing it fails, and the script goes without
    if "IPython" in sys.modules:  # a notebook can have a use for other trainers, and catches Ctrl-C itself
        return
    sys.meta_path.insert(0, OnlySFT())
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
