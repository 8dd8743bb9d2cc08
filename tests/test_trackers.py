"""What trackers get beside the losses: held-out scores, the sample's image, and the readings."""

import json
import sqlite3

import pytest
from conftest import SHORT, run

ENDED = {"cer", "exact_match", "bleu", "formula_match", "is_latex", "cut"}


def trained(folder, tracker):
    ended = run(*SHORT, "--max_steps", 3, "--report_to", tracker, "--output_dir", folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics, [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_tensorboard(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics, predictions = trained(tmp_path, "tensorboard")
    (folder,) = (tmp_path / "runs").iterdir()
    found = reading.EventAccumulator(str(folder)).Reload()
    assert len(found.Scalars("train/loss")) == 3
    for name in ENDED:
        events = [(event.step, event.value) for event in found.Scalars(f"held_out/{name}")]
        assert events == [(0, pytest.approx(metrics["before"][name])), (3, pytest.approx(metrics["after"][name]))]
    image = found.Images("sample")[0].encoded_image_string
    assert image.startswith(b"\x89PNG")
    table = found.Tensors("readings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert len(table.splitlines()) == 2 + len(predictions)
    for row in predictions:
        assert all(text.replace("|", r"\|").split("\n")[0] in table for text in (row["truth"], row["after"]["text"]))


def test_trackio(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    metrics, predictions = trained(tmp_path / "run", "trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, metrics from metrics order by step").fetchall()
    assert len({name for name, _ in rows}) == 1, "one run has it all"
    logged = [json.loads(text) for _, text in rows]
    assert len([entry for entry in logged if "train/loss" in entry]) == 3
    before, after = [entry for entry in logged if "held_out/cer" in entry]
    for name in ENDED:
        assert before[f"held_out/{name}"] == metrics["before"][name]
        assert after[f"held_out/{name}"] == metrics["after"][name]
    last = logged[-1]
    assert (tmp_path / "trackio/media" / last["sample"]["file_path"]).is_file()
    assert [row["after"] for row in last["readings"]["_value"]] == [row["after"]["text"] for row in predictions]


def test_a_tracker_that_fails_at_the_end_costs_nothing(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    (tmp_path / "sitecustomize.py").write_text(
        "import trackio\n"
        "def fail(*_): raise OSError('no space left')\n"
        "trackio.Image = fail\n"
    )  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    ended = run(*SHORT, "--report_to", "trackio", "--output_dir", tmp_path / "run")
    assert ended.returncode == 0 and "trackio did not take the scores and readings: no space left" in ended.stdout
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
