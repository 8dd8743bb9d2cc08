"""The script as a notebook, made by jupytext as the README says, executed in a real kernel, with the kit and alone."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT, SHORT
from nbclient import NotebookClient


def executed(place, edit, **environment):
    """The notebook after a run in the folder `place`, its settings cell changed by `edit`. Returns its code cells."""
    command = [sys.executable, "-m", "jupytext", "--to", "ipynb", "--output", "-", "finetune_qwen_vl.py"]
    made = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    notebook = nbformat.reads(made, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("%pip freeze") and "%pip install" in cells[0].source
    assert cells[1].source.startswith("from dataclasses import dataclass"), "settings come first"
    cells.pop(0)  # what it installs is here
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("%pip")]
    before, cells[0].source = cells[0].source, edit(cells[0].source)
    assert before != cells[0].source
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(place)}}).execute()
    return cells


def outputs_of(cells):
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2, "the sample is shown before and after"
    return outputs, "".join(output.get("text", "") for output in outputs if output.output_type == "stream")


def test_a_notebook_with_edited_settings_and_the_kit(tmp_path):
    values = {"model_name_or_path": "demo/model", "dataset_name": "demo/data", "output_dir": str(tmp_path)}
    values |= {"max_steps": 2, "num_test_rows": 6, "max_new_tokens": 16, "min_pixels": 3136, "save_steps": 1000}

    def edit(source):
        for name, value in values.items():
            source, found = re.subn(rf"^(    {name}: .*?) = .*?(  #|$)", rf"\1 = {value!r}\2", source, flags=re.M)
            assert found == 1, name
        return source

    cells = executed(ROOT, edit)
    outputs, printed = outputs_of(cells)
    assert re.search(r"CER +\d+\.\d+ +\d+\.\d+", printed)
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"] == 6
    shown = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    assert "<iframe srcdoc=" in shown and "&lt;article" in shown, "the report is shown"
    assert "Warning" not in "".join(output.get("text", "") for output in cells[-1].outputs)


def test_a_notebook_alone_with_the_demo_in_two_lines(tmp_path):
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    options = " ".join(SHORT)
    cells = executed(
        tmp_path,
        lambda source: source.replace('NOTEBOOK_OPTIONS = ""', f'NOTEBOOK_OPTIONS = "{options}"'),
        PYTHONPATH=os.environ.get("PYTHONPATH", "").replace(str(ROOT), ""),
    )
    _, printed = outputs_of(cells)
    assert re.search(r"After training: CER \d+\.\d+", printed)
    assert json.loads((tmp_path / "outputs/demo/metrics.json").read_text())["rows"] == 6
    assert not (tmp_path / "outputs/demo/report.html").exists()
