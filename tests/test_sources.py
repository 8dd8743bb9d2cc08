"""Data sets as people have them: each comes to its rows, or to a sentence that says what to do."""

import csv
import io
import json
import math
from types import SimpleNamespace

import openpyxl
import pytest
from conftest import ROOT
from datasets import Dataset, load_dataset
from PIL import Image, ImageDraw
from transformers import AutoProcessor

from qwen_vl_kit import hub, rows, run

TEXTS = [r"\frac{1}{2}", "x, y", r"\"{o} ; \text{é}", "12", "NA", r"a & b \\ c | d", "x^2\t+ 1", r"\alpha"]


def picture(number, kind="PNG"):
    image = Image.new("RGB", (90, 40), "white")
    ImageDraw.Draw(image).text((5, 5), f"formula {number}", fill="black")
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def images(folder, names=None, suffix=".png", kind="PNG"):
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"{number}{suffix}" for number in range(len(TEXTS))]
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number, kind))
    return names


def table(file, names, columns=("image", "text"), encoding="utf-8", texts=TEXTS, **how):
    with file.open("w", encoding=encoding, newline="") as opened:
        csv.writer(opened, **how).writerows([columns, *zip(names, texts, strict=True)])
    return file


def look(name, patch, **more):
    """What a run would train on: {text: file of the image or None}, and what is told of rows left out."""
    given = {"dataset_config": None, "image_column": "image", "text_column": "text", "dataset_train_split": "train"}
    options = SimpleNamespace(dataset_name=str(name), **given | {"max_length": None, "seed": 0, **more})
    extra = SimpleNamespace(max_characters=4000, normalize_latex=False, image_folder=more.pop("image_folder", None))
    processor = SimpleNamespace(tokenizer=SimpleNamespace(added_tokens_decoder={}))
    for what, value in {"extra": extra, "processor": processor, "skipped": [], "digests": {}}.items():
        patch.setattr(run, what, value)
    splits = hub.load_splits(lambda options: rows.load_splits(None, options), options)
    found = {}
    for split, these in splits.items():
        undecoded = these.cast_column(options.image_column, rows.Image(decode=False))
        lengths, _, _ = rows.pick(undecoded, math.inf, set(), options, "training")
        texts = undecoded[options.text_column][:]
        found[split] = [texts[number] for number in sorted(lengths)]
        for number in lengths:  # each formula has its own image
            assert these[number][options.image_column].size == (90, 40)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Taken as they are: each writes a data set, and returns what is named by --dataset_name
# ---------------------------------------------------------------------------------------------------------------------

LATIN = [text.replace("12", "é ü ß") for text in TEXTS]
WINDOWS = [text.replace("12", "‘x’ – €") for text in TEXTS]


def beside(folder, suffix, encoding="utf-8"):
    for name, text in zip(images(folder), TEXTS, strict=True):
        (folder / name).with_suffix(suffix).write_text(text + "\n", encoding=encoding)
    return folder


def two_folders(folder, first, second):
    names = images(folder / first)
    (folder / second).mkdir()
    for name, text in zip(names, TEXTS, strict=True):
        (folder / second / name).with_suffix(".txt").write_text(text)
    return folder


def excel(folder, file="rows.xlsx"):
    book = openpyxl.Workbook()
    book.active.append(["image", "text"])
    for name, text in zip(images(folder), TEXTS, strict=True):
        book.active.append([name, int(text) if text.isdecimal() else text])
    book.save(folder / file)
    return folder / file


def splits_of(folder, make):
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        make(folder / split)
    return folder


def im2latex(folder, line="{number} {stem} basic"):
    images(folder / "formula_images")
    (folder / "im2latex_formulas.lst").write_text("\n".join(TEXTS), encoding="latin-1")
    for split, numbers in {"train": range(6), "test": range(6, 8)}.items():
        lines = [line.format(number=number, stem=number, name=f"{number}.png") for number in numbers]
        (folder / f"im2latex_{split}.lst").write_text("\n".join(lines))
    return folder


def json_lines(file, names, key="image", encoding="utf-8"):
    lines = [json.dumps({key: name, "text": text}) for name, text in zip(names, TEXTS, strict=True)]
    file.write_text("\n\n".join(lines), encoding=encoding)
    return file


def parquet(folder):
    file = table(folder / "rows.csv", images(folder))
    data = load_dataset("csv", data_files=str(file), split="train", keep_default_na=False)
    content = [{"bytes": (folder / name).read_bytes(), "path": name} for name in data["image"]]
    data.remove_columns("image").add_column("image", content).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def with_backslashes(folder):
    return table(folder / "rows.csv", [f"scans\\{name}" for name in images(folder / "scans")])


TAKEN = {
    "commas": lambda at: table(at / "rows.csv", images(at)),
    "semicolons, as a German Excel has them": lambda at: table(at / "rows.csv", images(at), delimiter=";"),
    "tabs": lambda at: table(at / "rows.csv", images(at), delimiter="\t"),
    "tabs in .tsv": lambda at: table(at / "rows.tsv", images(at), delimiter="\t"),
    "commas in .tsv": lambda at: table(at / "rows.tsv", images(at)),
    "pipes": lambda at: table(at / "rows.csv", images(at), delimiter="|"),
    "all cells in quotes": lambda at: table(at / "rows.csv", images(at), quoting=csv.QUOTE_ALL),
    "UTF-8 with a BOM": lambda at: table(at / "rows.csv", images(at), encoding="utf-8-sig"),
    "UTF-16": lambda at: table(at / "rows.csv", images(at), encoding="utf-16"),
    "UTF-16 without BOM": lambda at: table(at / "rows.csv", images(at), encoding="utf-16-le"),
    "UTF-16 of a Mac": lambda at: table(at / "rows.csv", images(at), encoding="utf-16-be", delimiter=";"),
    "UTF-16 and semicolons": lambda at: table(at / "rows.csv", images(at), encoding="utf-16", delimiter=";"),
    "UTF-16 and tabs": lambda at: table(at / "rows.txt.csv", images(at), encoding="utf-16", delimiter="\t"),
    "lines of Unix": lambda at: table(at / "rows.csv", images(at), lineterminator="\n"),
    "a name in capitals": lambda at: table(at / "ROWS.CSV", images(at)),
    "Excel": excel,
    "Excel in a folder": lambda at: excel(at).parent,
    "JSON Lines with empty lines": lambda at: json_lines(at / "rows.jsonl", images(at)),
    "JSON Lines with a column file_name": lambda at: json_lines(at / "rows.jsonl", images(at), "file_name"),
    "parquet": parquet,
    "a folder with a table": lambda at: table(at / "formulas.csv", images(at)).parent,
    "a folder with Metadata.CSV": lambda at: table(at / "Metadata.CSV", images(at), ("file_name", "text")).parent,
    "metadata.csv with a column image": lambda at: table(at / "metadata.csv", images(at)).parent,
    "metadata.csv": lambda at: table(at / "metadata.csv", images(at), ("file_name", "text")).parent,
    "metadata.csv with semicolons": lambda at: table(at / "metadata.csv", images(at), ("file_name", "text"), delimiter=";").parent,  # noqa: E501
    "a column filename": lambda at: table(at / "rows.csv", images(at), ("filename", "text")),
    "a.png and a.txt": lambda at: beside(at, ".txt"),
    "a.png and a.tex": lambda at: beside(at, ".tex"),
    "a.png and a.txt in UTF-16": lambda at: beside(at, ".txt", "utf-16"),
    "images/ and labels/": lambda at: two_folders(at, "images", "labels"),
    "png/ and latex/": lambda at: two_folders(at, "png", "latex"),
    "JPEG files": lambda at: table(at / "rows.csv", images(at, suffix=".JPG", kind="JPEG")),
    "TIFF files": lambda at: table(at / "rows.csv", images(at, suffix=".tif", kind="TIFF")),
    "a folder with spaces": lambda at: table(at / "rows.csv", [f"my scans/{name}" for name in images(at / "my scans")]),
    "backslashes": with_backslashes,
    "absolute paths": lambda at: table(at / "rows.csv", [str(at / name) for name in images(at)]),
    "a list of im2latex": lambda at: im2latex(at) / "im2latex_train.lst",
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_taken_as_it_is(case, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    found = look(TAKEN[case](tmp_path / "data"), monkeypatch)
    im2 = "im2latex" in case
    assert found == {"train": [text.strip() for text in TEXTS[:6]] if im2 else TEXTS}
    assert run.skipped == []


@pytest.mark.parametrize(("encoding", "texts", "called"), [("latin-1", LATIN, "cp1252"), ("cp1252", WINDOWS, "cp1252")])
def test_tables_that_are_no_unicode(encoding, texts, called, tmp_path, monkeypatch, capsys):
    file = table(tmp_path / "rows.csv", images(tmp_path), encoding=encoding, texts=texts, delimiter=";")
    assert look(file, monkeypatch) == {"train": texts}
    assert f"{file} is not UTF-8: it is read as {called}." in capsys.readouterr().out


SPLIT = {
    "train/ and test/ with text files": lambda at: splits_of(at, lambda folder: beside(folder, ".txt")),
    "train/ and test/ with tables": lambda at: splits_of(at, lambda folder: table(folder / "labels.csv", images(folder))),  # noqa: E501
    "a table for train/ and test/": lambda at: table(at / "metadata.csv", [f"{split}/{name}" for split in ("train", "test") for name in images(at / split)], ("file_name", "text"), texts=TEXTS * 2).parent,  # noqa: E501
    "train.csv and test.csv": lambda at: [table(at / f"{split}.csv", images(at)) for split in ("train", "test")][0].parent,  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("case", SPLIT)
def test_splits(case, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    assert look(SPLIT[case](tmp_path / "data"), monkeypatch) == {"train": TEXTS, "test": TEXTS}


@pytest.mark.parametrize("line", ["{number} {stem} basic", "{name} {number}x"])
def test_lists_of_im2latex(line, tmp_path, monkeypatch):
    folder = im2latex(tmp_path, line.replace("{number}x", "{number}"))
    expected = [text.strip() for text in TEXTS]
    assert look(folder, monkeypatch) == {"train": expected[:6], "test": expected[6:]}


# ---------------------------------------------------------------------------------------------------------------------
# Not taken: each writes a data set; the run ends with a sentence that has these words
# ---------------------------------------------------------------------------------------------------------------------


def only_images(at):
    images(at, ["eq one.png", "eq2.png", "eq3.png"])
    return at


def twice_named(at):
    beside(at, ".txt")
    (at / "0.tex").write_text("x")
    return at


def several_folders(at):
    images(at / "a")
    images(at / "b")
    return at


def written(file, content):
    file.write_bytes(content.encode())
    return file


REFUSED = {
    "images alone": (only_images, ["3 images", 'metadata.csv', 'file_name,text\neq one.png,"\\frac{1}{2}"\neq2.png,"']),
    "images in several folders": (several_folders, ["(a, b)", "file_name,text\na/0.png,"]),
    "two texts of an image": (twice_named, ["0.tex", "0.txt", "keep one"]),
    "an empty folder": (lambda at: at, ["no images and no table", ".xlsx"]),
    "two tables": (lambda at: [table(at / name, images(at)) for name in ("a.csv", "b.csv")][0].parent, ["a.csv, b.csv", "--dataset_name"]),  # noqa: E501
    "no names of columns": (lambda at: written(at / "rows.csv", "0.png;x\n1.png;y\n"), ["first line", "'image;text'"]),
    "a formula without quotes": (lambda at: written(at / "rows.csv", "image,text\n0.png,x\n1.png,f(a,b)\n"), ["Line 3", "in quotes"]),  # noqa: E501
    "other columns": (lambda at: written(at / "rows.csv", "scan;latex\n0.png;x\n"), ["--image_column", "'scan', 'latex'"]),  # noqa: E501
    "an empty table": (lambda at: written(at / "rows.csv", ""), ["rows.csv is empty"]),
    "an Excel file that is none": (lambda at: written(at / "rows.xlsx", "image,text"), ["save it as CSV"]),
    "a type that is not known": (lambda at: written(at / "rows.docx", "x"), ["not a supported file", ".xlsx"]),
    "paths that lead nowhere": (lambda at: table(at / "rows.csv", [f"old/{number}.png" for number in range(8)]), ["looked for", "old/0.png", "--image_folder"]),  # noqa: E501
    "paths from another folder": (lambda at: table(at / "rows.csv", [f"old/{name}" for name in images(at / "new")]), ["old/0.png", "There is", "new/0.png", "--image_folder"]),  # noqa: E501
    "images outside": (lambda at: table(at / "rows.csv", [f"../scans/{name}" for name in images(at.parent / "scans")]), ["outside its folder", "--image_folder"]),  # noqa: E501
    "a list of im2latex without formulas": (lambda at: written(at / "train.lst", "0 a x\n"), ["formulas beside it"]),
    "a list of other formulas": (lambda at: (im2latex(at), written(at / "im2latex_train.lst", "99 0 basic\n"))[1], ["formula 99"]),  # noqa: E501
    "a file that is not there": (lambda at: at / "none.csv", ["no such file or folder"]),
    "JSON that ends early": (lambda at: written(at / "rows.jsonl", '{"image": "0.png", "te'), ["Could not load"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(case, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    make, words = REFUSED[case]
    with pytest.raises(SystemExit) as ended:
        look(make(tmp_path / "data"), monkeypatch)
    said = str(ended.value)
    assert [word for word in words if word not in said] == [], said
    assert "network" not in said and "logged in" not in said


def test_where_the_images_are(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    file = table(tmp_path / "data" / "rows.csv", [f"scans\\{name}" for name in images(tmp_path / "work" / "scans")])
    monkeypatch.chdir(tmp_path / "work")
    assert look(file, monkeypatch) == {"train": TEXTS}
    assert f"The paths of the images are found in {tmp_path / 'work'}." in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert look(file, monkeypatch, image_folder=str(tmp_path / "work")) == {"train": TEXTS}
    assert look(file, monkeypatch, image_folder=str(tmp_path / "work" / "scans")) == {"train": TEXTS}
    assert "without the first 1 of their folders" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not a folder"):
        look(file, monkeypatch, image_folder=str(tmp_path / "none"))


def test_rows_are_named_as_people_find_them(tmp_path, monkeypatch, capsys):
    names = images(tmp_path)
    (tmp_path / "0.png").write_bytes(picture(0)[:60])
    (tmp_path / "1.png").write_bytes(b"%PDF-1.7 ...")
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "3.png").unlink()
    texts = ["x\n+ y", *TEXTS[1:]]  # the first row is on two lines of the file
    file = table(tmp_path / "rows.csv", names, texts=texts, lineterminator="\n")
    assert look(file, monkeypatch) == {"train": texts[4:]}
    assert {row["name"]: row["reason"] for row in run.skipped} == {
        "0.png on line 2": "image cut off after 60 bytes",
        "1.png on line 4": "not an image: a PDF file",
        "2.png on line 5": "the file is empty",
        "3.png on line 6": "image file is missing",
    }
    said = capsys.readouterr().out
    assert "Left out 1 training row (image cut off): 0.png on line 2 (after 60 bytes)\n" in said


def test_the_network_is_spoken_of_where_a_hub_was_asked(monkeypatch):
    with pytest.raises(SystemExit) as ended:
        look("nobody/nothing", monkeypatch)
    assert "network" in str(ended.value)


def test_special_tokens_are_still_asked_of_the_processor(tmp_path, monkeypatch):
    file = table(tmp_path / "rows.csv", images(tmp_path), texts=["x <|im_end|>", *TEXTS[1:]])
    look(file, monkeypatch)
    run.processor = AutoProcessor.from_pretrained(ROOT / "demo/model")
    options = SimpleNamespace(image_column="image", text_column="text", max_length=None, seed=0)
    loaded = load_dataset("csv", data_files=str(file), split="train").cast_column("image", rows.Image(decode=False))
    lengths, _, _ = rows.pick(loaded, math.inf, set(), options, "training")
    assert 0 not in lengths
    assert min(lengths.values()) > 90 * 40 / 14**2, "the demo's tokens are 14 pixels wide, not 28"


def test_few_steps_say_how_many_rows_they_need(monkeypatch, capsys):
    texts = [f"x _ {number}" for number in range(10)]
    texts[3] = "x _0"  # held out is row 0
    data = Dataset.from_dict({"text": texts}, split="train")
    state = {"train_rows": data, "test_rows": data, "test_numbers": [0, 1], "validation_set": None, "notes": {}}
    state["extra"] = SimpleNamespace(normalize_latex=False)
    for name, value in state.items():
        monkeypatch.setattr(run, name, value)
    options = SimpleNamespace(text_column="text", num_train_epochs=0, max_steps=2, batch_size=2)
    assert rows.order_rows(lambda lengths, options: [2, 3, 4, 2], {}, options) == [2, 3, 4, 2]
    said = capsys.readouterr().out
    assert "2 steps of 2 need 3 of 8 rows to train on\n" in said
    assert "1 of the held-out images show formulas" in said and run.notes == {"rows_of_seen_formulas": 1}


@pytest.mark.parametrize(
    ("sizes", "side"), [({"patch_size": 7, "merge_size": 2}, 14), ({"patch_size": {}}, 28), ({}, 28)]
)
def test_the_processor_tells_how_large_a_token_is(sizes, side):
    assert rows.token_side(SimpleNamespace(image_processor=SimpleNamespace(**sizes))) == side
    assert rows.token_side(None) == 28, "check may run without a model"
