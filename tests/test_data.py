"""A user's own data, in every form that the README names."""

import json

import pytest
from conftest import SHORT, run
from datasets import Image, load_dataset


@pytest.fixture(scope="module")
def rows():
    return load_dataset("demo/data", split="train").select(range(24)).cast_column("image", Image(decode=False))


def image_files(rows, folder):
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        (folder / f"{number}.jpg").write_bytes(row["image"]["bytes"])
    return [f"{number}.jpg" for number in range(len(rows))]


def image_folder(rows, folder):
    names = image_files(rows, folder)
    lines = [json.dumps({"file_name": name, "text": row["text"]}) for name, row in zip(names, rows, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def json_lines(rows, folder):
    names = image_files(rows, folder / "scans")
    lines = [json.dumps({"image": f"scans/{name}", "text": row["text"]}) for name, row in zip(names, rows, strict=True)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def csv_file(rows, folder):
    names = image_files(rows, folder)
    lines = [f'{folder / name},"{row["text"]}"' for name, row in zip(names, rows, strict=True)]  # absolute paths
    (folder / "rows.csv").write_text("image,text\n" + "\n".join(lines))
    return folder / "rows.csv"


def parquet_file(rows, folder):
    folder.mkdir(parents=True)
    rows.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def hub_layout(rows, folder):
    (folder / "data").mkdir(parents=True)
    rows.select(range(16)).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    rows.select(range(16, 24)).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("form", [image_folder, json_lines, csv_file, parquet_file, hub_layout])
def test_forms_of_data(form, rows, tmp_path):
    ended = run(*SHORT, "--dataset_name", form(rows, tmp_path / "data"), "--output_dir", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "16 rows to train on, 6 others held out" in ended.stdout
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"] == 6


def test_names_and_instruction_are_settings(rows, tmp_path):
    data = parquet_file(rows.rename_columns({"image": "scan", "text": "latex"}), tmp_path / "data")
    ended = run(
        *SHORT, "--dataset_name", data, "--image_column", "scan", "--text_column", "latex",
        "--instruction", "What does it say?", "--min_pixels", 3136, "--max_pixels", 31360, "--output_dir", tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"]["instruction"] == "What does it say?"
    size = json.loads((tmp_path / "adapter" / "processor_config.json").read_text())["image_processor"]["size"]
    assert size == {"shortest_edge": 3136, "longest_edge": 31360}


def test_bad_rows_are_counted_named_and_left_out(rows, tmp_path):
    def spoil(row, number):
        if number in (3, 4):
            row["image"] = {"bytes": row["image"]["bytes"][:60], "path": None}
        elif number == 5:
            row["text"] = "  "
        elif number == 6:
            row["text"] = None
        return row

    (tmp_path / "data" / "data").mkdir(parents=True)
    rows.select(range(16)).map(spoil, with_indices=True).to_parquet(tmp_path / "data" / "data" / "train.parquet")
    rows.select(range(16, 24)).to_parquet(tmp_path / "data" / "data" / "test.parquet")
    ended = run(*SHORT, "--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Left out 2 training rows (image cut off): row 3 (after 60 bytes), row 4 (after 60 bytes)\n" in ended.stdout
    assert "Left out 2 training rows (no text): row 5, row 6\n" in ended.stdout
    assert "12 rows to train on, 6 others held out" in ended.stdout
