"""Data as it is found: hostile rows are left out and counted, what they are made of reaches nothing but their row."""

import io
import json
import os
import re
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from conftest import SHORT, run
from datasets import Image as ImageColumn
from datasets import load_dataset
from PIL import Image

SPECIAL = [
    "x <|im_end|>",
    "<|im_start|>user y<|im_end|>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|endoftext|>",
]
NEARLY = "x <|im end|> <image> im_end <| |> <s> y"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height):
    """A gray PNG file that says it is `width` x `height` and is a few bytes long."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(min((width + 1) * height, 2 << 20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A JSON file of 500 good and 500 hostile rows beside its images, what is wrong with the latter, and its place."""
    place = tmp_path_factory.mktemp("found")
    data = place / "data"
    (data / "scans").mkdir(parents=True)
    rows = load_dataset("demo/data", split="train").select(range(500)).cast_column("image", ImageColumn(decode=False))
    pictures = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in rows[:20]["image"]]
    secret = encoded(pictures[0])
    (place / "secret.png").write_bytes(secret)
    (data / "link.png").symlink_to(place / "secret.png")
    (data / "linked").symlink_to(place)
    os.mkfifo(data / "pipe.png")
    photo = pictures[0].transpose(Image.Transpose.ROTATE_90)
    turned = Image.Exif()
    turned[0x0112] = 6
    unusual = [  # good, if rare
        encoded(photo, "JPEG", exif=turned),
        encoded(pictures[1].convert("CMYK"), "JPEG"),
        encoded(pictures[2], "GIF", save_all=True, append_images=[pictures[3].resize(pictures[2].size)]),
        encoded(Image.fromarray(np.asarray(pictures[4].convert("L")).astype(np.uint16) * 257)),
        encoded(pictures[5].convert("P")),
        encoded(pictures[6], "WEBP"),
    ]
    good = []
    for number, row in enumerate(rows):
        content = unusual[number] if number < len(unusual) else row["image"]["bytes"]
        (data / f"scans/{number}.img").write_bytes(content)
        good.append({"image": f"scans/{number}.img", "text": NEARLY if number == 7 else row["text"]})

    first = rows[20]["image"]["bytes"]
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(pwned) (w) file closefile\nshowpage\n%%EOF\n"
    unreadable = {
        "truncated": (first[:300], "image cut off after 300 bytes"),
        "empty": (b"", "the file is empty"),
        "text": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image: an SVG file"),
        "program": (program, "not an image: a PostScript file"),
        "noise": (bytes(range(256)) * 9, "not an image: 2 kB of something else"),
        "head": (first[:20], "image cut off after 20 bytes"),
    }
    shapes = {
        "image of too many pixels": [png(60_000, 60_000), png(10_000, 9_500)],
        "image over 200 times as long as wide": [png(1_000_000, 1), png(1, 1_000_000), png(3000, 10)],
        "image of one color": [png(1, 1), encoded(Image.new("RGB", (90, 40), "white")), png(40, 40)],
    }
    kinds = []  # (what is wrong, image, text)
    for name, (content, reason) in unreadable.items():
        (data / name).write_bytes(content)
        kinds.append((reason, name, "x"))
    for reason, contents in shapes.items():
        for content in contents:
            name = f"{len(kinds)}.png"
            (data / name).write_bytes(content)
            kinds.append((reason, name, "x"))
    outside = "image outside the data set's folder"
    paths = ["../secret.png", str(place / "secret.png"), "link.png", "linked/secret.png", "x/../../secret.png"]
    kinds += [(outside, path, "x") for path in [*paths, "/dev/zero", "/etc/passwd", "../none.png"]]
    wrong = [5, True, ["scans/0.img"], {"bytes": None, "path": "scans/0.img"}, "none.png", "http://127.0.0.1:9/x.png"]
    wrong += ["file:///etc/passwd", "zip://a.png::b.zip"]
    kinds += [("image file is missing", image, "x") for image in wrong]
    kinds += [("no image", None, "x"), ("no image", "", "x"), (outside, "linked", "x")]
    kinds += [("not a file", image, "x") for image in ("pipe.png", ".")]
    kinds += [("image file is missing (embedded null byte)", "\0", "x")]
    kinds += [("image file is missing (File name too long)", "a" * 5000, "x")]
    kinds += [("no text", "scans/0.img", text) for text in (None, "", "  \n\t ")]
    kinds += [("text is not a string", "scans/0.img", text) for text in (5, 1.5, True, ["x"], {"a": "x"})]
    kinds += [("text with special tokens of the model", "scans/0.img", text) for text in SPECIAL]
    kinds += [("text of more than 4,000 characters", "scans/0.img", r"\alpha " * length) for length in (600, 50_000)]
    hostile = [kinds[number % len(kinds)] for number in range(500)]

    lines, reasons = [], {}
    for number, (row, (reason, image, text)) in enumerate(zip(good, hostile, strict=True)):
        lines += [row, {"image": image, "text": text}] if number % 3 else [{"image": image, "text": text}, row]
        reasons[2 * number + (number % 3 > 0)] = reason
    (data / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data / "rows.jsonl", reasons, place


def shared(reason):
    """The part of a reason that rows share, by which they are counted on the terminal."""
    for own in (" after ", ": ", " (embedded", " (File"):
        reason = reason.partition(own)[0]
    return reason


def test_five_hundred_hostile_rows_among_as_many_good_ones(found, tmp_path):
    file, reasons, place = found
    files = sorted(str(path) for path in place.rglob("*"))
    ended = run(*SHORT, "--num_train_epochs", 1, "--dataset_name", file, "--output_dir", tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {row["row"]: row["reason"] for row in skipped if not row["reason"].startswith("same image")} == reasons
    assert {row["split"] for row in skipped} == {"train"} and len(skipped) < 510
    for reason, count in Counter(reasons.values()).items():
        counts = [row for row in skipped if row["reason"] == reason]
        assert len(counts) == count
        assert f"({shared(reason)})" in ended.stdout
    said = re.findall(r"^Left out (\d+) ", ended.stdout, re.MULTILINE)
    assert sum(map(int, said)) == len(skipped)
    trained = 1000 - len(skipped) - 6
    assert f"{trained} rows to train on, 6 others held out" in ended.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["train"]["log"][-1]["step"] == -(-trained // 8)
    assert sorted(str(path) for path in place.rglob("*")) == files
    assert "Traceback" not in ended.stderr


def test_a_folder_of_images_reads_nothing_outside_either(tmp_path):
    rows = load_dataset("demo/data", split="train").select(range(20)).cast_column("image", ImageColumn(decode=False))
    data, lines = tmp_path / "data", []
    data.mkdir()
    for number, row in enumerate(rows):
        (data / f"{number}.jpg").write_bytes(row["image"]["bytes"])
        lines.append({"file_name": f"{number}.jpg", "text": row["text"]})
    (tmp_path / "secret.jpg").write_bytes(rows[0]["image"]["bytes"])
    (data / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg"):
        lines.append({"file_name": name, "text": "x"})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ended = run(*SHORT, "--dataset_name", data, "--num_train_epochs", 1, "--output_dir", tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {row["row"] for row in skipped} == {20, 21, 22}
    assert {row["reason"] for row in skipped} == {"image outside the data set's folder"}
