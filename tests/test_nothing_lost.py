"""Interruptions and faults, on purpose: processes really killed, a disk really full. What was learned stays."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import ROOT, SCRIPT, run
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import get_last_checkpoint

STEPS = 40

# Writing and deleting take long enough to be interrupted.
SLOW_DISK = """
import os, time
sync, unlink = os.fsync, os.unlink
os.fsync = lambda file: (time.sleep(0.01), sync(file))[1]
os.unlink = lambda *names, **where: (time.sleep(0.005), unlink(*names, **where))[1]
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Options of a run whose steps take milliseconds: a model of 140 thousand parameters, 40 rows."""
    place = tmp_path_factory.mktemp("tiny")
    config = AutoConfig.from_pretrained(ROOT / "demo/model")
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.layer_types = 64, 64, 1, ["full_attention"]
    text.num_attention_heads, text.num_key_value_heads, text.rope_parameters["mrope_section"] = 2, 1, [4, 6, 6]
    vision.hidden_size, vision.embed_dim, vision.depth, vision.num_heads, vision.mlp_ratio = 64, 32, 1, 2, 1
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(place / "model")
    AutoProcessor.from_pretrained(ROOT / "demo/model").save_pretrained(place / "model")
    load_dataset("demo/data", split="train").select(range(42)).to_parquet(place / "rows.parquet")
    (place / "sitecustomize.py").write_text(SLOW_DISK)
    return [
        "--model_name_or_path", str(place / "model"), "--dataset_name", str(place / "rows.parquet"),
        "--num_test_rows", "2", "--max_new_tokens", "4", "--min_pixels", "3136", "--per_device_train_batch_size", "4",
        "--max_steps", str(STEPS), "--save_steps", "1", "--lora_dropout", "0.1", "--learning_rate", "1e-3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The output folder of a run that nothing happened to, with the checkpoints of all its steps."""
    folder = tmp_path_factory.mktemp("whole")
    ended = run(*tiny, "--save_total_limit", 1000, "--output_dir", folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@contextmanager
def started(options, folder, slow=True):
    """The script as a process that is running, what it says going to `folder`.log."""
    environment = os.environ | ({"PYTHONPATH": str(Path(options[1]).parent)} if slow else {})
    command = [sys.executable, SCRIPT.name, *map(str, options), "--output_dir", str(folder)]
    with open(f"{folder}.log", "ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition, process=None, seconds=120):
    """Looks a thousand times a second whether `condition()` holds. False: the process has ended before."""
    until = time.monotonic() + seconds
    while not condition():
        if process and process.poll() is not None:
            return condition()
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.001)
    return True


def said(folder):
    return Path(f"{folder}.log").read_text(errors="replace")


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def state(checkpoint):
    """All that training goes on from, out of a checkpoint's files."""
    parts = {name: torch.load(checkpoint / name, weights_only=True) for name in ("optimizer.pt", "scheduler.pt")}
    with torch.serialization.safe_globals([*numpy_globals()]):
        parts["random"] = torch.load(checkpoint / "rng_state.pth", weights_only=True)
    parts["adapter"] = load_file(checkpoint / "adapter_model.safetensors")
    trainer = json.loads((checkpoint / "trainer_state.json").read_text())
    # (TRL counts num_tokens anew when it goes on.)
    parts["log"] = [{key: entry[key] for key in entry if key != "num_tokens"} for entry in trainer["log_history"]]
    return parts


def numpy_globals():
    import numpy as np

    core = np._core.multiarray
    return core._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))


def same(one, other):
    """Whether two nested states are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    return bool((one == other).all()) if hasattr(one, "all") else one == other


def assert_ended_alike(folder, whole):
    """The run in `folder` has ended as the undisturbed one: state, adapter, readings, losses."""
    last = f"checkpoint-{STEPS}"
    assert same(state(folder / last), state(whole / last))
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not (folder / "part").exists()


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tiny, whole, tmp_path):
    seed = int(os.environ.get("KILLS_SEED", random.randrange(10**6)))
    print("seed of the kills:", seed)
    chance, folder, part, kills = random.Random(seed), tmp_path / "out", tmp_path / "out" / "part", []
    environment = os.environ | {"PYTHONPATH": f"{Path(tiny[1]).parent}:{ROOT / 'tests'}"}
    zygote = subprocess.Popen(
        [sys.executable, ROOT / "tests/zygote.py"], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    order = json.dumps([[*tiny, "--resume_from_checkpoint", "true", "--output_dir", str(folder)], f"{folder}.log"])

    def being_written():
        """The files in `part`, if this process has made it."""
        with suppress(FileNotFoundError):
            if part.stat().st_ctime > start:
                return [name for _, _, names in os.walk(part) for name in names]
        return []

    while True:
        before, start = steps(folder), time.time()
        zygote.stdin.write(order + "\n")
        zygote.stdin.flush()
        process = int(zygote.stdout.readline())
        kind = chance.choice(["any", "writing", "deleting"]) if len(kills) < 20 else None
        until, wanted = start + chance.uniform(1.5, 3.5), chance.randrange(2, 11)
        while kind:
            files = being_written()
            if (
                (kind == "any" and time.time() > until)
                or (kind == "writing" and len(files) >= wanted)
                or (kind == "deleting" and steps(folder)[:1] > before[:1] and 0 < len(files) < wanted)
                or "State:\tZ" in Path(f"/proc/{process}/status").read_text()
            ):
                os.kill(process, signal.SIGKILL)
                kills.append((kind, len(being_written())))
                break
            time.sleep(0.0005)
        code = int(zygote.stdout.readline())
        for step in steps(folder):  # each is as it was in the run that was not killed
            assert same(state(folder / f"checkpoint-{step}"), state(whole / f"checkpoint-{step}")), (seed, kills)
        assert max(before, default=0) <= max(steps(folder), default=0), (seed, kills)
        if code == 0:
            break
        assert code == -signal.SIGKILL, said(folder)[-3000:]
    zygote.stdin.close()
    zygote.wait()
    print(kills)
    assert len(kills) >= 20 and sum(left > 0 for _, left in kills) >= 5, "too few kills while something was written"
    assert_ended_alike(folder, whole)
