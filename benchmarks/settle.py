"""Settles by experiment what to set: image area, spelling, batch size, rank and learning rate, with a model that reads.

Usage: python benchmarks/settle.py demo/model PRINTED HANDWRITTEN OUT --seconds 500 --at_once 8 [--only REGEX] [--tiny]

PRINTED and HANDWRITTEN are data sets in folders, with data/train-*.parquet and data/test-*.parquet in each. All
experiments are runs of finetune_qwen_vl.py, several at once, the most important first; OUT/settle.json has the results
of those that have ended, whenever one looks.
"""

import argparse
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet
from PIL import Image
from runs import ROOT, SCRIPT

sys.path.insert(0, str(ROOT))
from qwen_vl_kit import latex  # noqa: E402

SEED = 3407
BASE = {"batch_size": 32, "min_pixels": 784, "lora_r": 16, "lora_alpha": 16, "warmup_steps": 20, "seed": SEED}
BASES = {
    "hand": BASE | {"max_steps": 300, "learning_rate": 2e-3, "max_pixels": 9000, "num_test_rows": 108},
    "printed": BASE | {"max_steps": 200, "learning_rate": 1e-3, "num_test_rows": 250},
}
COMMON = {"save_strategy": "no", "disable_tqdm": "true", "test_batch_size": 128}
TINY = {"max_steps": 2, "num_test_rows": 4, "batch_size": 4, "warmup_steps": 0, "max_new_tokens": 16}
BOTH = ("cer", "normalized_cer", "exact_match", "formula_match")  # the scores that are noted, before and after


def image_area(folder):
    """The area that is typical for the held-out images of a data set in a folder, in pixels."""
    areas = []
    for file in sorted(Path(folder, "data").glob("test-*.parquet")):
        for image in pyarrow.parquet.read_table(file, columns=["image"])["image"].to_pylist():
            width, height = Image.open(io.BytesIO(image["bytes"])).size
            areas.append(width * height)
    return statistics.median(areas)


def compact(text):
    """A formula without the spaces that LaTeX doesn't need; as it is, where that would change its tokens."""
    short = ""
    for token in latex.tokens(text):
        needed = re.search(r"\\[A-Za-z]+$", short) and token[0].isalpha()
        short += f" {token}" if needed else token
    return short if latex.tokens(short) == latex.tokens(text) else text


def without_spaces(folder, target):
    """Writes a data set in a folder again, to `target`, its formulas compact."""
    for file in sorted(Path(folder, "data").glob("*.parquet")):
        table = pyarrow.parquet.read_table(file)
        texts = pyarrow.array(map(compact, table["text"].to_pylist()))
        table = table.set_column(table.schema.get_field_index("text"), "text", texts)
        Path(target, "data").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, target / "data" / file.name)


def experiments(area):
    """Yields (group, name, data set, what is unlike its base), the most important first.

    `area` is that of printed images. At the end come the same with another seed.
    """
    first = [
        ("long", "long", "hand", {"lora_r": 64, "lora_alpha": 64, "max_steps": 900}),
        ("batch", "8", "hand", {"batch_size": 8, "max_steps": 1200}),  # takes long, too
        ("base", "hand", "hand", {}),
        ("base", "printed", "printed", {}),
        ("spelling", "compact", "compact", {}),
        *(("area", f"{times}", "printed", {"min_pixels": round(times * area)}) for times in (2, 3, 4)),
        *(("rank", f"{rank}", "hand", {"lora_r": rank}) for rank in (64, 8, 32)),
        *(("rate", f"{rate:g}", "hand", {"learning_rate": rate}) for rate in (1e-3, 4e-3, 5e-4, 8e-3)),
        *(("pixels", f"{area}", "hand", dict.fromkeys(("min_pixels", "max_pixels"), area)) for area in (36000, 18000)),
        ("batch", "16", "hand", {"batch_size": 16, "max_steps": 600}),
        ("batch", "64", "hand", {"batch_size": 64, "max_steps": 150}),
        ("base", "hand", "hand", {"seed": 1}),
        ("base", "hand", "hand", {"seed": 2}),
        ("base", "printed", "printed", {"seed": 1}),
        ("spelling", "compact", "compact", {"seed": 1}),
        ("rank", "64, alpha 64", "hand", {"lora_r": 64, "lora_alpha": 64}),
        ("pixels", "9000", "hand", {"min_pixels": 9000}),
        *(("printed rate", f"{rate:g}", "printed", {"learning_rate": rate}) for rate in (3e-3, 3e-4)),
    ]
    yield from first
    once = [one for one in first if one[0] not in ("long", "base", "spelling") and one[:2] != ("batch", "8")]
    for group, name, data, options in once:
        yield group, name, data, options | {"seed": 1}
    yield "spelling", "uniform", "printed", {"normalize_latex": "true"}


def noted(outputs):
    """What metrics.json says of a run that has ended."""
    metrics = json.loads(Path(outputs, "metrics.json").read_text(encoding="utf-8"))
    train, seen = metrics["train"], {}
    for name in BOTH:
        seen[name] = {when: metrics[when].get(name) for when in ("before", "after")}
    steps = [entry for entry in train["log"] if "loss" in entry]
    losses = [entry["loss"] for entry in steps[-20:]]
    return seen | {
        "rows": metrics["rows"],
        "difference": {name: metrics["difference"].get(name) for name in BOTH},
        "train_s": train["train_runtime"],
        "samples_per_s": train["train_samples_per_second"],
        "samples": train["samples"],
        "tokens": steps[-1].get("num_tokens"),
        "last_losses": sum(losses) / len(losses),
        "peak_memory_gb": train.get("peak_memory_gb"),
        "hardware": metrics["hardware"],
    }


class Run:
    """One experiment under way."""

    def __init__(self, number, experiment, model, folders, scratch, gpu, tiny):
        self.group, self.name, data, self.different = experiment
        options = BASES["printed" if data == "compact" else data] | self.different | (TINY if tiny else {})
        label = re.sub(r"\W+", "-", f"{number:02} {self.group} {self.name} {options['seed']}")
        self.outputs, self.log = scratch / label, scratch / "logs" / f"{label}.log"
        self.noted = {"group": self.group, "name": self.name, "data": data, "seed": options["seed"]}
        self.noted |= {"different": self.different, "options": options}
        options = {"model_name_or_path": model, "dataset_name": folders[data], "output_dir": self.outputs} | options
        words = [str(word) for name, value in (COMMON | options).items() for word in (f"--{name}", value)]
        environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        self.gpu, self.started = gpu, time.monotonic()
        with open(self.log, "w", encoding="utf-8") as log:
            how = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
            command = [sys.executable, str(SCRIPT), *words]
            self.process = subprocess.Popen(command, **how, start_new_session=True)

    def end(self):
        """Ends it, if it hasn't ended, with all that it has started. Returns what is to be noted."""
        code = self.process.poll()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        result = self.noted | {"finished": code == 0, "rc": code, "whole_s": time.monotonic() - self.started}
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if code == 0:
            result |= noted(self.outputs)
        else:
            result |= {"steps": text.count("{'loss'"), "tail": text[-1500:]}
        shutil.rmtree(self.outputs, ignore_errors=True)
        said = f"CER {result['cer']['before']:.3f} -> {result['cer']['after']:.3f}" if code == 0 else f"rc {code}"
        print(f"{self.group} {self.name}, seed {self.noted['seed']}: {said}, {result['whole_s']:.0f} s", flush=True)
        return result


def settle(todo, at_once, seconds, gpus, start, write):
    """Runs `todo`, `at_once` at a time, for `seconds` at most. Calls `write` with all results after each end."""
    ends, results, running, number = time.monotonic() + seconds, [], [], 0
    try:
        while (todo or running) and time.monotonic() < ends:
            if todo and len(running) < at_once:
                gpu = min(gpus, key=[run.gpu for run in running].count) if gpus else ""
                running.append(start(number, todo.pop(0), gpu))
                number += 1
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                results.append(run.end())
                write(results, todo)
            time.sleep(0.5)
    finally:
        results += [run.end() for run in running]
        write(results, todo)


def stopped(*_):
    sys.exit("stopped")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "printed", "handwritten", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seconds", type=float, default=500, help="ends what still runs then")
    parser.add_argument("--at_once", type=int, default=6)
    parser.add_argument("--only", default="", help='regular expression on "GROUP NAME SEED", such as "^(rank|rate) "')
    parser.add_argument("--gpus", default="", help="0,1: spread over these in turn")
    parser.add_argument("--tiny", action="store_true", help="2 steps, 4 held-out rows, to see that it works")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stopped)
    options.out.mkdir(parents=True, exist_ok=True)
    area = image_area(options.printed)
    chosen = [
        one for one in experiments(area) if re.search(options.only, " ".join([*one[:2], str(one[3].get("seed", SEED))]))
    ]

    def write(results, todo):
        left = [{"group": group, "name": name, "different": different} for group, name, _, different in todo]
        record = {"printed_area": area, "at_once": options.at_once, "tiny": options.tiny}
        record |= {"results": results, "not_started": left}
        new = options.out / "settle.json.new"
        new.write_text(json.dumps(record, indent=1), encoding="utf-8")
        new.replace(options.out / "settle.json")

    with tempfile.TemporaryDirectory(prefix="settle") as scratch:
        scratch = Path(scratch)
        (scratch / "logs").mkdir()
        folders = {"printed": options.printed.resolve(), "hand": options.handwritten.resolve()}
        folders["compact"] = scratch / "compact"
        if any(data == "compact" for _, _, data, _ in chosen):
            without_spaces(options.printed, folders["compact"])
        gpus = [gpu for gpu in options.gpus.split(",") if gpu]

        def start(number, experiment, gpu):
            return Run(number, experiment, options.model.resolve(), folders, scratch, gpu, options.tiny)

        try:
            settle(chosen, options.at_once, options.seconds, gpus, start, write)
        finally:
            with tarfile.open(options.out / "logs.tar.gz", "w:gz") as logs:
                logs.add(scratch / "logs", "logs")


if __name__ == "__main__":
    main()
