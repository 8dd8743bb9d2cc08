"""`python -m qwen_vl_kit check`: what is in a data set, before a GPU is rented."""

import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ROOT
from datasets import Dataset
from test_sources import TEXTS, images, picture, table

from qwen_vl_kit import check, run
from qwen_vl_kit.checking import CHAT, around, look_at, spelled_in


def test_everything_is_told_and_named(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for split, texts in {"train": [*TEXTS, r"$ \frac { 1 } { 3 } $", "x"], "test": ["12", "y"]}.items():
        (data / split).mkdir()
        names = images(data / split, [f"{split}{number}.png" for number in range(len(texts))])
        table(data / split / "rows.csv", names, texts=texts)
    (data / "train" / "train2.png").write_bytes(picture(2)[:70])
    (data / "train" / "train9.png").write_bytes(picture(7))  # with TEXTS[7] it is that row's image
    page = tmp_path / "page.html"
    check.main(["--dataset_name", str(data), "--output", str(page), "--max_length", "500"], "check")
    said = capsys.readouterr().out
    assert "train: 9 of 10 rows can be used" in said and "test: 2 of 2 rows can be used" in said
    assert "left out: 1 (image cut off): train/train2.png on line 4 (after 70 bytes)" in said
    assert "1 row has the image of another one, and another text" in said
    assert "2 images are in train and in test: a run does not train on those." in said
    assert "1 of 2 formulas of test are also in train." in said
    assert "1 stand in $...$" in said and "1 have spaces between tokens, 2 have none" in said
    assert "images: 90 pixels wide (90 to 90), 40 high (40 to 40)" in said
    assert "(the limit: 500)" in said
    html = page.read_text()
    assert "train/train2.png on line 4" in html and html.count("data:image/png;base64,") == 11
    assert "<script" not in html and not re.search(r"(src|href)=\"(?!data:)", html)


def test_the_demo_as_users_type_it(tmp_path):
    command = [
        sys.executable,
        "-m",
        "qwen_vl_kit",
        "check",
        "--dataset_name",
        "demo/data",
        "--output",
        tmp_path / "a.html",
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([*command, "--model_name_or_path", "demo/model"], cwd=ROOT, env=environment,
                           capture_output=True, text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "rows can be used" in ended.stdout and re.search(r"tokens: \d+, at most", ended.stdout), "not about: counted"
    assert "Traceback" not in ended.stderr
    counted = "Tokens: an image has one for every 14 x 14 pixels; text is counted as demo/model does."
    assert counted in ended.stdout and counted in (tmp_path / "a.html").read_text()


def test_image_tokens_are_as_large_as_the_model_has_them():
    row = {"image": {"bytes": picture(1), "path": None}, "text": "x"}
    wanted = {"image_column": "image", "text_column": "text", "max_length": None, "max_characters": 9}
    wanted = SimpleNamespace(**wanted, min_pixels=30_000, max_pixels=None)
    run.extra = wanted
    large, small = (look_at(row, wanted, [], None, side).tokens - CHAT for side in (28, 14))
    assert 30_000 / 28**2 <= large < 60 and 30_000 / 14**2 <= small < 200


def test_nothing_that_can_be_used_is_an_error(tmp_path):
    Dataset.from_dict({"image": [{"bytes": b"x", "path": None}], "text": ["x"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(SystemExit) as ended:
        check.main(["--dataset_name", str(tmp_path / "rows.parquet"), "--output", str(tmp_path / "a.html")], "check")
    assert ended.value.code == 1
    with pytest.raises(SystemExit, match=r"name end in \.html"):
        check.main(["--dataset_name", "x", "--output", str(tmp_path / "rows.parquet")], "check")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x", ""), (" $x$ ", "$"), ("$$x$$", "$$"), (r"\[ x \]", r"\["), (r"\(x\)", r"\("), (r"$x$ and $y$", ""),
        (r"\begin{equation*} x \end{equation*}", r"\begin{equation*}"),
        (r"\begin{align} x \end{align}", r"\begin{align}"),
        (r"\begin{array} { c } x \end{array}", ""),
    ],
)  # fmt: skip
def test_what_stands_around_a_formula(text, found):
    assert around(text) == found
    part = {
        "spellings": Counter({found: 2, "$" if found == "" else "": 1}),
        "spacings": Counter(),
        "letters": Counter(),
    }
    said = spelled_in(part)
    assert f"{2 if found else 1} stand in " in said and (found or "$") in said
