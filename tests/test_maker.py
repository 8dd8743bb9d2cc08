"""What makes the demo: its formulas are new, and its training computes what the library computes."""

import random
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from datasets import load_dataset
from PIL import Image
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

sys.path.append(str(ROOT / "demo"))
from maker import INSTRUCTION, blank, feed, formulas, forward, pages, training

TEXTS = [
    r"E ( v ) = \frac { d } { d t } E ( q ) \; \forall t \, .",
    r"\left( \alpha ^ { \prime } \right) ^ { - 1 } e ^ { - \phi / 2 } = \sqrt { N } \ ,",
    r"\alpha ^ { 2 } = { \frac { Q _ { c } ^ { 2 } } { a } } ,",
    r"\sum _ { j = 1 } ^ { r + 1 } \bar { x } _ { j } ^ { 2 } = { \frac { r ( r + 1 ) } { 2 } } ,",
]


def test_recombined_formulas_are_whole():
    recombiner = formulas.Recombiner(TEXTS)
    made = [recombiner.formula(random.Random(number)) for number in range(300)]
    made = [" ".join(tokens) for tokens in made if tokens]
    assert len({*made}) > 200 and len(made) > 290
    for latex in made:
        assert latex.count("{") == latex.count("}") and latex.count(r"\left(") == latex.count(r"\right)")
        assert formulas.groups(latex.split()) is not None


@pytest.mark.parametrize("kind", feed.KINDS)
def test_no_formula_that_the_demo_holds_out_is_written(kind):
    """Neither by the grammar nor from parts of real formulas: these are all of such a formula."""
    held_out = [text for text in load_dataset(str(ROOT / "demo/data"))["test"]["text"] if len(text.split()) > 4]
    recombiner, rng = formulas.Recombiner([*TEXTS, "a = b + c = d", *held_out]), random.Random(0)
    anyway = [feed.write_any(kind, rng, recombiner) for _ in range(1000)]
    assert any(map(formulas.is_held_out, filter(None, anyway))) or kind == "sign"
    written = [*filter(None, (feed.write(kind, rng, recombiner) for _ in range(1000)))]
    assert len(written) > 50 and not any(map(formulas.is_held_out, written))


def test_roles_count_arguments():
    tokens = [r"\frac", r"{", r"a", r"}", r"{", r"b", r"}", r"_", r"{", r"c", r"}", r"{", r"d", r"}"]
    assert [role for role, _, _ in formulas.groups(tokens)] == [(r"\frac", 1), (r"\frac", 2), ("_", 1), ("", 1)]
    assert formulas.groups(["}", "{"]) is None


def test_held_out_formulas_are_in_no_training_row():
    rows = load_dataset(str(ROOT / "demo/data"))
    train, test = ({formulas.spelling_free(text) for text in rows[split]["text"]} for split in ("train", "test"))
    assert not train & test
    assert all(map(formulas.is_held_out, rows["test"]["text"]))


def test_the_blackboard_fits_the_patches():
    picture = pages.photograph_blackboard(r"x ^ { 2 } + y", random.Random(0))
    assert picture.dtype == np.uint8 and picture.shape[0] % 14 == 0 and picture.shape[1] % 14 == 0
    assert picture.mean() < 100, "chalk on a dark board"


@pytest.mark.parametrize("size", [(40, 160), (50, 120), (100, 500), (28, 28), (400, 900)])
def test_sizes_are_the_processors(size):
    shape = blank.Shape()
    assert forward.resized_to(*size, shape) == smart_resize(*size, 14, shape.min_pixels, shape.max_pixels)


def test_the_loss_is_the_librarys():
    """Also shows that images are resized and cut as the processor does, to within a gray level here and there."""
    torch.manual_seed(0)
    model, processor = training.load(ROOT / "demo/model")
    shape = blank.Shape()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 160)).astype(np.uint8)
    answers = [r"x ^ { 2 }<|im_end|>", r"\frac { a } { b + 1 } = c<|im_end|>"]
    content = [{"type": "text", "text": INSTRUCTION}, {"type": "image"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.fromarray(image).convert("RGB") for image in pixels]
    texts = [prompt + answer for answer in answers]
    inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    ids = [processor.tokenizer.encode(answer) for answer in answers]
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (answer, end) in enumerate(zip(ids, inputs["attention_mask"].sum(1).tolist(), strict=True)):
        labels[row, end - len(answer) : end] = torch.tensor(answer)
    expected = model(**inputs, labels=labels).loss

    ours = forward.Forward(model, processor, INSTRUCTION, torch.float32, compiled=False)
    gray = forward.resize(torch.tensor(pixels).float(), forward.resized_to(40, 160, shape))
    seen = inputs["pixel_values"].view(2, -1, 3, 2, 49)[:, :, 0, 0] * 0.26862954 + 0.48145466
    assert ((forward.to_patches(gray / 255, 7) - seen).abs().max() * 255).item() < 2.1
    lengths = torch.tensor([len(answer) for answer in ids])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(answer) for answer in ids], batch_first=True)
    loss, _ = ours(gray, padded, lengths)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)


def test_pools_keep_the_newest():
    pool = feed.Pool((28, 28), 0)  # the fewest: 64
    for number in range(5):
        images = np.full((20, 28, 28), number, np.uint8)
        pool.add(images, np.full((20, 4), number, np.int16), np.full(20, 4, np.int16))
    assert len(pool) == 64 and pool.drawn == 100
    assert sorted({*pool.images[:, 0, 0].tolist()}) == [1, 2, 3, 4]
    images, answers, lengths = pool.batch(8, np.random.default_rng(0))
    assert images.shape == (8, 28, 28) and answers.shape == (8, 8) and (lengths == 4).all()


def test_muon_makes_matrices_orthogonal():
    singular = torch.linalg.svdvals(training.orthogonal(torch.randn(2, 64, 32)).float())
    assert singular.min() > 0.5 and singular.max() < 1.5


def test_the_curriculum_ends_with_whole_formulas():
    assert training.shares(0.02, None) == {"sign": 1.0}
    for progress in (0.1, 0.15, 0.2, 0.3, 1.0):
        assert sum(training.shares(progress, 0.09).values()) == pytest.approx(1)
    assert training.shares(0.3, 0.09)["print"] > 0.5


def test_the_model_is_a_small_qwen2_vl():
    processor = AutoProcessor.from_pretrained(ROOT / "demo/model")
    assert processor.image_processor.patch_size == 7
    assert (ROOT / "demo/model/model.safetensors").stat().st_size < 20e6


def test_the_maker_measures_as_the_kit_does():
    """Against readings that are right, and right but for one character of one formula."""
    model, processor = training.load(ROOT / "demo/model")
    rows = load_dataset(str(ROOT / "demo/data"))["test"].select(range(6))
    images = [image.convert("RGB") for image in rows["image"]]
    held = training.Held.__new__(training.Held)
    held.sets = {"demo": (images[:4], list(rows["text"])[:4]), "rest": (images[4:], list(rows["text"])[4:])}
    line, read = held.measure(model, processor)
    assert line.count("exact 0.0%") == 2 and "CER 0.0" not in line, "blackboards, which this model can't read"
    assert [len(texts) for texts in read.values()] == [4, 2]
    right = ["".join(text.split()) for text in read["demo"]]
    held.sets = {"demo": (images[:4], ["x" + right[0], *right[1:]]), "rest": (images[4:], read["rest"])}
    wrong = 1 / (1 + sum(map(len, right)))
    said = f"demo CER {wrong:.4f} exact 75.0%, rest CER 0.0000 exact 100.0%"
    assert held.measure(model, processor)[0] == said
