"""Running out of memory, and the benchmark."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SHORT, run, run_changed

# A GPU that can't take more than 4 samples at once, nor, once it has done three steps, more than 2.
SHORT_OF_MEMORY = """
import torch
import transformers

step = transformers.Trainer.training_step

def training_step(self, model, inputs, *arguments, **options):
    loss = step(self, model, inputs, *arguments, **options)
    if len(inputs["input_ids"]) > (4 if self.state.global_step < 3 else {then}):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return loss

transformers.Trainer.training_step = training_step
"""


def run_short_of_memory(*arguments, then=2):
    return run_changed(SHORT_OF_MEMORY.replace("{then}", str(then)), *arguments)


def losses(folder):
    log = json.loads((folder / "metrics.json").read_text())["train"]["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_out_of_memory_resumes_with_the_next_layout_and_learns_the_same(tmp_path):
    options = (*SHORT, "--max_steps", 6, "--save_strategy", "no", "--output_dir")
    assert run(*options, tmp_path / "whole").returncode == 0
    ended = run_short_of_memory(*options, tmp_path / "short")
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = [line for line in ended.stdout.splitlines() if line.startswith(("Training ", "Not enough memory"))]
    assert said[::2] == [
        f"Training 6 steps of 8 samples ({layout})"
        for layout in (
            "8 x 1 per device, activations kept",
            "4 x 2 per device, activations kept",
            "8 x 1 per device, activations recomputed",
            "4 x 2 per device, activations recomputed",
            "2 x 4 per device, activations recomputed",
        )
    ]
    assert said[1::2] == ["Not enough memory for that; trying the next fastest way:"] * 4
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    metrics = json.loads((tmp_path / "short" / "metrics.json").read_text())
    settings, train = metrics["settings"], metrics["train"]
    assert settings["per_device_train_batch_size"] == 2 and settings["gradient_accumulation_steps"] == 4
    assert train["train_samples_per_second"] == pytest.approx(6 * 8 / train["train_runtime"])


def test_out_of_memory_in_the_last_layout_is_one_sentence(tmp_path):
    ended = run_short_of_memory(*SHORT, "--max_steps", 4, "--output_dir", tmp_path, then=0)
    assert ended.returncode == 1
    assert "There is not enough GPU memory for a training step" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "metrics.json").exists()


def test_the_benchmark_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/speed.py", "--steps", "4", "--stock_steps", "3", "--output", tmp_path]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = json.loads((tmp_path / "speed.json").read_text())
    kit, alone, usual = results["kit"], results["alone"], results["layouts"]["usual computation"]
    assert len(kit["losses"]) == 4 and len(results["stock"]["losses"]) == 3
    assert kit["kit"] and not alone["kit"]
    assert alone["losses"] == kit["losses"]
    assert usual["layout"] == [2, 4, False]
    assert usual["losses"] == pytest.approx(kit["losses"], rel=1e-3)
    table = (tmp_path / "speed.md").read_text()
    assert "| step after the first, 8 samples |" in table and table in ended.stdout


def test_the_benchmark_of_models_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/models.py", "--steps", "3", "--models", "Qwen3-VL-4B", "--output", tmp_path]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads((tmp_path / "models.json").read_text())["Qwen3-VL-4B"]
    assert len(result["losses"]) == 3 and result["layout"] == [8, 1, False]
    assert "| Qwen3-VL-4B | 0.00 billion | 8 x 1, kept |" in (tmp_path / "models.md").read_text()


def test_the_benchmark_of_peers_runs_the_script_on_a_cpu_and_leaves_out_who_is_not_installed(tmp_path):
    command = [sys.executable, "benchmarks/peers.py", "--steps", "3", "--output", tmp_path, "--lora_r", "8"]
    command += ["--runs", "ours", "swift-tuned", "--swift", sys.executable, tmp_path]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    runs = json.loads((tmp_path / "peers.json").read_text())["runs"]
    assert len(runs["ours"]["losses"]) == 3 and len(runs["ours"]["steps_s"]) == 2
    assert runs["ours"]["layout"] == [8, 1, False] and "failed" not in runs["ours"]
    assert runs["swift-tuned"] == {"failed": "not installed, left out"}
    table = (tmp_path / "peers.md").read_text()
    assert "ms-swift, tuned by hand: not installed, left out." in table and table in ended.stdout


def test_the_profile_of_a_step_runs_on_a_cpu_and_counts_what_a_trace_holds(tmp_path):
    command = [sys.executable, "benchmarks/profile_step.py", "--batches", "8", "--warmup", "3", "--steps", "1"]
    ended = subprocess.run([*command, "--output", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    run = json.loads((tmp_path / "profile.json").read_text())["batches"]["8"]
    assert run["step_s"] > 0 and run["kernels"] == run["gpu_busy_s"] == 0
    assert "| 8 | 8 x 1, kept |" in (tmp_path / "profile.md").read_text() and "no GPU kernels" in ended.stdout

    add = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, x>(int, x)"
    spans = [("kernel", add, 0, 40), ("kernel", "gemm", 20, 40), ("gpu_memcpy", "Memcpy HtoD", 100, 20)]
    spans += [("cuda_runtime", name, 0, 5) for name in ("cudaLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync")]
    events = [{"ph": "X", "cat": kind, "name": name, "ts": ts, "dur": dur} for kind, name, ts, dur in spans]
    (tmp_path / "trace").write_text(json.dumps({"traceEvents": events}))
    code = "import json, profile_step; print(json.dumps(profile_step.count('trace', 2)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    numbers, kernels = json.loads(ended.stdout)
    assert numbers == {"gpu_busy_s": 4e-5, "kernels": 1, "copies": 0.5, "launches": 0.5, "graph_launches": 0.5}
    assert kernels["vectorized_elementwise_kernel CUDAFunctor_add"] == [40, 1] and len(kernels) == 3
