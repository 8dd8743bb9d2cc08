"""The package as pip installs it: script, kit and command, without a clone beside them."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what `pip install .` brings of ours."""
    folder = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source")  # pip builds where it finds it
    for name in ("pyproject.toml", "README.md", "LICENSE", "finetune_qwen_vl.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "qwen_vl_kit", source / "qwen_vl_kit")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, source]
    subprocess.run(command, check=True, cwd=folder)
    return folder


def in_empty_folder(installed, folder, *command):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)


def test_all_files_of_the_kit_are_there(installed):
    ours = {
        str(file.relative_to(ROOT)) for file in (ROOT / "qwen_vl_kit").rglob("*") if "__pycache__" not in file.parts
    }
    theirs = {str(file.relative_to(installed)) for file in installed.rglob("*")}
    assert ours | {"finetune_qwen_vl.py"} <= theirs


def test_the_command_and_the_script_start_anywhere(installed, tmp_path):
    ended = in_empty_folder(installed, tmp_path, sys.executable, installed / "bin" / "qwen-vl-kit", "report", tmp_path)
    assert ended.returncode != 0 and "metrics.json" in ended.stderr and "Traceback" not in ended.stderr
    ended = in_empty_folder(installed, tmp_path, sys.executable, "-m", "finetune_qwen_vl", "--help")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert re.search(r"--save_merged +at the end, also write base", ended.stdout), "the kit's options, explained"
    assert re.search(r"--lora_r +rank of the adapters", ended.stdout), "a setting's comment is its help"


def test_it_needs_what_requirements_txt_has_but_for_torch():
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    needs = {*re.findall(r'"(.*?)"', listed)}
    pins = {line.split("#")[0].split(";")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert {pin.split("==")[0] for pin in pins - needs - {""}} == {"torch", "torchvision", "xformers"}
    assert needs <= pins
