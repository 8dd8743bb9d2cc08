"""Pages with measured numbers against the results they come from, and the benchmark that measured them."""

import json
import re
import subprocess
import sys

from conftest import ROOT

RESULTS = ROOT / "benchmarks/results"
PAGES = ("images-and-batches.md", "rank-and-rate.md")


def plot(*words):
    command = [sys.executable, "benchmarks/plot_settled.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_pages_say_what_was_measured_and_the_plots_are_drawn(tmp_path):
    for page in PAGES:
        text = (ROOT / "docs" / page).read_text()
        # Wherever a table has a number of its own, another is put first, so that what follows tells.
        (tmp_path / page).write_text(re.sub(r"(?m)^(\|.*\| )(0\.\d+)( .*)$", r"\g<1>9.999\g<3>", text))
        assert "9.999" in (tmp_path / page).read_text()
    ended = plot(RESULTS / "2026-11-29-settled.json", tmp_path, "--fill", *(tmp_path / page for page in PAGES))
    assert ended.returncode == 0, ended.stderr[-3000:]
    for page in PAGES:
        assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text()
        assert (tmp_path / page).with_suffix(".png").stat().st_size > 10_000


def test_the_table_of_bases_says_what_was_measured():
    runs = json.loads((RESULTS / "2026-11-29-bases.json").read_text())["runs"]
    page = (ROOT / "docs/measured.md").read_text().partition("### Its shape and its optimizer")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    told = [row[1:] for row in rows[2 : 2 + len(runs)]]

    def cer(run, seconds):
        return min(run["curve"], key=lambda line: abs(line["seconds"] - seconds))["real"]["cer"]

    assert told == [
        [
            f"{run['parameters_m']:.1f} M",
            f"{round(run['samples'], -4):,}",
            *(f"{cer(run, seconds):.3f}" for seconds in (230, 305, 380)),
            f"{run['curve'][-1]['real']['cer']:.3f}",
            f"{run['curve'][-1]['real']['exact_match']:.1%}",
        ]
        for run in runs
    ]


def test_the_experiments_run_and_a_plot_of_tiny_ones_is_refused(tmp_path):
    data = ROOT / "demo/data"
    command = [sys.executable, "benchmarks/settle.py", ROOT / "demo/model", data, data, tmp_path, "--tiny"]
    command += ["--at_once", "2", "--only", r"^(spelling compact|rank 8) 3407"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    record = json.loads((tmp_path / "settle.json").read_text())
    results = {(run["group"], run["name"]): run for run in record["results"]}
    assert results.keys() == {("spelling", "compact"), ("rank", "8")} and not record["not_started"]
    assert all(run["finished"] and run["rows"] == 4 for run in results.values())
    assert results["rank", "8"]["options"]["lora_r"] == 8
    ended = plot(tmp_path / "settle.json", tmp_path)
    assert ended.returncode == 2 and "tiny run" in ended.stderr and "Traceback" not in ended.stderr
    assert not [*tmp_path.glob("*.png")]
