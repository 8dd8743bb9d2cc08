"""What can't be seen from outside: who trains on what, and what the loss looks at."""

import io

import numpy as np
import pytest
import torch
from conftest import SCRIPT, SHORT
from datasets import load_dataset
from peft import PeftModel
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig


def pixels(samples):
    return {sample["image"].tobytes() for sample in samples}


def test_held_out_images_are_never_trained_on(execute, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    rows = load_dataset("demo/data", split="train").select(range(60))
    doubled = [*range(60), *range(30)]  # a split of these has rows on both sides, unless somebody looks
    rows.select(doubled).to_parquet(tmp_path / "data" / "rows.parquet")
    names = execute(
        *SHORT, "--output_dir", tmp_path, "--dataset_name", tmp_path / "data" / "rows.parquet", "--max_steps", -1,
        until="Model",
    )  # fmt: skip
    image = names["settings"].image_column
    held_out = {row[image]["bytes"] for row in names["test_rows"]}
    trained = {row[image]["bytes"] for row in names["train_rows"]}
    assert len(held_out) >= 5 and len(trained) >= 50
    assert not held_out & trained
    assert len(names["train_rows"]) < len(doubled) - len(names["test_rows"]), "no doubles were left out"
    assert names["seen"] == 0
    # The same formula in another image is held out all the same, and said.
    twice = rows.remove_columns("text").add_column("text", ["x + y"] * 60)
    twice.to_parquet(tmp_path / "data" / "rows.parquet")
    names = execute(
        *SHORT, "--output_dir", tmp_path, "--dataset_name", tmp_path / "data" / "rows.parquet", until="Model"
    )
    assert names["seen"] == len(names["test_rows"]) == 6
    assert "(6 of them of formulas that other images in training show)" in capsys.readouterr().out


def test_labels_are_the_answer_and_its_end_token(execute, tmp_path):
    names = execute(*SHORT, "--output_dir", tmp_path, until="Before")
    assert not pixels(names["train_set"]) & pixels(names["test_set"])
    tokenizer = names["processor"].tokenizer
    samples = [names["train_set"][i] for i in range(8)]
    batch = names["collate"](samples)
    assert batch["labels"].shape == batch["input_ids"].shape
    for sample, text, ids, labels in zip(
        samples, names["train_rows"]["text"], batch["input_ids"].tolist(), batch["labels"].tolist(), strict=False
    ):
        learned = [label for label in labels if label != -100]
        first = labels.index(learned[0])
        assert learned == ids[first : first + len(learned)]
        assert tokenizer.decode(learned) == text.strip() + "<|im_end|>"
        assert tokenizer.decode(ids[:first]).endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(ids[:first]).count(names["settings"].instruction) == 1
        assert set(ids[first + len(learned) :]) <= {tokenizer.pad_token_id}
        assert sample["answer"] == text.strip() + "<|im_end|>"
        image_tokens = ids.count(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        asked = names["prompt"].replace("<|image_pad|>", "<|image_pad|>" * image_tokens)
        assert tokenizer.decode(ids[:first]) == asked
    # The trainer's loss is the mean over those tokens of all samples, however they are split into micro-batches.
    whole = names["collate"](samples)
    model = names["model"].eval()
    with torch.no_grad():
        together = model(**whole).loss
        apart = [names["collate"]([sample]) for sample in samples]
        counts = [int((batch["labels"] != -100).sum()) for batch in apart]
        losses = [model(**batch).loss for batch in apart]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert together.item() == pytest.approx(mean.item(), rel=1e-4)


def test_a_length_limit_cuts_every_tensor_alike(execute, tmp_path):
    names = execute(*SHORT, "--output_dir", tmp_path, "--max_length", 40, until="Before")
    batch = names["collate"]([names["train_set"][i] for i in range(4)])
    assert batch["input_ids"].shape[1] <= 40
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape


def test_saved_adapter_reads_the_same_by_plain_peft(execute, tmp_path):
    options = ("--output_dir", tmp_path, "--max_steps", 8, "--num_test_rows", 12, "--save_strategy", "no")
    names = execute(*SHORT, *options)
    texts = names["read_test_set"]()

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    base = AutoModelForImageTextToText.from_pretrained(
        "demo/model", quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    for layer in base.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # its 16-bit kernel would make the comparison inexact
    # The script's functions find the model by its name in these globals.
    names["model"] = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    names["processor"] = AutoProcessor.from_pretrained(tmp_path / "adapter")
    assert names["read_test_set"]() == texts
    with names["model"].disable_adapter():
        assert names["read_test_set"]() != texts, "eight steps changed nothing: the comparison shows nothing"


def test_what_is_read_does_not_depend_on_the_batch_size_nor_on_memory(execute, tmp_path, monkeypatch):
    names = execute(*SHORT, "--output_dir", tmp_path, "--num_test_rows", 10, until="Train")
    whole = names["read_test_set"]()
    generate, asked = names["model"].generate, []

    def short_of_memory(**inputs):
        asked.append(len(inputs["input_ids"]))
        if asked[-1] > 4 or len(asked) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(**inputs)

    monkeypatch.setattr(names["model"], "generate", short_of_memory)
    names["settings"].test_batch_size = 8
    assert names["read_test_set"]() == whole
    assert asked == [8, 4, 4, 2, 2, 2], "halved, and on from where it was"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def open_image():
    """The script's `open_image`, without the rest of the script."""
    text = SCRIPT.read_text()
    names = {"io": io, "Pillow": Image, "ImageOps": ImageOps, "image_bytes": lambda image: image["bytes"]}
    exec(text[text.index("IMAGE_TYPES =") : text.index("def image_bytes")], names)
    exec(text[text.index("def open_image") : text.index("def usable")], names)
    return names["open_image"]


def test_every_image_mode_is_black_on_white(open_image):
    gray = np.full((20, 60), 255, np.uint8)
    gray[5:15, 10:25] = 0
    paper = Image.fromarray(gray)
    ink = Image.fromarray(np.dstack([np.zeros((20, 60, 3), np.uint8), 255 - gray]))  # black on transparent
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    cases = {
        "1": encoded(paper.convert("1")),
        "L": encoded(paper),
        "P": encoded(paper.convert("P")),
        "RGB": encoded(paper.convert("RGB"), "WEBP", lossless=True),
        "RGBA": encoded(ink),
        "LA": encoded(ink.convert("LA")),
        "P, transparent": encoded(ink, "GIF"),
        "CMYK": encoded(paper.convert("CMYK"), "TIFF"),
        "CMYK, JPEG": encoded(paper.convert("CMYK"), "JPEG", quality=98),
        "16 bits, PNG": encoded(Image.fromarray(gray.astype(np.uint16) * 257)),
        "16 bits, TIFF": encoded(Image.fromarray(gray.astype(np.uint16) * 257), "TIFF"),
        "EXIF": encoded(paper.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned, quality=98),
    }
    for name, image in cases.items():
        opened = open_image(image)
        assert (opened.mode, opened.size) == ("RGB", (60, 20)), name
        error = np.abs(np.asarray(opened).astype(int) - gray[:, :, None]).mean()
        assert error < 1, f"{name}: {error:.1f} gray levels away from what a person sees"


def test_steps_are_of_like_length_shuffled_and_each_row_comes_once(execute, tmp_path):
    names = execute(*SHORT, "--output_dir", tmp_path, "--max_steps", 40, until="Before")
    lengths, size = names["lengths"], 8
    sampler = names["LikeLengths"](lengths, size)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(lengths)))
    assert orders[0] == orders[2] != orders[1], "the seed and the epoch decide"
    steps = [orders[0][start : start + size] for start in range(0, len(lengths), size)]

    def padding(steps):
        return sum(max(lengths[row] for row in step) - lengths[row] for step in steps for row in step)

    unsorted = [list(range(start, start + size)) for start in range(0, len(lengths), size)]
    assert padding(steps) < padding(unsorted) / 3
    assert max(lengths) in [lengths[row] for row in steps[0]]
    means = [sum(lengths[row] for row in step) / size for step in steps[1:]]
    assert means != sorted(means) and means != sorted(means, reverse=True), "long and short steps are mixed"
    # An epoch that ends with fewer rows than a step takes some of them twice, so that all steps are full.
    uneven = names["LikeLengths"](lengths[:43], size)
    rows = [*uneven]
    assert len(rows) == len(uneven) == 48 and set(rows) == set(range(43))


def test_the_gradient_of_a_batch_is_the_same_however_split(execute, tmp_path):
    norms = []
    for split in ((8, 1, False), (4, 2, False), (2, 4, True), (1, 8, True)):
        options = ("--per_device_train_batch_size", split[0], "--gradient_accumulation_steps", split[1])
        options += ("--gradient_checkpointing", split[2], "--save_strategy", "no", "--num_test_rows", 2)
        names = execute(*SHORT, *options, "--output_dir", tmp_path, until="After")
        assert names["training_args"].splits == [split]
        norms.append([entry["grad_norm"] for entry in names["trainer"].state.log_history if "grad_norm" in entry])
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-3)


def test_what_the_user_sets_of_the_split_is_obeyed(execute, tmp_path):
    def splits(*options):
        demo = ("--model_name_or_path", "demo/model", "--dataset_name", "demo/data", "--output_dir", tmp_path)
        return execute(*demo, *options, until="Data")["training_args"].splits

    kept, recomputed = [(8, 1, False), (4, 2, False)], [(8, 1, True), (4, 2, True), (2, 4, True), (1, 8, True)]
    assert splits() == kept + recomputed
    assert splits("--gradient_checkpointing", "false") == kept
    assert splits("--gradient_checkpointing", "true") == recomputed
    assert splits("--gradient_accumulation_steps", 2) == [kept[1], recomputed[1]]
    assert splits("--per_device_train_batch_size", 16)[0] == (16, 1, False)
    assert {size * times for size, times, _ in splits("--per_device_train_batch_size", 16)} == {16}
    both = ("--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 5)
    assert splits(*both) == [(3, 5, False), (3, 5, True)]
