"""What is left of a run beside its scores, and what follows it.

Wraps `save`: metrics.json also says on what machine, with which versions and options of the kit, and how fast.
"""

import os
import sys
from importlib.metadata import version

import torch

from qwen_vl_kit import run

PACKAGES = ["torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "pillow", "rapidfuzz"]


def machine():
    """What this process runs on, and with which versions: {"hardware": str, "versions": {package: version}}."""
    unsloth = ["unsloth", "unsloth_zoo"] if sys.modules.get("unsloth") else []
    cores = f"{os.cpu_count()} CPU cores"
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cores,
        "versions": {name: version(name) for name in PACKAGES + unsloth},
    }


def about(metrics):
    """`metrics` of the script with what the rooms have noted, the machine, and the versions."""
    notes = run.notes | {part: metrics[part] | run.notes[part] for part in ("settings", "train")}
    return metrics | notes | {"processes": run.options.world_size} | machine()


def save(step, outputs, predictions, metrics):
    step(outputs, predictions, about(metrics))
