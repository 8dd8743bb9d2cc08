"""What is left of a run beside its scores, and what follows it.

Wraps `save`: metrics.json also says on what machine, with which versions and options of the kit, and how fast, and
which names were folders of that machine; config.yaml has what was changed from the defaults, for `--config`.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from qwen_vl_kit import run
from qwen_vl_kit.finished import NAMES

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
    names = {setting: getattr(run.options, setting) for setting in NAMES}
    # Not resolved: its end is what the user calls it.
    local = {setting: os.path.abspath(name) for setting, name in names.items() if Path(name).exists()}
    return metrics | notes | {"local": local, "processes": run.options.world_size} | machine()


def config(changed):
    """The text of a YAML file with which `--config` repeats a run that changed this, {option: [default, value]}."""
    what = "# What this run changed from the defaults. It is repeated, in another --output_dir, by\n"
    command = "# python finetune_qwen_vl.py --config config.yaml --output_dir outputs/again\n"
    values = {option: value for option, (_, value) in changed.items()}
    return what + command + yaml.safe_dump(values, allow_unicode=True, sort_keys=False)


def save(step, outputs, predictions, metrics):
    step(outputs, predictions, about(metrics))
    (outputs / "config.yaml").write_text(config(run.notes["changed"]), encoding="utf-8")
