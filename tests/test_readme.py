"""What the README says has to be so."""

import platform
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_every_option_in_the_readme_exists(execute, tmp_path):
    names = execute("--config", "demo/config.yaml", "--output_dir", tmp_path, until="Data")
    known = {option for action in names["parser"]._actions for option in action.option_strings} | {"--config"}
    others = ("pip install", "jupytext", "vllm", "--dtype")  # the last one is export.py's
    launched = re.sub(r"(accelerate launch|torchrun) [^`\n]*finetune_qwen_vl.py", "", README)
    own = [line for line in launched.splitlines() if not any(word in line for word in others)]
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9]+", "\n".join(own)))
    assert len(used) > 10
    assert used <= known


def test_requirements_are_what_the_install_cell_installs():
    cell = (ROOT / "finetune_qwen_vl.py").read_text().split("# ## Settings")[0]
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    in_cell = dict(re.findall(r" ([\w-]+)==([\w.]+)", cell))
    assert set(pinned) - set(in_cell) == {"torch", "torchvision", "pillow", "xformers"}, "Colab brings or fits those"
    assert all(pinned[name] == version for name, version in in_cell.items())


def test_ci_runs_the_readme_s_test_line():
    line = next(line for line in README.splitlines() if "pytest" in line and "pip install" in line)
    assert line.strip() in (ROOT / ".ci" / "run").read_text()


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="xformers is not for this machine"
)
def test_xformers_loads_next_to_this_torch():
    said = subprocess.run([sys.executable, "-m", "xformers.info"], capture_output=True, text=True, check=True).stdout
    assert re.search(r"build\.info: +available", said)
    assert re.search(r"memory_efficient_attention\.cutlassF-pt: +available", said)
