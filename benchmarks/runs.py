"""Runs of finetune_qwen_vl.py as people start it, timed from outside by the lines that it prints."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "finetune_qwen_vl.py"
WATCH = Path(__file__).resolve().parent / "watch"


def recipe(options):
    """The script's arguments for `options.model` and `options.dataset`, hub names or folders; by default the demo's."""
    named = {"model_name_or_path": options.model, "dataset_name": options.dataset}
    if not options.model:
        named = {"config": "demo/config.yaml", "model_name_or_path": "demo/model", "dataset_name": "demo/data"}
    arguments = []
    for name, value in named.items():  # the script alone runs in another folder
        arguments += [f"--{name}", str(ROOT / value) if (ROOT / value).exists() else value]
    return arguments


def lines_of(command, folder=ROOT):
    """Runs a command in `folder` and yields (seconds since its start, line) as it prints; raises if it fails."""
    started, environment = time.perf_counter(), {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            yield time.perf_counter() - started, line.rstrip()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def watched(clock, **more):
    """The environment in which trainings note in the file `clock` what `watch/sitecustomize.py` sees of them."""
    paths = [str(WATCH), os.environ.get("PYTHONPATH")]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "WATCH_CLOCK": clock}
    return os.environ | {name: str(value) for name, value in (ours | more).items()}


def ended(command, log, environment, limit=None, folder=ROOT):
    """Runs a command, its output in the file `log`, for `limit` seconds at most. Returns how it ended, in words."""
    with open(log, "w", encoding="utf-8") as output:
        how = {"cwd": folder, "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([*map(str, command)], **how, start_new_session=True)
        try:
            code = process.wait(limit)
            return f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            return f"ended after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # what it has started belongs to the same session
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def timings(lines, batch):
    """What the lines of a training tell: the script prints one as it makes a trainer, and one for each step."""
    made = [second for second, line in lines if line.startswith("Training ")]  # several, where memory ran out
    steps = [second for second, line in lines if line.startswith("{'loss'")]
    last_made = max(second for second in made if second < steps[0])
    step = statistics.median(after - before for before, after in zip(steps, steps[1:], strict=False))
    return {
        "train_s": steps[-1] - made[0],
        "finding_the_layout_s": last_made - made[0],
        "first_step_s": steps[0] - last_made,
        "step_s": step,
        "samples_per_s": batch / step,
    }


def numbers(train, settings):
    """What metrics.json says of a training: its layout, its losses and, with the kit, its peak memory."""
    layout = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    steps = [entry for entry in train["log"] if "loss" in entry]
    return {
        "batch": settings["batch_size"],
        "layout": [settings[name] for name in layout],
        "losses": [entry["loss"] for entry in steps],
        "gradient_norms": [entry["grad_norm"] for entry in steps],
        "peak_gib": train["peak_memory_gb"] * 1e9 / 2**30 if "peak_memory_gb" in train else None,
    }


def whole_run(*arguments, launcher=(sys.executable,), script=SCRIPT):
    """Runs the script from start to end, in its own folder. Returns all that was measured."""
    with tempfile.TemporaryDirectory() as outputs:
        command = [*launcher, script, *arguments, "--disable_tqdm", "true", "--output_dir", outputs]
        started = time.perf_counter()
        lines = list(lines_of([*map(str, command)], script.parent))
        whole = time.perf_counter() - started
        metrics = json.loads(Path(outputs, "metrics.json").read_text(encoding="utf-8"))
    loaded = next(second for second, line in lines if line.endswith("parameters train"))
    read = next(at for at, (_, line) in enumerate(lines) if line.startswith("Before training"))
    result = numbers(metrics["train"], metrics["settings"])
    result |= timings(lines, result["batch"])
    return {
        "kit": "versions" in metrics,  # which the script alone does not note
        "whole_s": whole,
        "start_to_first_step_s": loaded + result["first_step_s"],  # without the readings in between
        "reading": {"rows": metrics["rows"], "seconds": lines[read][0] - lines[read - 1][0]},
        **result,
    }


def apart(losses, others):
    """How far losses are apart at most, at any step, as a share."""
    return max(abs(one - other) / other for one, other in zip(losses, others, strict=True))
