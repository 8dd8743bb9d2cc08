"""From pictures to LaTeX: `python -m qwen_vl_kit read`, bad files first."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps, TiffImagePlugin
from shaky_hub import ShakyHub
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwen_vl_kit import images, loading, read, reader
from qwen_vl_kit.arguments import Parser, add_model


def save_adapter(base, folder, seed=0):
    """An adapter that changes what the tiny model writes, in `folder`; its processor beside it."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*_proj", init_lora_weights=False))
    model.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.padding_side = "left"
    processor.save_pretrained(folder)
    how = {"instruction": "What is it?", "load_in_4bit": False, "bf16": False, "fp16": False, "quantization": None}
    loading.write_how(folder, how)


@pytest.fixture(scope="module")
def base(tiny):
    return tiny[1]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The folder of a run, its adapter alone."""
    run = tmp_path_factory.mktemp("run")
    save_adapter(base, run / "adapter")
    return run


@pytest.fixture(scope="module")
def pictures():
    rows = load_dataset("demo/data", split="train").select(range(12))
    return rows["image"][:]


@pytest.fixture(autouse=True)
def signals():
    """The command sets some, for a process of its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGPIPE)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments(model, *more):
    parser = Parser("read", "")
    add_model(parser)
    return parser.parse_args([str(model), "--max_new_tokens", "6", *more])


@pytest.fixture(scope="module")
def reads(run):
    return reader.load(arguments(run))


@pytest.fixture
def command(run, capfd):
    """Runs `read` on this model in this process: its exit code, {label: LaTeX}, and what it says beside that."""

    def command(*words, model=run):
        code = 0
        try:
            read.main([str(model), *map(str, words), "--max_new_tokens", "6"], "read")
        except SystemExit as ended:
            code = ended.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        out, err = capfd.readouterr()
        assert all(line.count("\t") == 1 for line in out.splitlines()), out
        return code, dict(line.split("\t") for line in out.splitlines()), err

    return command


def pdf(pictures, file):
    pictures[0].convert("RGB").save(file, "PDF", save_all=True, append_images=pictures[1:])


# ---------------------------------------------------------------------------------------------------------------------
# What can't be read
# ---------------------------------------------------------------------------------------------------------------------


def test_bad_files_are_named_the_others_are_read_and_the_exit_code_says_so(pictures, command, tmp_path):
    pictures[0].save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    bad = {
        "empty.png": (b"", "the file is empty"),
        "text.png": (b"hello", "not an image: 5 bytes of something else"),
        "cut.png": (good[: len(good) // 2], "image cut off after"),
        "bad.pdf": (b"%PDF-1.4 nothing", "a PDF file that is damaged"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
    }
    for name, (content, _) in bad.items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (900, 2)).save(tmp_path / "thin.png")
    Image.new("RGB", (90, 20), "white").save(tmp_path / "blank.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder").mkdir()
    reasons = {name: reason for name, (_, reason) in bad.items()}
    reasons |= {"thin.png": "200 times as long", "pipe.png": "not a file", "folder": "without images"}
    reasons |= {"none.png": "no such file", "blank.png": "image of one color", "link.png": "a link to nothing"}
    reasons["n" * 300] = "no such file"
    code, read, said = command(*(tmp_path / name for name in (*reasons, "good.png")))
    assert code == 1 and [*read] == [str(tmp_path / "good.png")] and "Traceback" not in said
    for name, reason in reasons.items():
        (line,) = [line for line in said.splitlines() if line.startswith(f"{tmp_path / name}: ")]
        assert reason in line
    assert f"{len(reasons)} of {len(reasons) + 1} files could not be read completely" in said.splitlines()[-1]


def test_a_page_that_is_damaged_costs_only_itself(pictures, command, tmp_path, monkeypatch):
    pictures[0].convert("RGB").save(tmp_path / "scan.tif", save_all=True, append_images=pictures[1:3])
    seek = TiffImagePlugin.TiffImageFile.seek
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "seek", lambda self, n: seek(self, 9 if n == 1 else n))
    code, read, said = command(tmp_path / "scan.tif")
    assert code == 1 and [*read] == [f"{tmp_path / 'scan.tif'}#page={number}" for number in (1, 3)]
    assert "scan.tif#page=2: image " in said and "1 of 1 files could not be read completely" in said


SENTENCES = {
    "nothing to read": ([], "name images to read"),
    "both": (["x.png", "--clipboard"], "--clipboard takes no files"),
    "a file without a name": ([""], "an empty name"),
    "another kind of table": (["x.png", "--output", "t.xls"], ".csv, .jsonl or .md"),
    "a resumed nothing": (["x.png", "--resume"], "name it with --output"),
    "no limit": (["x.png", "--max_new_tokens", "0"], "a whole number above 0"),
    "an unknown option": (["x.png", "--batch", "3"], "unknown option --batch; did you mean --batch_size?"),
    "only files that are not there": (["x.png", "y.png"], "x.png: there is no such file"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_mistakes_are_told_before_the_model_is_loaded(case, monkeypatch, capsys):
    monkeypatch.setattr(loading, "find", lambda name: pytest.fail("looked for the model"))
    words, sentence = SENTENCES[case]
    with pytest.raises(SystemExit) as ended:
        read.main(["model", *words], "read")
    assert ended.value.code not in (0, None)
    assert sentence in capsys.readouterr().err + str(ended.value.code)


def test_a_command_is_started_by_its_name(run, pictures, tmp_path):
    """From another directory, in a process of its own, options spelled either way."""
    pictures[0].save(tmp_path / "a.png")
    command = [sys.executable, "-m", "qwen_vl_kit", "read", str(run), "a.png", "none.png", "--max-new-tokens=6"]
    there = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=there, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and ended.stdout.startswith("a.png\t") and len(ended.stdout.splitlines()) == 1
    assert "none.png: there is no such file" in ended.stderr and "Traceback" not in ended.stderr


# ---------------------------------------------------------------------------------------------------------------------
# What can
# ---------------------------------------------------------------------------------------------------------------------


def test_every_kind_of_image_is_what_training_would_take(pictures, reads, command, tmp_path):
    """The same formula in many kinds of files; on paper of another color it would be read otherwise."""
    drawn = pictures[0].convert("L")
    clear = Image.new("RGBA", drawn.size, (0, 0, 0, 0))
    clear.putalpha(drawn.point(lambda level: 255 - level))
    turned = Image.Exif()
    turned[0x0112] = 6
    drawn.save(tmp_path / "gray.png")
    clear.save(tmp_path / "clear.PNG")
    drawn.convert("RGB").save(tmp_path / "rgb.webp", lossless=True)
    drawn.convert("I;16").point(lambda level: level * 256).save(tmp_path / "deep.TIF")
    drawn.convert("RGB").convert("CMYK").save(tmp_path / "cmyk.tiff")
    drawn.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    (tmp_path / "notes.txt").write_text("not one of them")
    code, read, said = command(tmp_path)
    assert code == 0 and len(read) == 6, said
    (wanted,) = reads.read([drawn.convert("RGB")])
    assert {*read.values()} == {" ".join(wanted.text.split())}


def test_pages_and_folders_and_standard_input(pictures, command, tmp_path, monkeypatch):
    (tmp_path / "scans" / "deeper").mkdir(parents=True)
    (tmp_path / "scans" / ".hidden").mkdir()
    for name in ("page10.png", "page9.png", "deeper/a.JPG", ".hidden/b.png"):
        pictures[3].convert("RGB").save(tmp_path / "scans" / name)
    pictures[0].convert("RGB").save(tmp_path / "two.tif", save_all=True, append_images=pictures[1:2])
    pdf(pictures[:2], tmp_path / "two.pdf")
    content = io.BytesIO((tmp_path / "scans" / "page9.png").read_bytes())
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": content}))
    monkeypatch.chdir(tmp_path)
    code, read, said = command("two.pdf", "scans", "-", "two.tif", "scans/page9.png")
    assert code == 0, said
    assert [*read] == [
        "two.pdf#page=1", "two.pdf#page=2", "scans/deeper/a.JPG", "scans/page9.png", "scans/page10.png", "-",
        "two.tif#page=1", "two.tif#page=2",
    ]  # fmt: skip
    assert read["-"] == read["scans/page9.png"] == read["scans/page10.png"]
    assert "Each page of a PDF file is read as one formula" in said


def test_a_program_needs_three_lines(run, pictures, reads, tmp_path):
    """Transparent paper is white there, too; a file is as good as an image."""
    drawn = pictures[0].convert("L")
    clear = Image.new("RGBA", drawn.size, (0, 0, 0, 0))
    clear.putalpha(drawn.point(lambda level: 255 - level))
    clear.save(tmp_path / "clear.png")
    opened = reader.open_model(str(run), max_new_tokens=6)
    found = opened.read([clear, tmp_path / "clear.png", str(tmp_path / "clear.png")])
    assert [reading.text for reading in found] == [reads.read([drawn])[0].text] * 3


def test_a_pdf_page_is_drawn_large_enough_to_be_read_and_no_larger(tmp_path):
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(1, 0.5))
    figure.text(0.1, 0.3, "$x^2$", fontsize=10)
    figure.savefig(tmp_path / "small.pdf")
    figure.set_size_inches(100, 50)
    figure.savefig(tmp_path / "poster.pdf")
    ((_, small),) = images.pages("small", tmp_path / "small.pdf")
    ((_, poster),) = images.pages("poster", tmp_path / "poster.pdf")
    assert small.size == (200, 100) and small.mode == "RGB" and len(small.getcolors(999)) > 5
    assert max(poster.size) == images.LONGEST


def test_batches_change_nothing_but_the_time(pictures, reads):
    pictures = [ImageOps.invert(picture.convert("L")) for picture in pictures]  # blackboards all read alike
    alone = [reads.read([picture.convert("RGB")])[0] for picture in pictures]
    together = reads.read([picture.convert("RGB") for picture in pictures])
    assert [reading.text for reading in together] == [reading.text for reading in alone]
    assert [reading.certainty for reading in together] == pytest.approx([one.certainty for one in alone], abs=1e-3)
    assert len({reading.text for reading in alone}) > 1, "the model reads the same in all: the comparison shows nothing"


def test_how_certain_the_model_was(pictures, reads, monkeypatch):
    """Against the log-probabilities of the model's own tokens, computed by asking for all of them at once."""
    picture = pictures[0].convert("RGB")
    (reading,) = reads.read([picture])
    inputs = reads.inputs([picture])
    written = reads.generate([picture])
    tokens = torch.cat([inputs["input_ids"], written], dim=1)
    more = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    types = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(written)], dim=1)
    with torch.no_grad():
        logits = reads.model(input_ids=tokens, mm_token_type_ids=types, **more).logits[0, -written.shape[1] - 1 : -1]
    certainty = logits.log_softmax(-1).gather(1, written[0][:, None]).mean().item()
    assert reading.certainty == pytest.approx(certainty, abs=1e-4) and reading.certainty < 0
    assert reading.cut, "a random model ends nothing"
    # Where it ends: tokens after the end count for nothing.
    monkeypatch.setattr(reads, "ends", written[0, 2:3])
    (ended,) = reads.read([picture])
    first = logits.log_softmax(-1).gather(1, written[0][:, None])[: 1 + written[0].tolist().index(written[0, 2])]
    assert not ended.cut and ended.certainty == pytest.approx(first.mean().item(), abs=1e-4)


def test_a_streamed_reading_is_the_same_and_can_be_stopped(pictures, reads):
    picture = pictures[0].convert("RGB")
    (reading,) = reads.read([picture])
    pieces = [*reads.stream(picture)]
    assert "".join(piece.text for piece in pieces) == reading.text and len(pieces) == reads.limit
    assert reading.cut and not any(piece.ends for piece in pieces)
    certainty = sum(math.log(piece.probability) for piece in pieces) / len(pieces)
    assert certainty == pytest.approx(reading.certainty, abs=1e-4)
    taken = []
    for piece in reads.stream(picture, stopped=lambda: len(taken) > 1):
        taken.append(piece)
    assert len(taken) < reads.limit
    generation = reads.stream(picture)
    next(generation)
    generation.close()  # as when somebody leaves


def test_what_goes_wrong_while_it_streams_is_raised(pictures, reads, monkeypatch):
    monkeypatch.setattr(reads, "inputs", lambda pictures: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(reads.stream(pictures[0]))


def test_a_batch_that_does_not_fit_is_halved(pictures, reads, monkeypatch):
    sizes, read_batch = [], reads.read_batch

    def short_of_memory(pictures, limit):
        sizes.append(len(pictures))
        if len(pictures) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return read_batch(pictures, limit)

    monkeypatch.setattr(reads, "read_batch", short_of_memory)
    monkeypatch.setattr(reads, "batch_size", 8)
    assert len(reads.read([picture.convert("RGB") for picture in pictures])) == len(pictures)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2]
    monkeypatch.setattr(reads, "read_batch", lambda *_: [][0])
    with pytest.raises(IndexError):
        reads.read(pictures)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(table):
    """{file: LaTeX} of a table, read as other programs would."""
    if table.suffix == ".jsonl":
        return {row["file"]: row["latex"] for row in map(json.loads, table.read_text().splitlines())}
    if table.suffix == ".csv":
        rows = load_dataset("csv", data_files=str(table), split="train")
        return dict(zip(rows["file"], rows["latex"], strict=True))
    lines = table.read_text().splitlines()[2:]
    cells = [line.removeprefix("| ").split(" | ") for line in lines]
    cells = [[cell.replace(r"\|", "|") for cell in row] for row in cells]
    return {file: latex.strip("` ") for file, latex, *_ in cells}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "md"])
def about(table):
    return json.loads(table.with_name(f"{table.name}.about").read_text())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "md"])
def test_a_table_goes_on_where_it_was_interrupted(kind, pictures, command, tmp_path):
    odd = [
        'a, "odd".png',
        "b | c.png",
        "d\\.png",
        "tab\tand\nline.png",
        "e.png#page=2",
        "f\u2028g.png",
        os.fsdecode(b"\xff.png"),
    ]
    files = [tmp_path / name for name in odd]
    for file, picture in zip(files, pictures, strict=False):
        with open(file, "wb") as opened:
            picture.save(opened, "PNG")
    table = tmp_path / f"table.{kind}"
    labels = [images.printable(str(file)) for file in files]
    code, all_read, said = command(*files[:4], tmp_path / "none.png", "--output", table)
    assert code == 1 and not about(table)["complete"] and "--resume" in said
    table.write_bytes(table.read_bytes()[:-7])  # as a kill leaves it
    pictures[9].save(tmp_path / "none.png")
    code, read, said = command(*files, tmp_path / "none.png", "--output", table, "--resume")
    assert code == 0 and about(table)["complete"], said
    assert [*read] == [*labels[3:], str(tmp_path / "none.png")], "what was whole is not read again"
    assert len(rows_of(table)) == len(files) + 1 and rows_of(table) == all_read | read
    code, read, said = command(*files, "--output", table, "--resume")
    assert code == 0 and not read and "has them all" in said
    # Another file makes it longer; one whose name a page of another could have is not taken for that.
    pictures[8].save(tmp_path / "e.png")
    code, read, said = command(*files, tmp_path / "e.png", "--output", table, "--resume")
    assert code == 0 and [*read] == [str(tmp_path / "e.png")] and len(rows_of(table)) == len(files) + 2


def test_one_file_is_read_once(pictures, command, tmp_path, monkeypatch):
    pictures[0].save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    code, read, said = command("a.png", "./a.png", tmp_path / "a.png", ".")
    assert code == 0 and [*read] == ["a.png"]


def test_a_table_is_never_overwritten_nor_mixed(base, pictures, command, tmp_path, monkeypatch):
    pictures[0].save(tmp_path / "a.png")
    table = tmp_path / "table.csv"
    table.write_text("my own notes\n")
    for words, sentence in (([], "is there already"), (["--resume"], "was not made by this command")):
        code, read, said = command(tmp_path / "a.png", "--output", table, *words)
        assert code and not read and sentence in said and table.read_text() == "my own notes\n"
    table.unlink()
    assert command(tmp_path / "a.png", tmp_path / "none.png", "--output", table)[0] == 1
    before = table.read_bytes()
    save_adapter(base, tmp_path / "other" / "adapter", seed=1)
    resume = (tmp_path / "a.png", "--output", table, "--resume")
    for words, how, name in (
        ((), {"model": tmp_path / "other"}, "model"),
        (("--load_in_4bit",), {}, "load in 4bit"),
        (("--instruction", "Read!"), {}, "instruction"),
    ):
        code, read, said = command(*resume, *words, **how)
        assert code and not read and f"was made with {name} " in said and table.read_bytes() == before
    monkeypatch.chdir(tmp_path)
    assert f"was made with folder {ROOT}" in command(*resume)[2]
    code, read, said = command(tmp_path / "a.png", "--output", tmp_path / "none" / "t.csv")
    assert code == 1 and "there is no folder" in said and "Traceback" not in said
    # If the model can't be loaded, nothing is left that would be in the way.
    code, read, said = command(tmp_path / "a.png", "--output", tmp_path / "new.csv", model=tmp_path / "other2")
    assert code and not [*tmp_path.glob("new*")]


def test_a_table_says_what_was_cut_and_how_certain_the_model_was(pictures, reads, command, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    assert command(tmp_path / "a.png", "--output", tmp_path / "t.jsonl")[0] == 0
    (row,) = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    (reading,) = reads.read([pictures[0].convert("RGB")])
    assert row["cut"] is True and row["certainty"] == round(reading.certainty, 4) and row["latex"] == reading.text


def test_ctrl_c_keeps_what_was_read(run, pictures, tmp_path):
    for number in range(60):
        pictures[number % 12].save(tmp_path / f"{number}.png")
    table = tmp_path / "t.csv"
    command = [sys.executable, "-m", "qwen_vl_kit", "read", str(run), str(tmp_path), "--output", str(table)]
    command += ["--max_new_tokens", "200", "--batch_size", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not table.exists() or len(table.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said and "--resume reads the rest" in said
    assert 2 <= len(rows_of(table)) < 60


# ---------------------------------------------------------------------------------------------------------------------
# The clipboard
# ---------------------------------------------------------------------------------------------------------------------


def test_the_clipboard(run, pictures, reads, tmp_path, monkeypatch, capfd):
    """Programs that stand in for the desktop's: one holds an image, the other keeps what it is given."""
    pictures[0].save(tmp_path / "copied.png")
    (tmp_path / "xclip").write_text(
        f'#!/bin/sh\ncase "$*" in *-o*) cat {tmp_path}/copied.png;; *) cat > {tmp_path}/pasted;; esac\n'
    )
    (tmp_path / "xclip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("XDG_SESSION_TYPE", raising=False)
    (reading,) = reads.read([pictures[0].convert("RGB")])
    read.main([str(run), "--clipboard", "--max_new_tokens", "6"], "read")
    assert capfd.readouterr().out == f"{reading.text}\n"
    assert (tmp_path / "pasted").read_text() == reading.text
    (tmp_path / "copied.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="Nothing was read"):
        read.main([str(run), "--clipboard"], "read")


# ---------------------------------------------------------------------------------------------------------------------
# Which model
# ---------------------------------------------------------------------------------------------------------------------


def merge_of(run, base, folder):
    """A whole model of another size than the adapter's base, and the note of what it was made of."""
    from qwen_vl_kit.finished import NOTE, adapter_sums

    AutoModelForImageTextToText.from_pretrained(base).save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    (folder / NOTE).write_text(json.dumps(adapter_sums(run)))


def test_the_merge_is_taken_only_if_it_is_this_adapter_s(base, tmp_path, capsys):
    save_adapter(base, tmp_path / "adapter")
    merge_of(tmp_path, base, tmp_path / "merged")
    assert loading.find(str(tmp_path)).model == str(tmp_path / "merged")
    assert f"Reading with {tmp_path / 'merged'}" in capsys.readouterr().err
    save_adapter(base, tmp_path / "adapter", seed=1)
    assert loading.find(str(tmp_path)).model == str(tmp_path / "adapter")
    assert "was made of another adapter" in capsys.readouterr().err


def test_what_a_model_is_asked_and_how_it_is_loaded(base, run, capsys):
    assert reader.load(arguments(run)).instruction == "What is it?"
    assert reader.load(arguments(run, "--instruction", "Read!")).instruction == "Read!"
    assert "no record" not in capsys.readouterr().err
    whole = reader.load(arguments(base))
    assert whole.instruction == loading.INSTRUCTION and "no record of how it was trained" in capsys.readouterr().err
    assert not whole.source.is_adapter
    in_4_bits = reader.load(arguments(base, "--load_in_4bit"))
    assert in_4_bits.model.is_loaded_in_4bit and not getattr(whole.model, "is_loaded_in_4bit", False)


def test_an_adapter_that_does_not_fit_is_not_read_as_its_base(base, tmp_path):
    """Weights of other names, or half of them: PEFT warns, and goes on with what adapters start as."""
    from safetensors.torch import load_file, save_file

    save_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    for some in ({f"x.{name}": weight for name, weight in weights.items()}, dict([*weights.items()][1:]), {}):
        save_file(some, file)
        with pytest.raises(
            SystemExit, match=f"does not fit the base model .*{len(weights.keys() - some)} of its weights"
        ):
            reader.load(arguments(tmp_path))


@pytest.mark.parametrize(
    "change", [{"instruction": None}, {"load_in_4bit": "false"}, {"quantization": "nf4"}, {"bf16": 1}]
)
def test_how_it_was_trained_is_known_or_refused(change, base, tmp_path):
    save_adapter(base, tmp_path / "adapter")
    how = json.loads((tmp_path / "adapter" / "reading.json").read_text()) | change
    (tmp_path / "adapter" / "reading.json").write_text(json.dumps(how))
    with pytest.raises(SystemExit, match=f"it does not say {next(iter(change))}"):
        loading.find(str(tmp_path))


def test_a_checkpoint_is_read_as_its_run(base, tmp_path):
    save_adapter(base, tmp_path / "checkpoint-2")
    how = json.loads((tmp_path / "checkpoint-2" / "reading.json").read_text()) | {"instruction": "And this?"}
    (tmp_path / "checkpoint-2" / "reading.json").unlink()
    (tmp_path / "checkpoint-2" / "run.json").write_text(json.dumps({"settings": how}))
    assert reader.load(arguments(tmp_path / "checkpoint-2")).instruction == "And this?"


def test_a_base_that_is_gone_or_moved(base, tmp_path, monkeypatch):
    """A relative path is found from any folder above the adapter; what is nowhere is named."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(base)
    save_adapter(base, tmp_path / "outputs" / "adapter")
    config = tmp_path / "outputs" / "adapter" / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": "models/tiny"}
    config.write_text(json.dumps(named))
    monkeypatch.chdir("/")
    assert reader.load(arguments(tmp_path / "outputs")).read([Image.new("RGB", (80, 40), "white")])
    (tmp_path / "models" / "tiny").unlink()
    with pytest.raises(SystemExit, match="'models/tiny' of this adapter was not found"):
        reader.load(arguments(tmp_path / "outputs"))


@pytest.mark.parametrize("name", ["nowhere/at/all", "none", "tests/nothing"])
def test_a_model_that_is_not_there(name):
    with pytest.raises(SystemExit) as ended:
        loading.find(name)
    assert name in str(ended.value.code)


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        loading.find(str(tmp_path))


def test_a_name_on_the_hub(base, run, pictures, command, tmp_path):
    """An adapter, and the base that it names; the second time nothing is asked."""
    shutil.copytree(base, tmp_path / "models" / "somebody" / "base")
    shutil.copytree(run / "adapter", tmp_path / "models" / "somebody" / "latex")
    config = tmp_path / "models" / "somebody" / "latex" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "somebody/base"}))
    (tmp_path / "models" / "somebody" / "latex" / "notes.bin").write_text("of no use here")
    pictures[0].save(tmp_path / "a.png")
    hub = ShakyHub(tmp_path)
    there = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-m", "qwen_vl_kit", "read", "somebody/latex", str(tmp_path / "a.png")]
    words += ["--max_new_tokens", "6"]
    for asked in (True, False):
        hub.asked.clear()
        ended = subprocess.run(words, cwd=ROOT, env=there, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0 and "no record" not in ended.stderr, ended.stderr[-3000:]
        assert ended.stdout.split("\t")[1].strip() == command(tmp_path / "a.png")[1][str(tmp_path / "a.png")]
        assert bool(hub.asked) == asked and not [path for path in hub.asked if "notes.bin" in path]
    words[4] = "somebody/nothing"
    ended = subprocess.run(words, cwd=ROOT, env=there, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert "Could not load the model 'somebody/nothing'" in ended.stderr.splitlines()[-1]
    hub.server.shutdown()
