"""Running out of memory, and the benchmark."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, SHORT, run

# A GPU that can't take more than 4 samples at once, nor, once it has done three steps, more than 2.
SHORT_OF_MEMORY = """
import runpy
import torch
import transformers

step = transformers.Trainer.training_step

def training_step(self, model, inputs, *arguments, **options):
    loss = step(self, model, inputs, *arguments, **options)
    if len(inputs["input_ids"]) > (4 if self.state.global_step < 3 else {then}):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return loss

transformers.Trainer.training_step = training_step
runpy.run_path("finetune_qwen_vl.py", run_name="__main__")
"""


def run_short_of_memory(*arguments, then=2):
    command = [sys.executable, "-c", SHORT_OF_MEMORY.replace("{then}", str(then)), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def losses(folder):
    log = json.loads((folder / "metrics.json").read_text())["train"]["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_out_of_memory_goes_on_with_a_smaller_split_and_learns_the_same(tmp_path):
    options = (*SHORT, "--max_steps", 6, "--save_strategy", "no", "--output_dir")
    assert run(*options, tmp_path / "whole").returncode == 0
    ended = run_short_of_memory(*options, tmp_path / "short")
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = [line for line in ended.stdout.splitlines() if line.startswith(("Training ", "That takes more memory"))]
    assert [line for line in said if line.startswith("Training")] == [
        "Training 8 x 1 samples a step, activations kept: the fastest",
        "Training 4 x 2 samples a step, activations kept: the fastest that fits",
        "Training 8 x 1 samples a step, activations recomputed: the fastest that fits",
        "Training 4 x 2 samples a step, activations recomputed: the fastest that fits",
        "Training 2 x 4 samples a step, activations recomputed: the fastest that fits",
    ]
    assert len(said) == 9
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    metrics = json.loads((tmp_path / "short" / "metrics.json").read_text())
    settings, train = metrics["settings"], metrics["train"]
    assert settings["per_device_train_batch_size"] == 2 and settings["gradient_accumulation_steps"] == 4
    assert train["train_samples_per_second"] == pytest.approx(6 * 8 / train["train_runtime"])


def test_out_of_memory_in_the_last_split_is_one_sentence(tmp_path):
    ended = run_short_of_memory(*SHORT, "--max_steps", 4, "--output_dir", tmp_path, then=0)
    assert ended.returncode == 1
    assert "The memory does not suffice for a training step" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "metrics.json").exists()


def test_the_benchmark_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/speed.py", "--steps", "4", "--stock_steps", "3", "--output", tmp_path]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = json.loads((tmp_path / "speed.json").read_text())
    assert len(results["ours"]["default"]["losses"]) == 4 and len(results["stock"]["losses"]) == 3
    usual = results["ours"]["usual_computation"]
    assert usual["split"] == [2, 4, False]
    assert usual["losses"] == pytest.approx(results["ours"]["default"]["losses"], rel=1e-3)
    table = (tmp_path / "speed.md").read_text()
    assert "| step after the first, 8 samples |" in table and table in ended.stdout
