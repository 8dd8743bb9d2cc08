"""Times finetune_qwen_vl.py and the recipe that it replaces, side by side; writes speed.json and speed.md.

usage: python benchmarks/speed.py [--model NAME] [--dataset NAME] [--output FOLDER] [--steps 30] [--stock_steps 10]

On a GPU this took nine minutes with the model and the data there. Without one it takes the demo's model and data, which
shows only that everything works.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from cells import ROOT, Script

BEGUN = time.perf_counter()


def ours(options, save):
    """Measures the script; hands each result to `save` as soon as it is there."""
    script = Script(*options.script_arguments, "--max_steps", max(options.steps, 60), "--num_test_rows", 64)
    script.prepare()
    names, result = script.names, {}
    ready = time.perf_counter() - BEGUN
    default = result["default"] = script.train(options.steps)
    result["start_to_first_step_s"] = ready + default["first_step_s"]
    result["seconds_by_cell"] = {title.lower(): seconds for title, seconds in script.seconds.items()}
    save(result)

    names["longest"] = names["settings"].max_new_tokens = 128
    names["to_inference"](names["model"])
    started = time.perf_counter()
    names["read_test_set"]()
    result["reading_64_s"] = time.perf_counter() - started
    samples = [names["train_set"][row] for row in range(64)]
    started = time.perf_counter()
    for start in range(0, 64, 8):
        names["collate"](samples[start : start + 8])
    result["collating_8_s"] = (time.perf_counter() - started) / 8
    save(result)

    for effective in (32, 64) if script.cuda else (16,):
        result[f"batch_{effective}"] = script.train(6, effective)
        save(result)
    for limit in (24, 16, 8) if script.cuda else ():
        result[f"limit_{limit}_gib"] = script.train(6, limit_gib=limit)
        save(result)
    script.unfuse()
    result["usual_computation"] = script.train(options.steps, splits=[(2, 4, False)])
    save(result)


def half(options, save):
    """Trains in fp16, as GPUs without bf16 do."""
    script = Script(*options.script_arguments, "--fp16", "true", "--max_steps", 60, "--num_test_rows", 4)
    script.prepare()
    save(script.train(options.steps))


def table(results):
    """The results as Markdown."""
    one, stock, half = results["ours"], results.get("stock", {}), results.get("fp16", {})
    usual, default = one.get("usual_computation", {}), one["default"]

    def shown(value, unit):
        return f"{value:.2f} {unit}" if isinstance(value, float) else "-"

    def split(run):
        size, times, recompute = run["split"]
        return f"{size} x {times}, {'recomputed' if recompute else 'kept'}"

    steps = len(default["losses"])
    lines = [
        ("step after the first, 8 samples", default["step_s"], stock.get("step_s"), "s"),
        ("first step", default["first_step_s"], stock.get("first_step_s"), "s"),
        ("start of Python to end of first step", one["start_to_first_step_s"], stock.get("start_to_first_step_s"), "s"),
        ("peak memory", default["peak_gib"], stock.get("peak_gib"), "GiB"),
    ]  # fmt: skip
    if stock:
        estimate = stock["first_step_s"] + (steps - 1) * stock["step_s"]
        lines.insert(
            0, (f"{steps} steps (the usual recipe's: from {stock['steps']})", default["train_s"], estimate, "s")
        )
    text = [
        f"{results['date']}, {results['hardware']}, torch {results['versions']['torch']}, model {results['model']}.",
        "",
        "| | this script | the usual recipe |",
        "|---|---|---|",
        *(f"| {what} | {shown(ours, unit)} | {shown(theirs, unit)} |" for what, ours, theirs, unit in lines),
        "",
        "| this script | split | step | samples/s | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, run in one.items():
        if isinstance(run, dict) and "split" in run:
            memory = shown(run["peak_gib"], "GiB")
            name = name.replace("_", " ")
            text.append(f"| {name} | {split(run)} | {run['step_s']:.2f} s | {run['samples_per_s']:.1f} | {memory} |")
        elif isinstance(run, dict) and "failed" in run:
            text.append(f"| {name} | {run['failed']} | | | |")
    if "reading_64_s" in one:
        text += ["", f"Reading 64 images, up to 128 tokens each: {one['reading_64_s']:.1f} s. "
                 f"Collating 8 samples: {one['collating_8_s'] * 1000:.0f} ms."]  # fmt: skip
    if usual.get("losses"):
        pairs = list(zip(default["losses"], usual["losses"], strict=True))
        apart = max(abs(one - other) / other for one, other in pairs)
        text += ["", f"Losses of {split(default)}, and of {split(usual)}, computed by PEFT's own layers, on the same "
                 f"samples: at most {apart:.2%} apart at each of {len(pairs)} steps."]  # fmt: skip
    if half.get("losses"):
        finite = all(map(math.isfinite, half["losses"]))
        text += ["", f"fp16: {len(half['losses'])} steps of {half['step_s']:.2f} s, losses {'' if finite else 'NOT '}"
                 f"finite ({half['losses'][0]:.2f} to {half['losses'][-1]:.2f})."]  # fmt: skip
    return "\n".join(text) + "\n"


parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub name or a folder")
parser.add_argument("--dataset", help="a hub name or a folder, with the columns image and text")
parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--stock_steps", type=int, default=10)
parser.add_argument("--part", choices=["ours", "fp16"], help=argparse.SUPPRESS)
options = parser.parse_args()
os.chdir(ROOT)
options.output = options.output.resolve()
options.output.mkdir(parents=True, exist_ok=True)
if options.part:
    path = options.output / f"{options.part}.json"
    scratch = tempfile.mkdtemp()
    model = ["--model_name_or_path", options.model] if options.model else ["--config", "demo/config.yaml"]
    data = ["--dataset_name", options.dataset] if options.dataset else []
    options.script_arguments = [*model, *data, "--output_dir", scratch]
    measure = ours if options.part == "ours" else half
    measure(options, lambda result: path.write_text(json.dumps(result)))
    sys.exit()

import torch  # noqa: E402 (the parts above time this themselves)

on_gpu = torch.cuda.is_available()
if on_gpu:
    options.model = options.model or "unsloth/Qwen2-VL-7B-Instruct-bnb-4bit"
    options.dataset = options.dataset or "unsloth/LaTeX_OCR"
results = {
    "date": date.today().isoformat(),
    "hardware": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores",
    "model": options.model or "demo/model",
}
named = ["--model", options.model] * bool(options.model) + ["--dataset", options.dataset] * bool(options.dataset)
common = [sys.executable, __file__, *named, "--output", str(options.output), "--steps", str(options.steps)]
subprocess.run([*common, "--part", "ours"], check=False)
if on_gpu:
    subprocess.run([*common, "--part", "fp16"], check=False)
stock = [options.model or "demo/model", options.dataset or "demo/data", str(options.stock_steps)]
ended = subprocess.run([sys.executable, "benchmarks/stock_recipe.py", *stock], stdout=subprocess.PIPE, text=True)
if ended.returncode == 0:
    results["stock"] = json.loads(ended.stdout.strip().splitlines()[-1])
for part in ("ours", "fp16"):
    path = options.output / f"{part}.json"
    if path.exists():
        results[part] = json.loads(path.read_text())
        path.unlink()
packages = ["torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"] + ["unsloth"] * on_gpu
results["versions"] = {name: version(name) for name in packages}
(options.output / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
if "ours" not in results:
    sys.exit("The script did not run through; see above.")
(options.output / "speed.md").write_text(table(results))
print(table(results))
