"""Counts what the GPU does in an optimizer step of the script; writes profile.json, profile.md and kernels-BATCH.txt.

usage: python benchmarks/profile_step.py [--model NAME] [--dataset NAME] [--output FOLDER] [--batches 8 32] [--steps 3]
                                         [--warmup 8] [--limit SECONDS] [--OPTION VALUE ...]

For each batch size the script runs as people start it, with all other options given here; PyTorch's profiler looks at
`--steps` optimizer steps after the first `--warmup`. How long the GPU is busy and how much is launched does not depend
on how fast the machine's processor is. Without a GPU the demo's model runs, and there is nothing to count.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from runs import ROOT, SCRIPT, ended, recipe, watched

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # what the trace calls it
LAUNCH = re.compile(r"cudaLaunch(Cooperative)?Kernel|cuLaunch(Cooperative)?Kernel")
FOR_ANYTHING = re.compile("elementwise|multi_tensor|reduce|Kernel2")  # what such a kernel computes is in its types:
COMPUTED = re.compile(
    r"\b(?!gpu_|\w*(?:Unary|Binary)Functor)(?:\w*Functor\w*|\w+_(?:kernel|cuda)\w*|launch_\w+|\w+Ops|cutlass_\w+)"
)


def short_name(kernel):
    """A kernel's name without types, with what it computes if it is one of PyTorch's kernels for anything."""
    plain = re.sub(r"\((?:anonymous namespace|lambda[^)]*)\)", "", kernel.removeprefix("void ").split(" [clone")[0])
    named, _, types = plain.replace("(", "<", 1).partition("<")
    outer, computed = named.rpartition("::")[2].strip(), COMPUTED.search(types)
    return f"{outer} {computed[0]}" if computed and FOR_ANYTHING.search(outer) else outer


def busy(events):
    """The microseconds in which at least one of the events goes on."""
    total, until = 0.0, 0.0
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def count(trace, steps):
    """What a trace of so many steps holds, a step; and its kernels by short name, {name: [microseconds, times]}."""
    events = [event for event in json.loads(Path(trace).read_text())["traceEvents"] if event.get("ph") == "X"]
    work = [event for event in events if event.get("cat") in GPU_WORK]
    kernels = defaultdict(lambda: [0.0, 0])
    for event in work:
        name = short_name(event["name"]) if event["cat"] == "kernel" else event["name"]
        kernels[name][0] += event["dur"]
        kernels[name][1] += 1
    calls = [event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    numbers = {
        "gpu_busy_s": busy(work) / steps / 1e6,
        "kernels": sum(event["cat"] == "kernel" for event in work) / steps,
        "copies": sum(event["cat"] != "kernel" for event in work) / steps,
        "launches": sum(bool(LAUNCH.match(name)) for name in calls) / steps,
        "graph_launches": sum(name.startswith(("cudaGraphLaunch", "cuGraphLaunch")) for name in calls) / steps,
    }
    return numbers, kernels


def table_of_kernels(kernels, steps, rows=25):
    """The kernels that take most of the GPU's time, as text."""
    total = sum(time for time, _ in kernels.values()) or 1.0
    lines = [f"{'ms a step':>10} {'share':>6} {'times':>8}  kernel"]
    for name, (time, times) in sorted(kernels.items(), key=lambda item: -item[1][0])[:rows]:
        lines.append(f"{time / steps / 1e3:10.3f} {time / total:6.1%} {times / steps:8.1f}  {name}")
    return "\n".join(lines) + "\n"


def table(results):
    """The results as Markdown."""
    lines = [
        f"{results['hardware']}, torch {results['torch']}, model {results['model']}; each number is of one step.",
        "",
        "| samples | layout | step, not profiled | GPU busy | kernels | copies | launches | graph launches |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for batch, run in results["batches"].items():
        if "failed" in run:
            lines.append(f"| {batch} | {run['failed']} | | | | | | |")
            continue
        size, times, recomputed = run["layout"]
        layout = f"{size} x {times}, {'recomputed' if recomputed else 'kept'}"
        gpu = f"{run['gpu_busy_s']:.3f} s" if run["kernels"] else "no GPU kernels"
        counts = " | ".join(f"{run[name]:,.0f}" for name in ("kernels", "copies", "launches", "graph_launches"))
        lines.append(f"| {batch} | {layout} | {run['step_s']:.3f} s | {gpu} | {counts} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a hub name or a folder")
    parser.add_argument("--dataset", help="a hub name or a folder, with the columns image and text")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/benchmark")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--limit", type=float, help="seconds after which a run is ended")
    options, more = parser.parse_known_args()
    on_gpu = torch.cuda.is_available()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    if on_gpu or options.model:
        options.model = options.model or "unsloth/Qwen2-VL-7B-Instruct-bnb-4bit"
        options.dataset = options.dataset or "unsloth/LaTeX_OCR"
    else:
        print("There is no GPU: this runs the demo's model, to see that it works.")
    results = {
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "model": options.model or "demo/model",
        "batches": {},
    }
    for batch in options.batches:
        with tempfile.TemporaryDirectory() as folder:
            trace, clock, run = Path(folder, "trace.json"), Path(folder, "clock.json"), Path(folder, "run")
            environment = {"WATCH_PROFILE": trace, "WATCH_STEPS": f"{options.warmup + 1},{options.steps}"}
            how = {"batch_size": batch, "max_steps": options.warmup + options.steps, "num_test_rows": 1}
            how |= {"max_new_tokens": 1, "save_strategy": "no", "logging_steps": 1, "output_dir": run}
            command = [
                sys.executable,
                SCRIPT,
                *recipe(options),
                *(word for name, value in how.items() for word in (f"--{name}", value)),
            ]
            log = output / f"profile-{batch}.log"
            how_it_ended = ended([*command, *more], log, watched(clock, **environment), options.limit)
            if trace.exists():
                noted = json.loads(clock.read_text())
                ticks = noted["ticks"][: options.warmup]
                each = [after - before for before, after in zip(ticks, ticks[1:], strict=False)]
                counted, kernels = count(trace, options.steps)
                run = {"layout": noted["layout"], "step_s": statistics.median(each[2:] or each)} | counted
                text = table_of_kernels(kernels, options.steps)
                (output / f"kernels-{batch}.txt").write_text(text)
                print(f"{batch} samples a step:\n{text}")
            else:
                run = {"failed": f"{how_it_ended}, see {log.name}"}
        results["batches"][batch] = run
        (output / "profile.json").write_text(json.dumps(results, indent=1) + "\n")
        (output / "profile.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
