"""Times finetune_qwen_vl.py on one GPU and on all of this machine's; writes distributed.json and distributed.md.

usage: python benchmarks/distributed.py [--model NAME] [--dataset NAME] [--output FOLDER] [--processes N] [--steps 15]

torchrun starts the script's cells twice: as one process, and as one for each GPU. Both train with the same samples a
step, then with the same samples a GPU, and read 64 held-out images. Without a GPU it does so with the demo's model, in
two processes, which shows only that everything works.
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

# Samples at once on each GPU, and whether their activations are recomputed: those of 32, kept, take more than 80 GB.
LOADS = {"8 a GPU": (8, False), "32 a GPU": (32, True)}


def measure(options):
    """What each process does. The first one writes the results, as soon as they are there."""
    model = ["--model_name_or_path", options.model] if options.model else ["--config", "demo/config.yaml"]
    data = ["--dataset_name", options.dataset] if options.dataset else []
    samples = math.lcm(8, options.processes)
    rows = ["--per_device_train_batch_size", samples, "--max_steps", 32 * options.steps * options.processes // samples]
    script = Script(*model, *data, *rows, "--num_test_rows", 64, "--output_dir", tempfile.mkdtemp())
    script.prepare()
    names = script.names
    processes, result = names["training_args"].world_size, {}

    def save():
        if names["training_args"].process_index == 0:
            (options.output / f"{processes}.json").write_text(json.dumps(result))

    alike = (8, samples // 8, False) if processes == 1 else (samples // processes, 1, False)
    runs = {"the same samples a step": (samples, alike)}
    runs |= {name: (size * processes, (size, 1, recompute)) for name, (size, recompute) in LOADS.items()}
    for name, (effective, split) in runs.items():
        result[name] = script.train(options.steps, effective, [split])
        result[name]["peak_gib"] = names["gather_object"]([result[name].get("peak_gib")])
        save()
    names["longest"] = names["settings"].max_new_tokens = 128
    names["to_inference"](names["model"])
    started = time.perf_counter()
    readings = names["read_test_set"]()
    result["reading"] = {"rows": len(readings), "step_s": time.perf_counter() - started}
    save()
    names["training_args"].distributed_state.destroy_process_group()


def table(results):
    """The results as Markdown."""
    one, all_ = results["one"], results["all"]
    text = [
        f"{results['date']}, {results['hardware']}, torch {results['versions']['torch']}, model {results['model']}.",
        "",
        f"| | 1 process | {results['processes']} processes | times faster | peak memory of each, GiB |",
        "|---|---|---|---|---|",
    ]
    for name in [*LOADS, "reading"]:
        first, then = one.get(name, {}), all_.get(name, {})
        if "step_s" not in first or "step_s" not in then:
            text.append(f"| {name} | {first.get('failed', '')} | {then.get('failed', '')} | | |")
            continue
        speeds = [run["rows"] / run["step_s"] if name == "reading" else run["samples_per_s"] for run in (first, then)]
        peaks = [", ".join(f"{gib:.1f}" for gib in run.get("peak_gib", ()) if gib) or "-" for run in (first, then)]
        kind = "64 images read, 128 tokens" if name == "reading" else f"{name}, trained"
        shown = [*(f"{speed:.1f}/s" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}", " and ".join(peaks)]
        text.append(f"| {kind} | {' | '.join(shown)} |")
    name = "the same samples a step"
    for what in ("losses", "gradient_norms"):
        pairs = [*zip(one.get(name, {}).get(what, ()), all_.get(name, {}).get(what, ()), strict=False)]
        if pairs:
            apart = max(abs(first - then) / first for first, then in pairs)
            what = what.replace("_", " ").capitalize()
            text += ["", f"{what} with {name}: at most {apart:.3%} apart at each of {len(pairs)} steps."]
    return "\n".join(text) + "\n"


parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub name or a folder")
parser.add_argument("--dataset", help="a hub name or a folder, with the columns image and text")
parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmark")
parser.add_argument("--processes", type=int, help="how many in the second run (default: one for each GPU)")
parser.add_argument("--steps", type=int, default=15)
parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
options = parser.parse_args()
os.chdir(ROOT)
options.output = options.output.resolve()
options.output.mkdir(parents=True, exist_ok=True)
if options.part:
    measure(options)
    sys.exit()

import torch  # noqa: E402 (the processes import it after Unsloth)

gpus = torch.cuda.device_count()
options.processes = options.processes or gpus or 2
if gpus:
    options.model = options.model or "unsloth/Qwen2-VL-7B-Instruct-bnb-4bit"
    options.dataset = options.dataset or "unsloth/LaTeX_OCR"
named = ["--model", options.model] * bool(options.model) + ["--dataset", options.dataset] * bool(options.dataset)
named += ["--processes", str(options.processes), "--steps", str(options.steps), "--output", str(options.output)]
results = {
    "date": date.today().isoformat(),
    "hardware": f"{gpus} x {torch.cuda.get_device_name()}" if gpus else f"{os.cpu_count()} CPU cores",
    "model": options.model or "demo/model",
    "processes": options.processes,
    "versions": {name: version(name) for name in ["torch", "trl", "accelerate"] + ["unsloth"] * bool(gpus)},
}
for which, count in (("one", 1), ("all", options.processes)):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    subprocess.run([*launcher, __file__, "--part", *named], check=False)
    path = options.output / f"{count}.json"
    if not path.exists():
        sys.exit(f"{count} processes did not run through; see above.")
    results[which] = json.loads(path.read_text())
    path.unlink()
    (options.output / "distributed.json").write_text(json.dumps(results, indent=1) + "\n")
(options.output / "distributed.md").write_text(table(results))
print(table(results))
