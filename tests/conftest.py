"""What the tests share: running the script as users do, or cell by cell in a namespace that can be looked into."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "finetune_qwen_vl.py"
SHORT = ("--config", "demo/config.yaml", "--max_steps", "2", "--per_device_train_batch_size", "8")
SHORT += ("--num_test_rows", "6", "--max_new_tokens", "16")

# Several runs share the cores, and OpenMP's threads wait for each other by spinning. The hub is never asked.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
os.environ.update(ENVIRONMENT)


def run(*arguments, timeout=600):
    """`python finetune_qwen_vl.py *arguments` in the project's root: its `CompletedProcess`, outputs as text."""
    command = [sys.executable, SCRIPT.name, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def execute(monkeypatch):
    """Executes the script's cells in this process, up to the cell with the title `until`; returns their names."""

    def execute(*arguments, until=None):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        source = SCRIPT.read_text()
        if until:
            source, found, _ = source.partition(f"# %% [markdown]\n# ## {until}\n")
            assert found
        names = {"__name__": "__main__"}
        exec(compile(source, SCRIPT, "exec"), names)
        return names

    return execute
