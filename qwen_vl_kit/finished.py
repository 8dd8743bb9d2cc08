"""Reads back what a finished run has left in its folder, for the rooms that work on it: report, export.

It wraps no step. A folder with no finished run in it, and a file of it that is damaged, are told apart here, once. So
is a `merged/` of the adapter that lies beside it (`not_made_of`) from one of an earlier run's, and a name on this
machine (`local_names`) from one on the hub.
"""

import hashlib
import json
import re
import sys
from pathlib import Path, PureWindowsPath

from qwen_vl_kit.sentences import first_line

# What every reading of `predictions.jsonl` has, and every `metrics.json`, also where the script ran without the kit.
READING = {"text", "cut", "errors", "length"}
METRICS = {"settings", "train", "test_split"}
RECORD = "run.json"  # in a checkpoint: what it was made of, and what its files are; in a run's folder: the former


def metrics_of(outputs):
    """The content of `metrics.json`."""
    file = outputs / "metrics.json"
    metrics = parsed(file, text_of(outputs, file))
    if missing := METRICS - {*metrics}:
        sys.exit(f"{file} was not written by this script: it lacks {', '.join(sorted(missing))}.")
    return metrics


def predictions_of(outputs):
    """The lines of `predictions.jsonl`."""
    file = outputs / "predictions.jsonl"
    rows = [parsed(file, line) for line in text_of(outputs, file).splitlines()]
    if not rows or any(READING - {*row.get("before", ())} or READING - {*row.get("after", ())} for row in rows):
        sys.exit(f"{file} was not written by this version of the script: each reading needs {sorted(READING)}.")
    return rows


def adapter_of(outputs):
    """The configuration of a run's adapter. Ends the program if the adapter is not there, or damaged."""
    return adapter_in(outputs / "adapter", outputs)


def adapter_in(folder, outputs=None):
    """The same of an adapter in any `folder`; what is missing is missed in `outputs`."""
    from safetensors import SafetensorError, safe_open

    outputs = outputs or folder
    config = parsed(folder / "adapter_config.json", text_of(outputs, folder / "adapter_config.json"))
    if not config.get("base_model_name_or_path"):
        sys.exit(f"{folder / 'adapter_config.json'} is damaged: it names no base model.")
    file = folder / "adapter_model.safetensors"
    try:
        with safe_open(file, "numpy"):  # reads the header, and sees whether the file is as long as that says
            return config
    except FileNotFoundError:
        not_finished(outputs, file)
    except (OSError, SafetensorError) as error:
        sys.exit(f"{file} is damaged: {first_line(error)}. Train again, or copy it again from where it came.")


def text_of(outputs, file):
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        not_finished(outputs, file)
    except UnicodeDecodeError as error:
        sys.exit(f"{file} is damaged: {first_line(error)}.")
    except OSError as error:
        sys.exit(f"Could not read {file}: {error.strerror}.")


def parsed(file, text):
    try:
        content = json.loads(text)
    except ValueError as error:
        sys.exit(f"{file} is damaged: {first_line(error)}.")
    if not isinstance(content, dict):
        sys.exit(f"{file} is damaged: {type(content).__name__} in the place of a dictionary.")
    return content


def not_finished(outputs, file):
    if not outputs.is_dir():
        sys.exit(f"There is no folder {outputs}: name the --output_dir of a run that has finished.")
    sys.exit(f"There is no finished run in {outputs}: {file.relative_to(outputs)} is missing.")


# ---------------------------------------------------------------------------------------------------------------------
# What was made of the adapter
# ---------------------------------------------------------------------------------------------------------------------


NOTE = "made_of.json"  # lies in `merged/` and in `merged_gguf/`


def digest_of(file):
    """The SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def adapter_sums(outputs):
    """What the adapter is now: checksums of its weights, and of its configuration however that is laid out."""
    config = json.dumps(adapter_of(outputs), sort_keys=True).encode()
    return {
        "adapter_model.safetensors": digest_of(outputs / "adapter" / "adapter_model.safetensors"),
        "adapter_config.json": hashlib.sha256(config).hexdigest(),
    }


def note_of(folder):
    """What a merge (or GGUF files) in `folder` says it was made of; nothing if it does not say."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def not_made_of(outputs, name="merged"):
    """Why `outputs/<name>` can't stand for the adapter beside it, in words; None if it was made of that adapter.

    By checksums: a copy has other times, and an adapter that was put back has older ones.
    """
    folder = outputs / name
    if not folder.is_dir():
        return f"there is no {folder}"
    note = note_of(folder)
    if not note:
        return f"{folder} does not say which adapter it was made of"
    for file, checksum in adapter_sums(outputs).items():  # the weights first
        if note.get(file) != checksum:
            return f"{folder} was made of another adapter (another {file})"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Names on this machine, and names on the hub
# ---------------------------------------------------------------------------------------------------------------------


HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
NAMES = {"model_name_or_path": "models", "dataset_name": "datasets"}  # settings, and what the hub calls them


def local_names(outputs, metrics):
    """{setting: path} of the base model and the data set, where these were files or folders of a machine.

    A run says so in metrics.json: `acme/model` can be either, and elsewhere nothing tells which. A run that did not say
    it (the script alone, an older version) has a name on the hub if the hub's cache has it and no folder does, and its
    base model where the adapter names it so: to say too little of a data set harms nobody, an adapter needs its base.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    if "local" in metrics:
        return metrics["local"]
    named = {setting: metrics["settings"][setting] for setting in NAMES}
    try:
        config = json.loads((outputs / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
        named["model_name_or_path"] = base = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError):
        base = None
    return {
        setting: name
        for setting, name in named.items()
        if not HUB_NAME.fullmatch(name)
        or lies_near(outputs, name)
        or not (name == base or Path(HF_HUB_CACHE, f"{NAMES[setting]}--{name.replace('/', '--')}").is_dir())
    }


def lies_near(outputs, name):
    """Whether there is such a file or folder, seen from here or from one above the run's own, where it was started."""
    return any((at / name).exists() for at in [Path(), *outputs.resolve().parents])


def shown_name(setting, outputs, metrics):
    """A hub name as it is; of a path only its end, so that no folder names of this machine are published."""
    local = local_names(outputs, metrics)
    return last_part(local[setting]) if setting in local else metrics["settings"][setting]


def last_part(path):
    return PureWindowsPath(path).name.lstrip(".") or "a local folder"
