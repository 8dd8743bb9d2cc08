"""What can't be seen from outside: who trains on what, and what the loss looks at."""

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHORT, execute, run
from datasets import load_dataset
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from qwen_vl_kit.rows import open_image
from qwen_vl_kit.training import layouts


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The names that a short run of the script leaves, trained enough to read otherwise than its base."""
    folder = tmp_path_factory.mktemp("ran")
    return execute(*SHORT, "--output_dir", folder, "--max_steps", 8, "--num_test_rows", 12, "--save_strategy", "no")


def test_held_out_images_are_never_trained_on(tmp_path):
    rows = load_dataset("demo/data", split="train").select(range(60))
    doubled = [*range(60), *range(30)]  # a split of these has rows on both sides, unless somebody looks
    rows.select(doubled).to_parquet(tmp_path / "rows.parquet")
    options = (*SHORT, "--output_dir", tmp_path, "--dataset_name", tmp_path / "rows.parquet")
    names = execute(*options, "--num_train_epochs", 1)
    train, test = (
        {image.tobytes() for image in names[which].with_format()["image"]} for which in ("train_set", "test_set")
    )
    assert len(test) == 6 and len(train) == 54
    assert not test & train
    assert len({*names["order"]}) < len(doubled) - len(test), "no doubles were left out"
    assert json.loads((tmp_path / "metrics.json").read_text())["rows_of_seen_formulas"] == 0
    # The same formula in another image is held out all the same, and said.
    rows.remove_columns("text").add_column("text", ["x + y"] * 60).to_parquet(tmp_path / "rows.parquet")
    ended = run(*options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "6 of the held-out images show formulas that also appear in training images" in ended.stdout
    assert json.loads((tmp_path / "metrics.json").read_text())["rows_of_seen_formulas"] == 6


def test_labels_are_the_answer_and_its_end_token(ran):
    tokenizer = ran["processor"].tokenizer
    samples = [ran["train_set"][i] for i in range(8)]
    batch = ran["collate"](samples)
    assert batch["labels"].shape == batch["input_ids"].shape
    texts = ran["train_rows"].select(ran["order"][:8])["text"]
    for sample, text, ids, labels in zip(
        samples, texts, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
    ):
        learned = [label for label in labels if label != -100]
        first = labels.index(learned[0])
        assert learned == ids[first : first + len(learned)]
        assert tokenizer.decode(learned) == text.strip() + "<|im_end|>"
        assert tokenizer.decode(ids[:first]).endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(ids[:first]).count(ran["options"].instruction) == 1
        assert set(ids[first + len(learned) :]) <= {tokenizer.pad_token_id}
        assert sample["answer"] == text.strip() + "<|im_end|>"
        image_tokens = ids.count(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        asked = ran["prompt"].replace("<|image_pad|>", "<|image_pad|>" * image_tokens)
        assert tokenizer.decode(ids[:first]) == asked
    # The trainer's loss is the mean over those tokens of all samples, however they are split into micro-batches.
    model = ran["model"].eval()
    with torch.no_grad():
        together = model(**ran["collate"](samples)).loss
        apart = [ran["collate"]([sample]) for sample in samples]
        counts = [int((batch["labels"] != -100).sum()) for batch in apart]
        losses = [model(**batch).loss for batch in apart]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert together.item() == pytest.approx(mean.item(), rel=1e-4)


def test_samples_of_too_many_tokens_are_left_out_and_named_rather_than_cut(tmp_path):
    names = execute(*SHORT, "--output_dir", tmp_path, "--max_length", 40)
    batch = names["collate"]([names["train_set"][i] for i in range(16)])
    assert 30 < batch["attention_mask"].sum(dim=1).max() <= 40
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert skipped and {row["reason"] for row in skipped} == {"more than 40 tokens"}
    texts = load_dataset("demo/data", split="train")["text"]
    named = {row["row"] for row in skipped if row["split"] == "train"}
    assert named and not named & {*names["order"]}
    assert np.mean([len(texts[row]) for row in named]) > np.mean([len(texts[row]) for row in names["order"]])


def test_saved_adapter_reads_the_same_by_plain_peft(ran, monkeypatch):
    read, samples = ran["read"], ran["test_set"]
    texts = read(samples, 12)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    base = AutoModelForImageTextToText.from_pretrained(
        "demo/model", quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    for layer in base.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # its 16-bit kernel would make the comparison inexact
    adapter = ran["outputs"] / "adapter"
    # The script's functions find the model by its name in these globals.
    names = read.__wrapped__.__globals__
    monkeypatch.setitem(names, "model", PeftModel.from_pretrained(base, adapter).eval())
    monkeypatch.setitem(names, "processor", AutoProcessor.from_pretrained(adapter))
    assert read(samples, 12) == texts
    with names["model"].disable_adapter():
        assert read(samples, 12) != texts, "eight steps changed nothing: the comparison shows nothing"


def test_what_is_read_does_not_depend_on_the_batch_size_nor_on_memory(ran, monkeypatch):
    samples = ran["test_set"].select(range(10))
    whole = ran["read"](samples, 64)
    generate, asked = ran["model"].generate, []

    def short_of_memory(**inputs):
        asked.append(len(inputs["input_ids"]))
        if asked[-1] > 4 or len(asked) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(**inputs)

    monkeypatch.setattr(ran["model"], "generate", short_of_memory)
    assert ran["read"](samples, 8) == whole
    assert asked == [8, 4, 4, 2, 2, 2], "halved, and on from where it was"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_every_image_mode_is_black_on_white():
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


def in_steps(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_steps_are_of_like_length_shuffled_and_each_row_comes_once_an_epoch(ran):
    order_rows = ran["order_rows"].__wrapped__
    texts = load_dataset("demo/data", split="train")["text"][:320]
    lengths = {1000 + number: len(text) for number, text in enumerate(texts)}

    def ordered(steps, seed=1):
        return order_rows(lengths, SimpleNamespace(seed=seed, batch_size=8, max_steps=steps))

    order = ordered(120)
    assert [sorted(order[at : at + 320]) for at in (0, 320, 640)] == [sorted(lengths)] * 3
    assert order == ordered(120) != ordered(120, seed=2), "the seed decides"
    epochs = [[*map(frozenset, in_steps(order[at : at + 128], 8))] for at in (0, 320)]
    assert not set(epochs[0]) & set(epochs[1]), "each epoch has its own order"

    def padding(steps):
        return sum(max(lengths[row] for row in step) - lengths[row] for step in steps for row in step)

    assert padding(in_steps(order, 8)) < padding(in_steps([*lengths] * 3, 8)) / 3
    means = [sum(lengths[row] for row in step) / 8 for step in in_steps(order, 8)]
    few = order_rows({row: 1 for row in range(43)}, SimpleNamespace(seed=1, batch_size=8, max_steps=12))
    assert {*few[:48]} == {*few[48:]} == {*range(43)}, "the last step of an epoch is full, with some rows twice"
    assert means[:16] != sorted(means[:16]) and means[:16] != sorted(means[:16], reverse=True), (
        "long and short are mixed"
    )


def test_more_steps_do_not_change_the_first_ones(tmp_path):
    """In 192 rows, 6 steps and then more: what was trained on first stays, and nothing comes twice before all came."""
    rows = load_dataset("demo/data", split="train").select(range(198))
    rows.to_parquet(tmp_path / "rows.parquet")
    orders = []
    for steps in (6, 12, 24, 30):
        options = ("--dataset_name", tmp_path / "rows.parquet", "--max_steps", steps, "--save_strategy", "no")
        orders.append(execute(*SHORT, *options, "--output_dir", tmp_path)["order"])
    for order in orders:
        assert order == orders[-1][: len(order)]
    assert [len({*order}) for order in orders] == [48, 96, 192, 192]


def test_an_epoch_is_an_epoch(tmp_path):
    rows = load_dataset("demo/data", split="train").select(range(46))
    rows.to_parquet(tmp_path / "rows.parquet")
    ended = run(
        *SHORT, "--dataset_name", tmp_path / "rows.parquet", "--num_train_epochs", 2, "--save_strategy", "epoch",
        "--output_dir", tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "40 rows to train on" in ended.stdout and "Training 10 steps of 8 samples" in ended.stdout
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-5"]


def test_the_gradient_of_a_batch_is_the_same_however_split(tmp_path):
    norms = []
    for size, recompute in ((8, False), (4, False), (2, True), (1, True)):
        options = ("--per_device_train_batch_size", size, "--gradient_checkpointing", recompute)
        names = execute(*SHORT, *options, "--save_strategy", "no", "--num_test_rows", 2, "--output_dir", tmp_path)
        log = names["trainer"].state.log_history
        norms.append([entry["grad_norm"] for entry in log if "grad_norm" in entry])
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-3)


def test_what_the_user_sets_of_the_layout_is_obeyed():
    kept, recomputed = [(8, 1, False), (4, 2, False)], [(8, 1, True), (4, 2, True), (2, 4, True), (1, 8, True)]
    assert layouts(None, None, None, None) == layouts(8, None, None, None) == kept + recomputed
    assert layouts(8, None, None, False) == kept
    assert layouts(8, None, None, True) == recomputed
    assert layouts(8, None, 2, None) == [kept[1], recomputed[1]]
    assert layouts(8, 2, None, None) == [(2, 4, False), (2, 4, True)]
    assert layouts(16, None, None, None)[0] == (16, 1, False)
    assert {size * times for size, times, _ in layouts(16, None, None, None)} == {16}
    # Without batch_size, the trainer's own options mean what they mean everywhere: 8 and 1 where they are left out.
    assert layouts(None, 3, 5, None) == [(3, 5, False), (3, 5, True)]
    assert layouts(None, 4, None, False) == [(4, 1, False)]
    assert layouts(None, None, 4, False) == [(8, 4, False)]
    # On two devices.
    assert layouts(8, None, None, False, processes=2) == [(4, 1, False), (2, 2, False)]
    assert layouts(None, 8, None, False, processes=2) == [(8, 1, False)]
    for wrong in ((7, None, None, None, 2), (8, 3, None, None), (8, None, 3, None), (8, 2, 2, None)):
        with pytest.raises(ValueError, match="can't be split evenly"):
            layouts(*wrong)


@pytest.mark.parametrize(
    ("free", "asked", "found"),
    [
        (139, {}, (8, 1, False)),
        (39, {}, (8, 1, False)),
        (22, {}, (8, 1, True)),
        (14.5, {}, (8, 1, True)),
        (9, {}, (2, 4, True)),
        (7, {}, (1, 8, True)),
        (139, {"batch_size": 64}, (64, 1, True)),
        (22, {"batch_size": 12}, (12, 1, True)),
        (139, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, (2, 4, False)),
        (14.5, {"per_device_train_batch_size": 2}, (2, 1, False)),
        (139, {"gradient_accumulation_steps": 2}, (8, 2, False)),
        (139, {"batch_size": 8, "gradient_accumulation_steps": 2}, (4, 2, False)),
        (14.5, {"gradient_checkpointing": False}, (2, 4, False)),
    ],
)
def test_the_rule_of_the_script_alone_suits_the_card(free, asked, found, ran):
    names = "batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"
    options = SimpleNamespace(**dict.fromkeys(names) | asked)
    ran["split_batch"].__wrapped__(options, free)
    assert tuple(getattr(options, name) for name in names[1:]) == found
    assert options.batch_size == found[0] * found[1]


@pytest.fixture
def altered(tmp_path):
    """A function that copies the demo's base model, with its chat template and generation config changed."""

    def alter(template=lambda text: text, **generation):
        folder = shutil.copytree("demo/model", tmp_path / "model", dirs_exist_ok=True)
        file = folder / "chat_template.jinja"
        file.write_text(template(file.read_text()))
        file = folder / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | generation))
        return ("--model_name_or_path", folder, "--output_dir", tmp_path / "out")

    return alter


def test_a_template_that_ends_no_turn_teaches_the_end_of_the_text(altered):
    names = execute(*SHORT, *altered(lambda text: text.replace("<|im_end|>", "")))
    end = names["processor"].tokenizer.eos_token
    assert names["end_of_turn"] == end and names["train_set"][0]["answer"].endswith(end)
    assert names["collate"]([names["train_set"][0]])["labels"][0, -1] == names["processor"].tokenizer.eos_token_id


def test_a_template_that_opens_a_thought_is_refused(altered, capsys):
    opens = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    options = altered(lambda text: text.replace("{% if add_generation_prompt %}<|im_start|>assistant\n", opens))
    with pytest.raises(SystemExit, match="opens a thought"):
        execute(*SHORT, *options)


def test_an_end_on_which_generating_does_not_stop_is_refused(altered):
    with pytest.raises(SystemExit, match="where generating does not stop"):
        execute(*SHORT, *altered(eos_token_id=5))


def test_greedy_is_greedy_whatever_the_base_is_used_to(ran, altered):
    habits = {"num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": 3.0, "suppress_tokens": [20, 21, 22]}
    habits |= {"repetition_penalty": 1.5, "min_new_tokens": 9}
    names = execute(*SHORT, *altered(**habits), "--num_test_rows", 12, "--max_steps", 1, "--learning_rate", 0)
    plain = [reading["text"] for reading in ran["readings_before"]]
    assert [reading["text"] for reading in names["readings_before"]] == plain
    config = names["model"].generation_config
    assert config.num_beams is config.top_k is config.temperature is None, "nor in what is streamed"
