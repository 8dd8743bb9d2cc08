"""The script as a notebook, made by jupytext as the README says, executed in a real kernel."""

import json
import re
import subprocess
import sys

import nbformat
from conftest import ROOT, SHORT
from nbclient import NotebookClient


def test_the_notebook_runs(tmp_path):
    file = tmp_path / "finetune_qwen_vl.ipynb"
    command = [sys.executable, "-m", "jupytext", "--to", "ipynb", "--output", file, "finetune_qwen_vl.py"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    notebook = nbformat.read(file, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("%pip freeze") and "%pip install" in cells[0].source

    # What a reader of the settings cell would do.
    options = [*SHORT, "--save_strategy", "no", "--output_dir", str(tmp_path / "out")]
    edited = cells[1].source.replace("arguments = [] if in_notebook", f"arguments = {options} if in_notebook")
    assert edited != cells[1].source
    cells[1].source = edited
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()

    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2, "the sample is shown before and after"
    printed = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    assert re.search(r"CER +\d+\.\d+ +\d+\.\d+", printed)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"] == 6
    shown = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    assert "<iframe srcdoc=" in shown and "&lt;article" in shown, "the report is shown"
