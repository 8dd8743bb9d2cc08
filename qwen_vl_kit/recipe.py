"""How a run was made: what was changed from the defaults, the command that makes it again, which rows it left out.

It wraps no step. `options` notes the first two when a run begins; here they are put in words, for page and card.
"""

import json
import os
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from shlex import join

from qwen_vl_kit.finished import NAMES, last_part, parsed, shown_name

# Where a run is and how it was started is no part of it, and a token is nobody's business.
APART = {"output_dir", "resume_from_checkpoint", "run_name", "config", "hub_token"}
NAMED = 10  # rows that were left out for one reason, by number


def changed(given, usual):
    """{name: [default, value]} of the options that are not as they usually are, in the forms that JSON has."""
    found = {name: [usual[name], value] for name, value in given.items() if name in usual and value != usual[name]}
    return json.loads(json.dumps({name: pair for name, pair in found.items() if name not in APART}, default=str))


def command(changes, processes):
    """The command line that makes the run again, in so many processes on one machine, without a config file."""
    words = ["torchrun", "--nproc_per_node", str(processes)] if processes > 1 else ["python"]
    words.append("finetune_qwen_vl.py")
    for name, (_, value) in changes.items():
        values = value if isinstance(value, list) else [value]
        if value is not None:
            words += [f"--{name}", *(word if isinstance(word, str) else json.dumps(word) for word in values)]
    return join(words)


def note(given, usual, processes):
    """What metrics.json says of how the run was started."""
    changes = changed(given, usual)
    noted = {"changed": changes}
    # Several machines, and models in parts, are started with files and addresses of their own.
    if processes == int(os.environ.get("LOCAL_WORLD_SIZE", 1)) and "ACCELERATE_USE_FSDP" not in os.environ:
        noted["command"] = command(changes, processes)
    return noted


def facts(outputs, metrics, predictions):
    """What was run, as names and values for a table. What only the kit measures may be missing."""
    settings, train = metrics["settings"], metrics["train"]
    samples = f"{train['samples']:,} samples in " if "samples" in train else ""
    # Without the kit, the images are what a later report leaves as it is.
    ended = f"{datetime.fromtimestamp((outputs / predictions[0]['image']).stat().st_mtime):%Y-%m-%d %H:%M}"
    run = {
        "model": shown_name("model_name_or_path", outputs, metrics),
        "data": shown_name("dataset_name", outputs, metrics),
        "held out": f"{len(predictions)} rows of {metrics['test_split']}",
        "trained on": f"{samples}{train['log'][-1]['step']:,} steps",
        "learning rate": f"{settings['learning_rate']:g}, {settings['lr_scheduler_type']}",
        "adapters": f"r {settings['lora_r']}, alpha {settings['lora_alpha']}, dropout {settings['lora_dropout']}",
        "seed": settings["seed"],
    }
    if "best_step" in train:
        run["best step"] = f"{train['best_step']:,}, by validation loss: the adapter is that step's"
    if "run" in metrics:
        parts = metrics["run"].get("resumed", ())
        words = [f"after step {part['step']:,}{changes_in_words(part['changed'])}" for part in parts]
        run["resumed"] = "; ".join(words) or "no"
    if "train_runtime" in train:
        run["time"] = f"{train['train_runtime']:.0f} s, {train['train_samples_per_second']:.1f} samples/s"
    if "peak_memory_gb" in train:
        run["peak GPU memory"] = f"{train['peak_memory_gb']:.1f} GB"
    if "hardware" in metrics:
        run["hardware"] = metrics["hardware"] + (f", {n} processes" if (n := metrics.get("processes", 1)) > 1 else "")
    if "versions" in metrics:
        run["versions"] = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    return run | {"date": metrics.get("run", {}).get("ended", ended)}


def changes_in_words(changed):
    """What was changed when a run was resumed, in words; of paths only that they were."""
    words = [name if "/" in f"{then}{now}" else f"{name} {then}, then {now}" for name, (then, now) in changed.items()]
    return f" ({', '.join(words)})" if words else ""


def changed_settings(metrics):
    """{name: [default, value]} for the page, of the settings that the table does not have anyway. None: not known."""
    changes = metrics.get("changed")
    if changes is None:
        return None
    return {name: [*map(in_words, pair)] for name, pair in changes.items() if name not in NAMES}


def in_words(value):
    """The value of a setting for a page that other people may see: without the folders of this machine."""
    if isinstance(value, float):
        return f"{value:g}"
    return last_part(value) if isinstance(value, str) and Path(value).is_absolute() else str(value)


def typed_names(metrics):
    """The names of the base model and of the data set as they were typed, but for the folders of absolute ones."""
    model, data = (in_words(metrics["settings"][name]) for name in NAMES)
    return {"model": model, "data": data}


def left_out(outputs):
    """The rows that the run did not use, [{"split", "reason", "count", "rows" (numbers as text)}]. None: not known."""
    file = outputs / "skipped.jsonl"
    if not file.is_file():
        return None
    rows = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        row = parsed(file, line)
        rows[str(row.get("split")), str(row.get("reason"))].append(row.get("row"))
    return [
        {
            "split": split,
            "reason": reason,
            "count": len(numbers),
            "rows": ", ".join(map(str, sorted(numbers)[:NAMED])) + ", ..." * (len(numbers) > NAMED),
        }
        for (split, reason), numbers in sorted(rows.items())
    ]
