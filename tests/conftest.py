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
from unittest import mock

import pytest

from qwen_vl_kit.environment import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "finetune_qwen_vl.py"
SHORT = ("--config", "demo/config.yaml", "--max_steps", "2", "--batch_size", "8")
SHORT += ("--num_test_rows", "6", "--max_new_tokens", "16")

# Several runs share the cores, and OpenMP's threads wait for each other by spinning. The hub is never asked.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
os.environ.update(ENVIRONMENT)


# With a GPU, Unsloth has to be imported first, and a process that has asked for CUDA can't fork one that uses it.
ON_GPU = Path("/dev/nvidiactl").exists()
AT_FIRST = dict(os.environ)
# Of no matter to what is started: pytest's own, and what Gradio and PyTorch's compiler set where a test imports them.
HARMLESS = {
    "PYTEST_CURRENT_TEST",
    "HF_HUB_DISABLE_TELEMETRY",
    "TORCHINDUCTOR_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
}


def changed_environment():
    """The variables that are not as they were when the tests began, of those that matter to what is started."""
    prepared = SETTINGS | AT_FIRST  # as the kit leaves it in this process, where a test has imported it
    prepared["CUDA_VISIBLE_DEVICES"] = AT_FIRST.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    names = {*os.environ, *AT_FIRST} - HARMLESS
    return {name for name in names if os.environ.get(name) not in (AT_FIRST.get(name), prepared.get(name))}


class Zygote:
    """A process that has imported the libraries, and forks whenever something is to be started (see `zygote.py`)."""

    def __init__(self, environment):
        # Without a buffer of its own, as `wait` asks the pipe whether there is a line.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        command = [sys.executable, ROOT / "tests" / "zygote.py"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def start(self, options, out, err, **how):
        """Starts the script, or as `how` says (see `zygote.py`), its outputs into files. Returns its process's id."""
        what = {"arguments": [*map(str, options)], "out": str(out), "err": str(err), "cwd": str(ROOT)} | how
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        return int(self.process.stdout.readline())

    def wait(self, timeout=None):
        """The exit code of what was started, or None if it has not ended after so many seconds."""
        ready = select.select([self.process.stdout], [], [], timeout)[0]
        return int(self.process.stdout.readline()) if ready else None


@functools.cache
def zygote():
    """The one that serves this process, until that ends."""
    ours = Zygote(AT_FIRST | {name: value for name, value in SETTINGS.items() if name not in AT_FIRST})
    atexit.register(ours.__exit__)
    return ours


def forked(command, arguments, timeout, **how):
    """What `subprocess.run(command)` would return, `arguments` being those of it that the program sees."""
    server = zygote()
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        child = server.start(arguments, *files, **how)
        code = server.wait(timeout)
        if code is None:
            os.kill(child, signal.SIGKILL)
            server.wait()
            raise subprocess.TimeoutExpired(command, timeout, *(file.read_bytes() for file in files))
        return subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))


def run(*arguments, timeout=600, fresh=False):
    """`python finetune_qwen_vl.py *arguments` in the project's root: its `CompletedProcess`, outputs as text.

    It is forked from a process that has imported the libraries, unless it is to be `fresh`, as users start it, or the
    environment is another than when the tests began: libraries read it when they are imported.
    """
    command = [sys.executable, SCRIPT.name, *map(str, arguments)]
    if fresh or ON_GPU or changed_environment():
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    return forked(command, arguments, timeout)


def kit(*arguments, cwd=ROOT, timeout=300, fresh=False, **environment):
    """`python -m qwen_vl_kit *arguments` from any folder, with `environment` added to this one; forked as in `run`."""
    command = [sys.executable, "-m", "qwen_vl_kit", *map(str, arguments)]
    there = os.environ | environment
    there["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(ROOT)]))
    if fresh or ON_GPU or environment or changed_environment():
        return subprocess.run(command, cwd=cwd, env=there, capture_output=True, text=True, timeout=timeout)
    return forked(command, arguments, timeout, module=command[2], cwd=str(cwd), paths=[str(cwd), str(ROOT)])


def run_changed(change, *arguments, timeout=600):
    """The same after the Python code `change`, which can make a library fail as a machine would."""
    code = f"{change}\nimport runpy\nrunpy.run_path({SCRIPT.name!r}, run_name='__main__')\n"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def execute(*arguments):
    """Runs the script in this process; returns its names. The environment is then as before, for what is started."""
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
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
