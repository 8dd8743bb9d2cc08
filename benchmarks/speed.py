"""Times finetune_qwen_vl.py, with the kit and alone, and the usual recipe; writes speed.json and speed.md.

usage: python benchmarks/speed.py [--model NAME] [--dataset NAME] [--output FOLDER] [--steps 30] [--stock_steps 10]
                                  [--parts kit alone layouts fp16 stock]

Without a GPU it takes the demo's model and data, which shows only that everything works. Some `--parts` alone are added
to what the output folder holds.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from runs import ROOT, SCRIPT, apart, lines_of, recipe, timings, whole_run


def kit(options, save):
    save(whole_run(*options.arguments))


def alone(options, save):
    result = whole_run(*options.arguments, script=Path(shutil.copy(SCRIPT, tempfile.mkdtemp())))
    save(result if not result["kit"] else {"failed": "qwen_vl_kit is installed: this was not alone"})


def fp16(options, save):
    save(whole_run(*options.arguments, "--fp16", "true", "--num_test_rows", 4))


def layouts(options, save):
    results, lines = {}, []
    for second, line in lines_of([sys.executable, "benchmarks/layouts.py", str(options.steps), *options.arguments]):
        lines.append((second, line))
        if line.startswith("RESULT "):
            for name, result in json.loads(line.removeprefix("RESULT ")).items():
                results[name] = {**result, **timings(lines, result["batch"])} if "losses" in result else result
            save(results)
            lines = []


def stock(options, save):
    arguments = [options.model or "demo/model", options.dataset or "demo/data", str(options.stock_steps)]
    command = [sys.executable, "benchmarks/stock_recipe.py", *arguments]
    save(json.loads([line for _, line in lines_of(command)][-1]))


PARTS = {part.__name__: part for part in (kit, alone, layouts, fp16, stock)}


def table(results):
    """The results as Markdown."""
    columns = [results.get(name, {}) for name in ("kit", "alone", "stock")]
    steps, title = max(len(column.get("losses", ())) for column in columns), ""
    if "stock" in results:  # which takes fewer steps
        usual = columns[-1] = dict(results["stock"])
        title = f" (the usual recipe's: from {usual['steps']})"
        usual["train_s"] = usual["first_step_s"] + (steps - 1) * usual["step_s"]

    def shown(value, unit="s"):
        return f"{value:.2f} {unit}" if isinstance(value, float) else "-"

    def layout(run):
        size, times, recompute = run["layout"]
        return f"{size} x {times}, {'recomputed' if recompute else 'kept'}"

    lines = {
        f"{steps} steps{title}": ("train_s", "s"),
        "step after the first, 8 samples": ("step_s", "s"),
        "first step": ("first_step_s", "s"),
        "start of Python to end of first step, without readings": ("start_to_first_step_s", "s"),
        "all, with reading 64 images before and after": ("whole_s", "s"),
        "peak memory": ("peak_gib", "GiB"),
    }
    text = [
        f"{results['date']}, {results['hardware']}, torch {results['versions']['torch']}, model {results['model']}.",
        "",
        "| | with the kit | the script alone | the usual recipe |",
        "|---|---|---|---|",
        *(
            f"| {what} | {' | '.join(shown(column.get(name), unit) for column in columns)} |"
            for what, (name, unit) in lines.items()
        ),
        "",
        "| | layout | step | samples/s | peak memory |",
        "|---|---|---|---|---|",
    ]
    runs = {name: results[name] for name in ("kit", "alone", "fp16") if name in results} | results.get("layouts", {})
    for name, run in runs.items():
        if "layout" in run:
            numbers = [shown(run["step_s"]), f"{run['samples_per_s']:.1f}", shown(run["peak_gib"], "GiB")]
            text.append(f"| {name} | {layout(run)} | {' | '.join(numbers)} |")
        elif "failed" in run:
            text.append(f"| {name} | {run['failed']} | | | |")
    if "reading" in runs:
        reading = runs["reading"]
        text += ["", f"Reading 64 images, up to 128 tokens each: {reading['reading_64_s']:.1f} s. "
                 f"Collating 8 samples: {reading['collating_8_s'] * 1000:.0f} ms."]  # fmt: skip
    ours = runs.get("kit", {})
    for name, what in (("alone", "by the script alone"), ("usual computation", "computed by PEFT's own layers")):
        if "losses" in ours and "losses" in runs.get(name, {}):
            text += ["", f"Losses of {layout(ours)}, and of {layout(runs[name])} {what}, on the same samples: at most "
                     f"{apart(ours['losses'], runs[name]['losses']):.2%} apart at each of {steps} steps."]  # fmt: skip
    if losses := runs.get("fp16", {}).get("losses"):
        text += ["", f"fp16: losses {'' if all(map(math.isfinite, losses)) else 'NOT '}finite at all {len(losses)} "
                 f"steps ({losses[0]:.2f} to {losses[-1]:.2f})."]  # fmt: skip
    return "\n".join(text) + "\n"


on_gpu = torch.cuda.is_available()
parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub name or a folder")
parser.add_argument("--dataset", help="a hub name or a folder, with the columns image and text")
parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--stock_steps", type=int, default=10)
parser.add_argument("--parts", nargs="+", choices=PARTS)
options = parser.parse_args()
options.output = options.output.resolve()
options.output.mkdir(parents=True, exist_ok=True)
os.chdir(ROOT)
if on_gpu or options.model:
    options.model = options.model or "unsloth/Qwen2-VL-7B-Instruct-bnb-4bit"
    options.dataset = options.dataset or "unsloth/LaTeX_OCR"
options.arguments = [*recipe(options), "--max_steps", str(options.steps), "--batch_size", "8", "--num_test_rows", "64"]
path = options.output / "speed.json"
results = json.loads(path.read_text()) if options.parts and path.exists() else {}
packages = ["torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"] + ["unsloth"] * on_gpu
results |= {
    "date": date.today().isoformat(),
    "hardware": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores",
    "model": options.model or "demo/model",
    "versions": {name: version(name) for name in packages},
}
failed = []
for part in options.parts or [part for part in PARTS if on_gpu or part != "fp16"]:

    def save(result, part=part):
        results[part] = result
        path.write_text(json.dumps(results, indent=1) + "\n")
        (options.output / "speed.md").write_text(table(results))

    try:
        PARTS[part](options, save)
    except subprocess.CalledProcessError:
        failed.append(part)
print(f"\n{table(results)}")
if failed:
    sys.exit(f"Did not run through, see above: {', '.join(failed)}")
