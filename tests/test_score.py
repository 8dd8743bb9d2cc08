"""Held-out scores without training: `python -m qwen_vl_kit score`."""

import io
import json

import pytest
from datasets import Dataset, load_dataset
from test_read import base, pictures, run, save_adapter, signals  # noqa: F401 (fixtures)

from qwen_vl_kit import record, score


@pytest.fixture(scope="module")
def rows():
    return load_dataset("demo/data", split="train").select(range(42))


@pytest.fixture(scope="module")
def file(rows, tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.parquet"
    rows.to_parquet(file)
    return file


@pytest.fixture
def command(run, file, tmp_path, capfd):  # noqa: F811
    """Runs `score` in this process: its exit code, the folder that it wrote, and what it said."""

    def command(*words, model=run, data=file, folder=tmp_path / "score"):
        words = [str(model), *map(str, words), "--output_dir", str(folder), "--max_new_tokens", "4"]
        code = 0
        try:
            score.main([*words, *(["--dataset_name", str(data)] if data else [])], "score")
        except SystemExit as ended:
            code = ended.code
        said = "".join(capfd.readouterr())
        return code, folder, f"{said}{code}"

    return command


def test_one_model(command, rows):
    code, folder, said = command("--num_test_rows", 6)
    assert code == 0, said
    numbers = json.loads((folder / "scores.json").read_text())
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(line["truth"] == rows[line["row"]]["text"].strip() for line in lines)
    errors, length = (sum(line["after"][name] for line in lines) for name in ("errors", "length"))
    assert numbers["after"]["cer"] == errors / length and "before" not in numbers
    low, high = numbers["interval"]["cer"]
    assert low < numbers["after"]["cer"] < high
    assert all((folder / line["image"]).is_file() and "certainty" in line["after"] for line in lines)
    page = (folder / "report.html").read_text()
    assert page.count("<article") == 6 and "never trained on" not in page
    assert "6 held-out images" in said and "95% confidence interval" in said


def test_two_models_on_the_same_rows(base, command, tmp_path):  # noqa: F811
    save_adapter(base, tmp_path / "other" / "adapter", seed=1)
    code, folder, said = command("--num_test_rows", "all", "--against", tmp_path / "other")
    assert code == 0, said
    numbers = json.loads((folder / "scores.json").read_text())
    names = numbers["models"]
    assert names["before"].startswith(str(tmp_path / "other")) and names["after"] != names["before"]
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 42 and any(line["before"]["text"] != line["after"]["text"] for line in lines)
    change = numbers["difference"]["cer"]
    assert change["value"] == numbers["after"]["cer"] - numbers["before"]["cer"]
    assert change["interval"][0] <= change["value"] <= change["interval"][1]
    # The second one read what it would have read alone.
    code, alone, said = command("--num_test_rows", "all", model=tmp_path / "other", folder=tmp_path / "alone")
    assert code == 0, said
    assert json.loads((alone / "scores.json").read_text())["after"] == numbers["before"]
    for name in names.values():
        assert name in (folder / "report.html").read_text() and "images/s" in numbers["about"][name]


def test_the_base_is_read_without_the_adapter(base, run, command, tmp_path):  # noqa: F811
    """By the word, or by its name: asked what the adapter was trained with, and prepared by its processor."""
    found = []
    for number, name in enumerate(("base", base)):
        code, folder, said = command("--num_test_rows", 8, "--against", name, folder=tmp_path / str(number))
        assert code == 0, said
        found.append(json.loads((folder / "scores.json").read_text()))
        assert "asked: What is it?" in found[-1]["about"][found[-1]["models"]["before"]]
    assert found[0]["before"] == found[1]["before"] != found[0]["after"]
    code, folder, said = command("--num_test_rows", 8, "--instruction", "What is it?", model=base)
    assert json.loads((folder / "scores.json").read_text())["after"] == found[0]["before"]


def test_each_model_is_asked_what_it_was_trained_with(base, run, command, tmp_path):  # noqa: F811
    """One that does not say it is asked the same as the other; what is asked for on the command line goes for both."""
    save_adapter(base, tmp_path / "other" / "adapter", seed=1)
    file = tmp_path / "other" / "adapter" / "reading.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"instruction": "Another?"}))
    for words, model, asked in (
        ((), run, {"after": "What is it?", "before": "Another?"}),
        (("--instruction", "Read!"), run, {"after": "Read!", "before": "Read!"}),
        ((), base, {"after": "Write the LaTeX representation for this image.", "before": "Another?"}),
    ):
        code, folder, said = command("--num_test_rows", 2, "--against", tmp_path / "other", *words, model=model)
        assert code == 0, said
        numbers = json.loads((folder / "scores.json").read_text())
        for when, name in numbers["models"].items():
            assert numbers["about"][name].endswith(f"asked: {asked[when]}")


def test_rows_are_chosen_as_a_run_chooses_them(command, rows, tmp_path):
    """Rows that can't be used are named and left out, and the next ones taken."""
    image = io.BytesIO()
    rows[0]["image"].save(image, "PNG")
    bad = [{"image": {"bytes": image.getvalue(), "path": None}, "text": "  "}] * 3
    some = [{"image": {"bytes": image.getvalue(), "path": None}, "text": "x ^ 2"}]
    Dataset.from_list(bad + some).to_parquet(tmp_path / "rows.parquet")
    code, folder, said = command("--num_test_rows", 3, data=tmp_path / "rows.parquet")
    assert code == 0 and "Left out 3 held-out rows (no text)" in said and "has 1 usable rows" in said
    assert "Only 1 held-out image" in said


def test_rows_that_it_may_have_been_trained_on_are_told(base, command, file, rows, tmp_path):  # noqa: F811
    save_adapter(base, tmp_path / "run" / "adapter")
    texts = record.fingerprint_of_texts(rows, "text")
    known = {"train": f"42 rows of rows.parquet train ({texts})", "held_out": [], "validation": []}
    (tmp_path / "run" / "run.json").write_text(json.dumps(known))
    settings = {"instruction": "What is it?", "load_in_4bit": False, "bf16": False, "fp16": False}
    metrics = {"settings": settings | {"dataset_name": "another"}, "train": {}, "test_split": "test"}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    code, folder, said = command("--num_test_rows", 5, model=tmp_path / "run")
    assert code == 0 and "may have been trained on 5 of these rows" in said
    assert "may have been trained on 5 of these rows" in (folder / "report.html").read_text()


SENTENCES = {
    "no data": ([], None, "name a data set with --dataset_name"),
    "no rows": (["--num_test_rows", "0"], "file", "a whole number above 0, not '0', or all"),
    "another split": (["--dataset_test_split", "exam"], "file", "set --dataset_test_split to one of ['train']"),
    "another column": (["--text_column", "latex"], "file", "set --text_column to one of"),
    "no images": (["--image_column", "text", "--text_column", "image"], "file", "None of the images in column 'text'"),
    "no such data": ([], "nowhere/rows.csv", "Could not load the data set"),
    "itself": (["--against", "RUN"], "file", "is the same model"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_can_t_be_scored_is_one_sentence(case, command, run, file):  # noqa: F811
    words, data, sentence = SENTENCES[case]
    words = [str(run) if word == "RUN" else word for word in words]
    code, folder, said = command(*words, data=file if data == "file" else data)
    assert code not in (0, None) and sentence in said and "Traceback" not in said
    assert not folder.exists()


def test_a_whole_model_has_no_base(base, command):  # noqa: F811
    code, folder, said = command("--against", "base", model=base)
    assert code and "--against base needs an adapter" in said and not folder.exists()


def test_no_folder_of_other_things_is_replaced(command, tmp_path, monkeypatch):
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / "thesis.tex").write_text("mine")
    code, folder, said = command()
    assert code and "holds other files" in said and (folder / "thesis.tex").read_text() == "mine"
    (folder / "thesis.tex").unlink()
    assert command("--num_test_rows", 2)[0] == 0
    first = (folder / "report.html").read_text()
    assert command("--num_test_rows", 3)[0] == 0 and (folder / "report.html").read_text() != first
    # What fails in between leaves what was there.
    before = (folder / "scores.json").read_text()
    monkeypatch.setattr("qwen_vl_kit.report_page.make_page", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
    code, _, said = command("--num_test_rows", 4)
    assert "Could not write" in said and (folder / "scores.json").read_text() == before
