"""What the tests share: running the script as users do, also with a change, or in this process, to look into it."""

import atexit
import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qwen_vl_kit.environment import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "finetune_qwen_vl.py"
SHORT = ("--config", "demo/config.yaml", "--max_steps", "2", "--batch_size", "8")
SHORT += ("--num_test_rows", "6", "--max_new_tokens", "16")

# Several runs share the cores, and OpenMP's threads wait for each other by spinning. The hub is never asked.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
os.environ.update(ENVIRONMENT)


def environment_now():
    """What a run would see, without what the kit sets itself, in this process too where a test has imported it."""
    own = {*SETTINGS, "CUDA_VISIBLE_DEVICES", "PYTEST_CURRENT_TEST"}
    return {name: value for name, value in os.environ.items() if name not in own}


AT_FIRST = environment_now()


class Zygote:
    """A process that has imported the libraries, and forks whenever the script is to be started (see `zygote.py`)."""

    def __init__(self, environment):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, ROOT / "tests" / "zygote.py"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def start(self, options, *files):
        """Starts the script, its output and errors going to these files. Returns its process's id."""
        self.process.stdin.write(json.dumps([[*map(str, options)], *map(str, files)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self, timeout=None):
        """The exit code of what was started, or None if it has not ended after so many seconds."""
        ready = select.select([self.process.stdout], [], [], timeout)[0]
        return int(self.process.stdout.readline()) if ready else None


@functools.cache
def zygote():
    """The one that serves this process, until that ends."""
    ours = Zygote(AT_FIRST | SETTINGS)
    atexit.register(ours.__exit__)
    return ours


def run(*arguments, timeout=600):
    """`python finetune_qwen_vl.py *arguments` in the project's root: its `CompletedProcess`, outputs as text."""
    command = [sys.executable, SCRIPT.name, *map(str, arguments)]
    if environment_now() != AT_FIRST:  # which some libraries read when they are imported
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    server = zygote()
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        child = server.start(arguments, *files)
        code = server.wait(timeout)
        if code is None:
            os.kill(child, signal.SIGKILL)
            server.wait()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))


def run_changed(change, *arguments, timeout=600):
    """The same after the Python code `change`, which can make a library fail as a machine would."""
    code = f"{change}\nimport runpy\nrunpy.run_path({SCRIPT.name!r}, run_name='__main__')\n"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def execute(*arguments):
    """Runs the script in this process; returns its names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(ROOT)
        patch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        return runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Options of a run whose steps take milliseconds: a model of 140 thousand parameters, 40 rows."""
    import torch
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

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
    return [
        "--model_name_or_path", str(place / "model"), "--dataset_name", str(place / "rows.parquet"),
        "--num_test_rows", "2", "--max_new_tokens", "4", "--min_pixels", "3136", "--batch_size", "4",
        "--max_steps", "40", "--save_steps", "1", "--lora_dropout", "0.1", "--learning_rate", "1e-3",
    ]  # fmt: skip
