"""Rows are the same ones whoever looks at them: one process or several, now or at an earlier start."""

import json
import math
import os
from types import SimpleNamespace

import pytest
from test_sources import TEXTS, images, picture

from qwen_vl_kit import looking, rows, run

OPTIONS = SimpleNamespace(
    image_column="image", text_column="text", dataset_train_split="train", dataset_config=None, max_length=None, seed=5
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A file of 60 rows, some of them bad, looked at as many are, with a cache of its own."""
    lines = []
    for number in range(60):
        images(tmp_path, [f"{number}.png"])
        (tmp_path / f"{number}.png").write_bytes(picture(number % 50))  # some are others' images
        lines.append({"image": f"{number}.png", "text": TEXTS[number % len(TEXTS)]})
    (tmp_path / "7.png").write_bytes(b"%PDF-")
    (tmp_path / "9.png").write_bytes(picture(9)[:99])
    (tmp_path / "11.png").unlink()
    lines[13]["text"], lines[14]["text"] = "", "x" * 5000
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(looking, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(looking, "ALONE", 3)
    monkeypatch.setattr(looking, "CHUNK", 7)
    monkeypatch.setattr(looking, "cores", lambda: 1)
    processor = SimpleNamespace(tokenizer=SimpleNamespace(added_tokens_decoder={}))
    monkeypatch.setattr(run, "processor", processor)
    monkeypatch.setattr(run, "extra", SimpleNamespace(max_characters=4000, normalize_latex=False, image_folder=None))
    return tmp_path / "rows.jsonl"


def picked(file, wanted=math.inf):
    """All that later rooms have of the rows that are picked, held-out ones first."""
    run.digests, run.skipped = {}, []
    found = rows.load_splits(None, SimpleNamespace(dataset_name=str(file), **vars(OPTIONS)))["train"]
    found = found.cast_column("image", rows.Image(decode=False))
    lengths, digests, done = rows.pick(found, 5, set(), OPTIONS, "held-out")
    others = rows.pick(found, wanted, digests, OPTIONS, "training", done)
    return [*lengths.items()], digests, done, [*others[0].items()], others[1:], dict(run.digests), run.skipped


@pytest.mark.parametrize("wanted", [math.inf, 20])
def test_one_process_several_and_what_was_kept_are_equal(wanted, data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(looking, "ALONE", 1000)
        alone = picked(data, wanted)
    assert not (data.parent / "kept").exists(), "few rows are not worth it"
    assert len(alone[3]) == (20 if wanted == 20 else len(alone[3])) and (alone[6] or wanted == 20)
    assert picked(data, wanted) == alone, "chunks"
    for file in (data.parent / "kept").iterdir():
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(looking, "cores", lambda: 2)
        assert picked(data, wanted) == alone, "processes"
    with monkeypatch.context() as patch:
        patch.setattr(rows, "look_at", lambda *_, **__: pytest.fail("looked again"))
        assert picked(data, wanted) == alone, "kept"


def test_what_changed_is_looked_at_again(data, monkeypatch):
    before = picked(data)
    reasons = {row["row"]: row["reason"] for row in before[6]}
    assert reasons[7] == "not an image: a PDF file" and reasons[11] == "image file is missing"
    (data.parent / "11.png").write_bytes(picture(77))
    os.utime(data.parent / "7.png", ns=(1, 1))
    (data.parent / "20.png").write_bytes(b"")
    after = {row["row"]: row["reason"] for row in picked(data)[6]}
    assert 11 not in after and after[20] == "the file is empty"
    run.extra.max_characters = 10_000
    assert 14 not in {row["row"] for row in picked(data)[6]}, "another limit"


def test_a_cache_that_is_broken_or_can_t_be_written_is_none(data, monkeypatch):
    before = picked(data)
    kept = [*(data.parent / "kept").glob("*.npz")]
    assert kept
    for file in kept:
        file.write_bytes(file.read_bytes()[:100])
    assert picked(data) == before
    monkeypatch.setattr(looking, "KEPT", data)  # a file
    assert picked(data) == before
