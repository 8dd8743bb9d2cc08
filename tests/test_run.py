"""The demo, as a user runs it, and what it leaves behind."""

import json
import os
import re

import pytest
from conftest import ROOT, SHORT, run
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The README's demo, in full: its output folder, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    ended = run("--config", "demo/config.yaml", "--output_dir", folder, timeout=1800)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder, ended.stdout


def test_the_demo_learns(demo):
    folder, _ = demo
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"before", "after", "train", "settings", "versions"}
    assert metrics["before"]["rows"] == metrics["after"]["rows"] == metrics["settings"]["num_test_rows"]
    assert metrics["after"]["cer"] < metrics["before"]["cer"] / 3
    assert metrics["after"]["exact_match"] > metrics["before"]["exact_match"] + 0.4
    losses = metrics["train"]["losses"]
    assert len(losses) == metrics["settings"]["max_steps"]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert metrics["train"]["train_samples_per_second"] > 0
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"} <= set(metrics["versions"])


def test_the_demo_leaves_an_adapter_with_its_processor(demo):
    folder, _ = demo
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (16, 16, 0, "none")
    assert config["base_model_name_or_path"] == "demo/model"
    names = load_file(folder / "adapter" / "adapter_model.safetensors")
    for layer in ("visual.blocks.0.attn.qkv", "visual.blocks.0.mlp.fc1", "layers.0.self_attn.q_proj", "mlp.down_proj"):
        assert any(layer in name for name in names), layer
    assert all(".lora_" in name for name in names), "more than the adapters was trained"
    assert (folder / "adapter" / "tokenizer.json").exists() and (folder / "adapter" / "processor_config.json").exists()
    assert Image.open(folder / "sample.png").size[0] > 0


def test_the_demo_shows_a_held_out_image_before_and_after(demo):
    _, printed = demo
    assert printed.count("true LaTeX: ") == printed.count("model reads: ") == 2
    truths = re.findall(r"true LaTeX: (.*)", printed)
    assert truths[0] == truths[1]
    assert re.search(r"CER +\d\.\d{3} +\d\.\d{3}\n", printed)
    assert re.search(r"exact match +\d+\.\d% +\d+\.\d%\n", printed)
    assert re.search(r"Trained in \d+ s, [\d.]+ samples/s", printed)


def losses(folder, *options):
    ended = run(*SHORT, "--max_steps", 4, "--save_strategy", "no", "--output_dir", folder, *options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / "metrics.json").read_text())["train"]["losses"]


def test_the_seed_decides_the_losses(tmp_path):
    first = losses(tmp_path / "first")
    assert losses(tmp_path / "second") == first
    assert losses(tmp_path / "third", "--seed", 1) != first


def test_a_split_of_the_batch_gives_the_same_losses(tmp_path):
    whole = losses(tmp_path / "8x1", "--per_device_train_batch_size", 8)
    split = losses(tmp_path / "2x4", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    assert split == pytest.approx(whole, rel=0.01)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    options = (*SHORT, "--output_dir", tmp_path, "--save_steps", 2, "--max_steps", 4)
    assert run(*options).returncode == 0
    (tmp_path / "checkpoint-4").rename(tmp_path / "whole")
    ended = run(*options, "--resume_from_checkpoint", "true")
    assert ended.returncode == 0, ended.stderr[-3000:]
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "checkpoint-4"))
    assert all(resumed[name].equal(tensor) for name, tensor in whole.items())


@pytest.mark.skipif(not (ROOT.parent / "shared" / "latex_ocr").is_dir(), reason="the real data is not here")
def test_real_formulas(tmp_path):
    data = os.path.relpath(ROOT.parent / "shared" / "latex_ocr", ROOT)
    ended = run(*SHORT, "--output_dir", tmp_path, "--dataset_name", data)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads((tmp_path / "metrics.json").read_text())["after"]["rows"] == 6
