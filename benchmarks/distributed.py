"""Times finetune_qwen_vl.py on one GPU and on all of this machine's; writes distributed.json and distributed.md.

usage: python benchmarks/distributed.py [--model NAME] [--dataset NAME] [--output FOLDER] [--processes N] [--steps 15]

torchrun starts the script as one process, and as one for each GPU: with the same samples a step, then with the same
samples per GPU. Each reads 64 held-out images. Without a GPU it does so with the demo's model, in two processes, which
shows only that everything works.
"""

import argparse
import json
import math
import os
import sys
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from runs import ROOT, apart, recipe, whole_run

# Samples at once on each GPU, and whether their activations are recomputed: those of 32, kept, take more than 80 GB.
LOADS = {"8 per GPU": (8, False), "32 per GPU": (32, True)}
ALIKE = "the same samples a step"


def table(results):
    """The results as Markdown."""
    one, all_ = results["one"], results["all"]
    text = [
        f"{results['date']}, {results['hardware']}, torch {results['versions']['torch']}, model {results['model']}.",
        "",
        f"| | 1 process | {results['processes']} processes | times faster | peak memory of a GPU |",
        "|---|---|---|---|---|",
    ]
    for name in [name for name in LOADS if name in one]:
        speeds = [run[name]["samples_per_s"] for run in (one, all_)]
        peaks = " and ".join(f"{run[name]['peak_gib']:.1f} GiB" for run in (one, all_) if run[name]["peak_gib"])
        shown = [*(f"{speed:.1f}/s" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}", peaks or "-"]
        text.append(f"| {name}, trained | {' | '.join(shown)} |")
    seconds = [run["reading"]["seconds"] for run in (one, all_)]
    shown = [*(f"{64 / second:.1f}/s" for second in seconds), f"{seconds[0] / seconds[1]:.2f}", "-"]
    text.append(f"| 64 images read | {' | '.join(shown)} |")
    for what in ("losses", "gradient_norms"):
        first, then = one[ALIKE][what], all_[ALIKE][what]
        what = what.replace("_", " ").capitalize()
        text += ["", f"{what} with {ALIKE}: at most {apart(then, first):.3%} apart at each of {len(first)} steps."]
    return "\n".join(text) + "\n"


gpus = torch.cuda.device_count()
parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub name or a folder")
parser.add_argument("--dataset", help="a hub name or a folder, with the columns image and text")
parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark")
parser.add_argument("--processes", type=int, default=gpus or 2, help="in the second runs (default: one for each GPU)")
parser.add_argument("--steps", type=int, default=15)
options = parser.parse_args()
options.output = options.output.resolve()
options.output.mkdir(parents=True, exist_ok=True)
os.chdir(ROOT)
if gpus or options.model:
    options.model = options.model or "unsloth/Qwen2-VL-7B-Instruct-bnb-4bit"
    options.dataset = options.dataset or "unsloth/LaTeX_OCR"
else:
    del LOADS["32 per GPU"]


@cache
def run(processes, batch, size, recompute):
    layout = ("--batch_size", batch, "--per_device_train_batch_size", size, "--gradient_checkpointing", recompute)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    more = ("--max_steps", options.steps, "--num_test_rows", 64)
    return whole_run(*recipe(options), *more, *layout, launcher=launcher)


results = {
    "date": date.today().isoformat(),
    "hardware": f"{gpus} x {torch.cuda.get_device_name()}" if gpus else f"{os.cpu_count()} CPU cores",
    "model": options.model or "demo/model",
    "processes": options.processes,
    "versions": {name: version(name) for name in ["torch", "trl", "accelerate"] + ["unsloth"] * bool(gpus)},
}
samples = math.lcm(8, options.processes)
for which, processes in (("one", 1), ("all", options.processes)):
    result = results[which] = {ALIKE: run(processes, samples, 8 if processes == 1 else samples // processes, False)}
    result["reading"] = result[ALIKE]["reading"]
    for name, (size, recompute) in LOADS.items():
        result[name] = run(processes, size * processes, size, recompute)
        (options.output / "distributed.json").write_text(json.dumps(results, indent=1) + "\n")
(options.output / "distributed.md").write_text(table(results))
print(table(results))
