"""The demo, as a user runs it, and what it leaves behind."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SHORT, run
from datasets import load_dataset
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The README's demo, in full: its output folder, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    ended = run("--config", "demo/config.yaml", "--output_dir", folder, timeout=1800, fresh=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder, ended.stdout


def test_the_demo_learns(demo):
    folder, _ = demo
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["rows"] == metrics["settings"]["num_test_rows"]
    assert metrics["after"]["cer"] < 0.08 < metrics["before"]["cer"] / 5
    assert metrics["after"]["exact_match"] > metrics["before"]["exact_match"] + 0.8
    losses = [entry["loss"] for entry in metrics["train"]["log"] if "loss" in entry]
    assert len(losses) == metrics["settings"]["max_steps"] == 260
    assert sum(losses[-5:]) < sum(losses[:5])
    assert metrics["train"]["train_samples_per_second"] > 0
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"} <= set(metrics["versions"])


def test_the_demo_leaves_an_adapter_with_its_processor(demo):
    folder, _ = demo
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (16, 16, 0, "none")
    assert config["base_model_name_or_path"] == str(ROOT / "demo/model"), "found from anywhere"
    names = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(names) == 2 * (4 * 7 + 6 * 4)
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
    assert re.search(r"Before training: CER \d\.\d{3}, exact match \d+\.\d%\n", printed)
    assert re.search(r"After training: CER \d\.\d{3}, exact match \d+\.\d%\n", printed)
    assert re.search(r"\nCER +\d\.\d{3} +\d\.\d{3} +-\d\.\d{3} \(-\d\.\d{3} to -\d\.\d{3}\)\n", printed)
    assert re.search(r"Trained in \d+ s, [\d.]+ samples/s", printed)


def test_the_demo_leaves_every_reading_and_a_report(demo):
    folder, _ = demo
    metrics = json.loads((folder / "metrics.json").read_text())
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == metrics["rows"]
    for when in ("before", "after"):
        assert sum(prediction[when]["exact_match"] for prediction in predictions) / 100 == metrics[when]["exact_match"]
        shares = {"exact_match", "formula_match", "is_latex", "cut"}
        assert set(metrics[when]) == {"cer", "normalized_cer", "bleu", *shares}
    texts = load_dataset(str(ROOT / "demo/data"), split="test")["text"]
    assert all(texts[prediction["row"]] == prediction["truth"] for prediction in predictions)
    assert all(Image.open(folder / prediction["image"]).size[0] > 0 for prediction in predictions)
    low, high = metrics["difference"]["exact_match"]["interval"]
    assert 0 < low < metrics["difference"]["exact_match"]["value"] < high
    page = (folder / "report.html").read_text()
    assert page.count("<article") == len(predictions) and page.count("<math") > 2 * len(predictions)
    assert "model-index" in (folder / "adapter" / "README.md").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with nothing of ours but the script, and the demo to run it on."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(ROOT / "finetune_qwen_vl.py", folder)
    (folder / "demo").symlink_to(ROOT / "demo")
    return folder


def run_alone(alone, *arguments, **environment):
    command = [sys.executable, "finetune_qwen_vl.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": ""} | environment
    return subprocess.run(command, cwd=alone, capture_output=True, text=True, env=environment)


def test_the_kit_changes_nothing_but_speed_safety_and_scale(alone, tmp_path):
    """The script by itself and with the kit: the same rows, losses and adapters, bit for bit; the same readings."""
    options = (*SHORT, "--max_steps", 18, "--batch_size", 4, "--lora_dropout", 0.1, "--learning_rate", 1e-3)
    ended = run_alone(alone, *options, "--output_dir", tmp_path / "alone")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not (tmp_path / "alone" / "report.html").exists()
    with_kit = run(*options, "--output_dir", tmp_path / "kit")
    assert with_kit.returncode == 0, with_kit.stderr[-3000:]
    assert (tmp_path / "kit" / "report.html").exists()
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("alone", "kit"))
    assert one.keys() == other.keys() and all(other[name].equal(tensor) for name, tensor in one.items())
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("alone", "kit"))
    steps = [
        [(entry["loss"], entry["grad_norm"]) for entry in run["train"]["log"] if "loss" in entry]
        for run in (one, other)
    ]
    assert len(steps[0]) == 18 and steps[0] == steps[1]
    assert len({loss for loss, _ in steps[0]}) == 18
    for when in ("before", "after"):
        assert all(other[when][name] == score for name, score in one[when].items())
    one, other = (
        [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("alone", "kit")
    )
    assert [(row["row"], row["after"]["text"]) for row in one] == [(row["row"], row["after"]["text"]) for row in other]
    printed, with_kit = (text.split("Training")[0] for text in (ended.stdout, with_kit.stdout))
    # Each says one line that is its own: that nothing is checked, and how many of the rows are looked at.
    (first, printed), (of_kit, with_kit) = (text.split("\n", 1) for text in (printed, with_kit))
    assert "runs alone" in first and of_kit == "18 steps of 4 need 72 of 7,000 rows to train on"
    adapted = "Adapters on 12 vision attention, 12 vision MLP, 16 language attention, 12 language MLP layers\n"
    assert adapted in with_kit and printed == with_kit.replace(adapted, "").replace("/kit/", "/alone/")


def test_the_script_alone_resumes(alone, tmp_path):
    options = (*SHORT, "--max_steps", 4, "--save_steps", 2, "--output_dir", tmp_path)
    assert run_alone(alone, *options).returncode == 0
    (tmp_path / "checkpoint-4").rename(tmp_path / "whole")
    ended = run_alone(alone, *options, "--resume_from_checkpoint", "true")
    assert ended.returncode == 0, ended.stderr[-3000:]
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "checkpoint-4"))
    assert all(resumed[name].equal(tensor) for name, tensor in whole.items())


def test_several_processes_need_the_kit(alone):
    ended = run_alone(alone, *SHORT, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert ended.returncode == 1 and ended.stderr.strip().startswith("Alone, this file trains on one GPU")
    assert len(ended.stderr.strip().splitlines()) == 1 and not ended.stdout


def test_a_validation_loss_on_the_way(tmp_path):
    """It is in the log and on the terminal, and the checkpoint of the lowest is kept."""
    ended = run(*SHORT, "--eval_strategy", "steps", "--eval_steps", "1", "--output_dir", tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    log = json.loads((tmp_path / "metrics.json").read_text())["train"]["log"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [1, 2]
    assert ended.stdout.count(": validation loss ") == 2
    state = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    best = min((entry for entry in log if "eval_loss" in entry), key=lambda entry: entry["eval_loss"])
    assert state["best_global_step"] == best["step"] and state["best_metric"] == best["eval_loss"]


def losses(folder, *options, **how):
    ended = run(*SHORT, "--max_steps", 4, "--save_strategy", "no", "--output_dir", folder, *options, **how)
    assert ended.returncode == 0, ended.stderr[-3000:]
    log = json.loads((folder / "metrics.json").read_text())["train"]["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_the_seed_decides_the_losses(tmp_path):
    """Also those of a process that was forked from one with the libraries, as most of the tests' are."""
    first = losses(tmp_path / "first", fresh=True)
    assert losses(tmp_path / "second") == first
    assert losses(tmp_path / "third", "--seed", 1) != first


def test_micro_batches_give_the_same_losses(tmp_path):
    whole = losses(tmp_path / "8x1")
    split = losses(tmp_path / "2x4", "--per_device_train_batch_size", 2)
    assert split == pytest.approx(whole, rel=0.01)
    settings = json.loads((tmp_path / "2x4" / "metrics.json").read_text())["settings"]
    assert (settings["batch_size"], settings["gradient_accumulation_steps"]) == (8, 4)


def test_a_run_resumes_from_its_checkpoint(tmp_path):
    options = (*SHORT, "--save_steps", 2, "--max_steps", 4)
    assert run(*options, "--output_dir", tmp_path / "whole").returncode == 0
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    ended = run(*options, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", checkpoint)
    assert ended.returncode == 0, ended.stderr[-3000:]
    file = "adapter/adapter_model.safetensors"
    whole, resumed = (load_file(tmp_path / name / file) for name in ("whole", "resumed"))
    assert all(resumed[name].equal(tensor) for name, tensor in whole.items())


@pytest.mark.skipif(not (ROOT.parent / "shared" / "latex_ocr").is_dir(), reason="the real data is not here")
def test_real_formulas(tmp_path):
    data = os.path.relpath(ROOT.parent / "shared" / "latex_ocr", ROOT)
    ended = run(*SHORT, "--output_dir", tmp_path, "--dataset_name", data)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"] == 6


def test_a_kit_that_lacks_something_is_noticed_before_training(tmp_path):
    """The script does not pass for alone, and no run of hours ends with it."""
    shutil.copy(ROOT / "finetune_qwen_vl.py", tmp_path)
    shutil.copytree(ROOT / "qwen_vl_kit", tmp_path / "qwen_vl_kit")
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "latex2mathml").mkdir()
    (tmp_path / "latex2mathml" / "__init__.py").write_text("raise ModuleNotFoundError('no latex2mathml here')")
    ended = run_alone(tmp_path, *SHORT)
    assert ended.returncode == 1 and "no latex2mathml here" in ended.stderr
    assert "rows to train on" not in ended.stdout and not (tmp_path / "outputs/demo/checkpoint-2").exists()
