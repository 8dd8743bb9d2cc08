"""Reads back what a finished run has left in its folder, for the rooms that work on it: report, export.

It wraps no step. A folder with no finished run in it, and a file of it that is damaged, are told apart here, once.
"""

import json
import sys
from pathlib import Path

from qwen_vl_kit.sentences import first_line

# What every reading of `predictions.jsonl` has, and every `metrics.json`, also where the script ran without the kit.
READING = {"text", "cut", "errors", "length"}
METRICS = {"settings", "train", "test_split"}


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
    """The adapter's configuration. Ends the program if the adapter is not there, or damaged."""
    from safetensors import SafetensorError, safe_open

    folder = outputs / "adapter"
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


def shown_name(name):
    """A hub name as it is; of a path only its end, so that no folder names of this machine are published."""
    return Path(name).name if Path(name).is_absolute() or ".." in Path(name).parts else name
