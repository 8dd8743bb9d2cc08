"""Make `demo/model` and `demo/data` again from nothing.

    python demo/make_demo.py                            # both; a GPU where there is one
    python demo/make_demo.py --only data                # the data set alone: seconds, no PyTorch
    python demo/make_demo.py --only model --minutes 8   # the base model alone, in both of its phases
    python demo/make_demo.py --only revision            # its second phase: trains the model that is there on

What comes out:

- `demo/model`: a Qwen2-VL of the true architecture (patches of 14 pixels, 2 x 2 merging, M-RoPE, the chat template and
  special tokens of the real one), 8 million parameters, trained here from scratch to read *printed* formulas: black on
  white, Computer Modern. First a curriculum up to long formulas, then a revision, most of it in the alphabet of
  `demo/data`. The model in the repository took 9 minutes, 7.3 and 1.4 of them training (2.9 and 0.4 million samples),
  on an H100 with 17 CPU cores drawing.
- `demo/data`: photographs of a school's worksheets: short formulas of a small alphabet, in a leaning sans serif, on
  tinted, grainy, unevenly lit paper. The base model reads them badly, and fine-tuning has to teach it. `train` and
  `test` in the layout of the Hugging Face hub.

All formulas come from one random grammar and are spelled as the public LaTeX OCR sets spell them, with a space between
tokens (`\\frac { 1 } { 2 }`). A hash of the formula decides whether it is held out, so no held-out formula, however
spelled, is ever in the training rows or in front of the base model.

Needs matplotlib, pillow, numpy, pyarrow (the data) and torch, tokenizers, transformers (the model).
"""

import argparse
import collections
import functools
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from PIL import Image, ImageFilter

DEMO = Path(__file__).resolve().parent
logging.getLogger("matplotlib.mathtext").setLevel(logging.ERROR)  # silent about an accent that is stretched
INSTRUCTION = "Write the LaTeX representation for this image."

# ---------------------------------------------------------------------------------------------------------------------
# The grammar: random formulas, one canonical spelling each
# ---------------------------------------------------------------------------------------------------------------------


def words(text):
    return text.split()


PAPER = {
    "latin": list("xxxxyyzabcdefghijklmnnopqrsttuvwABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "greek": words(r"""
        \alpha \alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \theta \kappa \lambda \mu \mu \nu \xi
        \pi \pi \rho \sigma \tau \phi \varphi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Pi \Sigma \Phi \Psi
        \Omega"""),
    "constants": words(r"\infty \partial \nabla \hbar \ell \ldots \cdots"),
    "binary": words(r"+ + + + + - - - - - \times \cdot \pm / \otimes \wedge \div \mp \circ"),
    "relations": words(r"= = = = = = = < > \leq \geq \neq \approx \equiv \sim \simeq \rightarrow \in"),
    "functions": words(r"\sin \cos \tan \log \ln \exp \sinh \cosh \tanh \cot \arctan \det \max \min"),
    "accents": words(r"\hat \bar \vec \dot \tilde \bar \hat \ddot \overline \widehat"),
}
# A school's worksheet: fewer signs, and none that look alike (o, O and 0; x and \chi).
SCHOOL = {
    "latin": list("xxxyyabdhkmntABDFGHR"),
    "greek": words(r"\alpha \theta \lambda \mu \pi \phi \Delta \Omega"),
    "constants": words(r"\infty \pi"),
    "binary": words(r"+ + + - - - \pm"),
    "relations": words(r"= = = < >"),
    "functions": words(r"\sin \cos \tan \log"),
    "accents": words(r"\bar \vec"),
}
# What the worksheets of `demo/data` use of it: no pairs that differ by a hair at this size (h, n and k, D and 0, \bar
# and \vec, small \lambda and \Omega), so that two minutes of fine-tuning suffice to read them.
WORKSHEET = SCHOOL | {
    "latin": list("xxxyyabdmntABFGR"),
    "greek": words(r"\alpha \theta \mu \pi \phi \Delta"),
    "accents": [r"\bar"],
}
FONTS = words(r"\mathrm \mathbf \mathcal")
TALL = {r"\frac", r"\sum", r"\prod", r"\int", r"\sqrt", r"\lim", r"\binom"}


class Grammar:
    """Draws formulas as lists of LaTeX tokens, of the `signs` that printed articles have (PAPER), or of fewer."""

    def __init__(self, rng, signs=PAPER):
        self.rng, self.paper, self.signs = rng, signs is PAPER, signs

    def digit(self):
        return self.rng.choice("0112223456789")

    def number(self):
        """One to three digits, now and then a decimal: each digit a token of its own."""
        digits = [self.rng.choice("123456789")] + [self.digit() for _ in range(self.rng.choice([0, 0, 0, 1, 1, 2]))]
        return digits + ([".", self.digit()] if self.rng.random() < 0.06 else [])

    def letter(self):
        return self.rng.choice(self.signs["latin" if self.rng.random() < 0.66 else "greek"])

    def symbol(self):
        draw = self.rng.random()
        if draw < 0.80:
            return [self.letter()]
        return [self.digit()] if draw < 0.95 else [self.rng.choice(self.signs["constants"])]

    def any_symbol(self):
        """A single symbol, all equally likely: without these a model learns how formulas go, and never looks."""
        pool = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", *"()[]|,.!"]
        pool += [r"\sum", r"\int", r"\prod", r"\prime"]
        for kind in ("greek", "constants", "binary", "relations", "functions"):
            pool += set(self.signs[kind])
        return [self.rng.choice(sorted(pool))]

    def script(self, depth):
        """What stands in an index or an exponent, mostly one symbol."""
        draw = self.rng.random()
        if draw < 0.62 or depth <= 0:
            return [self.digit()] if self.rng.random() < 0.45 else [self.letter()]
        if draw < 0.72:
            return ["-"] + self.symbol()
        if draw < 0.82:
            return self.symbol() + self.symbol()
        if draw < 0.88 and self.paper:
            return [r"\prime"] if self.rng.random() < 0.6 else self.rng.choice([[r"\dagger"], ["*"], ["+"], ["-"]])
        return self.expression(depth - 2, self.rng.choice([1, 2, 2]))

    def scripted(self, base, depth, chance=1.0):
        """`base` with a subscript, a superscript or both, in this order."""
        if self.rng.random() > chance:
            return base
        kind = self.rng.random()
        out = list(base)
        if kind < 0.55:
            out += ["_", "{", *self.script(depth), "}"]
        if kind > 0.42:
            out += ["^", "{", *self.script(depth), "}"]
        return out

    def fenced(self, inside):
        """Brackets: growing ones round what is tall, plain ones round the rest."""
        left, right = self.rng.choice(["()", "()", "()", "()", "[]", "||"])
        if TALL & set(inside):
            return [r"\left" + left, *inside, r"\right" + right]
        return [left, *inside, right]

    def big(self, depth):
        """Sums, products, integrals and limits, with what they apply to."""
        rng = self.rng
        body = self.term(depth - 1)
        draw = rng.random()
        if draw < 0.42:
            out = [rng.choice([r"\sum", r"\sum", r"\prod"])]
            index = rng.choice("ijkmn")
            if rng.random() < 0.85:
                out += ["_", "{", index, *(["=", rng.choice("01")] if rng.random() < 0.8 else []), "}"]
                if rng.random() < 0.8:
                    out += ["^", "{", *rng.choice([[r"\infty"], ["n"], ["N"], ["m"], ["k"]]), "}"]
            return out + body
        if draw < 0.86:
            out = [r"\int"]
            if rng.random() < 0.65:
                low = rng.choice([["0"], ["a"], ["1"], ["-", r"\infty"], ["-", "1"], self.symbol()])
                high = rng.choice([["1"], ["b"], [r"\infty"], [r"\pi"], ["x"], self.symbol()])
                out += ["_", "{", *low, "}", "^", "{", *high, "}"]
            return out + body + ["d", rng.choice(["x", "x", "t", "y", "z", "s", r"\theta"])]
        return [r"\lim", "_", "{", self.letter(), r"\rightarrow", rng.choice(["0", r"\infty", "a"]), "}"] + body

    def primary(self, depth):
        """One factor of a term."""
        rng = self.rng
        draw = rng.random()
        if depth <= 0:
            draw *= 0.62
        if draw < 0.30:
            return self.symbol()
        if draw < 0.36:
            return self.number()
        if draw < 0.57:
            return self.scripted([self.letter()], depth)
        if draw < 0.62:
            return self.scripted([rng.choice(self.signs["accents"]), "{", self.letter(), "}"], depth, 0.3)
        if draw < 0.74:
            return self.fraction(depth)
        if draw < 0.79:
            index = ["[", rng.choice("345n"), "]"] if rng.random() < 0.15 else []
            return [r"\sqrt", *index, "{", *self.expression(depth - 1, rng.choice([1, 1, 2])), "}"]
        if draw < 0.85:
            name = self.scripted([rng.choice(self.signs["functions"])], 0, 0.2)
            return name + (self.symbol() if rng.random() < 0.5 else ["(", *self.expression(depth - 2, 1), ")"])
        if draw < 0.90:
            inside = self.expression(depth - 1, 2)
            return self.scripted(self.fenced(inside), depth - 1, 0.3)
        if draw < 0.95:
            arguments = self.symbol() + ([","] + self.symbol() if rng.random() < 0.3 else [])
            return [self.letter(), "(", *arguments, ")"]
        if draw < 0.985 or not self.paper:
            return self.big(depth)
        return self.scripted([rng.choice(FONTS), "{", rng.choice("ABCDEFGHILMNPRSTUVXZ"), "}"], depth, 0.3)

    def fraction(self, depth):
        rng = self.rng
        draw = rng.random()
        if draw < 0.12:
            sign = rng.choice(["d", r"\partial"])
            top = [sign] + ([self.letter()] if rng.random() < 0.6 else [])
            return [r"\frac", "{", *top, "}", "{", sign, self.letter(), "}"]
        if draw < 0.15:
            return [r"\binom", "{", *self.symbol(), "}", "{", *self.symbol(), "}"]
        top, bottom = (self.expression(depth - 2, rng.choice([1, 1, 1, 2])) for _ in range(2))
        return [r"\frac", "{", *top, "}", "{", *bottom, "}"]

    def term(self, depth):
        out = []
        for _ in range(self.rng.choice([1, 1, 1, 2, 2, 3])):
            factor = self.primary(depth)
            # Two numbers side by side would read as one.
            if out and factor[0].isdigit() and out[-1].isdigit():
                continue
            out += factor
        return out

    def expression(self, depth, terms):
        out = ["-"] if self.rng.random() < 0.06 else []
        out += self.term(depth)
        for _ in range(terms - 1):
            out += [self.rng.choice(self.signs["binary"]), *self.term(depth)]
        return out

    def formula(self, size):
        """A whole formula. `size`: 0 a single symbol, 1 short, 2 medium, 3 as long as in printed articles."""
        rng = self.rng
        if size == 0:
            return self.any_symbol()
        if size == 1:
            return self.expression(rng.choice([0, 1, 2]), rng.choice([1, 1, 1, 2]))
        out = self.expression(3, rng.choice([1, 2, 2, 3]))
        for _ in range(rng.choice([0, 1, 1]) if size == 2 else rng.choice([1, 1, 1, 2])):
            out += [
                rng.choice(self.signs["relations"]),
                *self.expression(3, rng.choice([1, 2] if size == 2 else [2, 3, 4])),
            ]
        if self.paper and rng.random() < 0.35:
            out += rng.choice([[], [r"\,"], [r"\,"], [r"\;"], ["~"]]) + [rng.choice(".,")]
        return out


LENGTHS = {0: (1, 1), 1: (1, 24), 2: (6, 60), 3: (30, 150)}  # tokens, for each size


def draw_formula(rng, sizes, signs=PAPER, longest=150):
    """One formula of a size drawn with the weights `sizes`, spelled with a space between tokens."""
    while True:
        size = rng.choices(range(4), sizes)[0]
        tokens = Grammar(rng, signs).formula(size)
        low, high = LENGTHS[size]
        if low <= len(tokens) <= min(high, longest):
            return " ".join(tokens)


SYNONYMS = {r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq", r"\to": r"\rightarrow", r"\dag": r"\dagger"}
INVISIBLE = {"{", "}", "~", r"\,", r"\;", r"\:", r"\!", r"\ ", r"\quad", r"\qquad", r"\left", r"\right"}
INVISIBLE |= {r"\mathrm", r"\mathbf", r"\mathcal", r"\displaystyle", r"\limits"}


def spelling_free(latex):
    """The visible symbols of a formula in order: equal for all spellings of one formula (and for a few others)."""
    tokens = re.findall(r"\\[A-Za-z]+|\\.|\S", latex)
    return tuple(SYNONYMS.get(token, token) for token in tokens if token not in INVISIBLE)


def is_held_out(latex):
    """Every tenth formula of four visible symbols or more: decided by the formula alone, the same on any machine."""
    symbols = spelling_free(latex)
    return len(symbols) >= 4 and hashlib.md5(" ".join(symbols).encode()).digest()[0] % 10 == 0


# ---------------------------------------------------------------------------------------------------------------------
# The two ways to draw a formula
# ---------------------------------------------------------------------------------------------------------------------


def coverage(latex, pixels, typeface):
    """Ink of a typeset formula: float32 (height, width), 0 to 1. `pixels` is the font size."""
    # mathtext would take the space after ^ or _ for the script itself.
    latex = latex.replace(" _ {", "_{").replace(" ^ {", "^{")
    font = FontProperties(size=pixels, math_fontfamily=typeface)
    ink = np.asarray(MathTextParser("agg").parse(f"${latex}$", dpi=72, prop=font).image, np.float32) / 255
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def with_margins(ink, rng, low, high):
    """Empty space of `low` to `high` pixels on each side."""
    return np.pad(ink, [[rng.randint(low, high), rng.randint(low, high)] for _ in range(2)])


def on_grid(ink, rng, jitter, margin=0):
    """Empty margins that make both sides multiples of 28 pixels: the model sees such a page unscaled.

    The ink is off the centre by up to `jitter` pixels, and at least `margin` from the edge.
    """
    sides = [math.ceil((side + 2 * margin + 4) / 28) * 28 for side in ink.shape]
    if math.prod(sides) < 56 * 56:
        sides = [max(side, 56) for side in sides]
    margins = []
    for side, length in zip(sides, ink.shape, strict=True):
        before = round((side - length) / 2 + rng.uniform(-jitter, jitter))
        before = min(max(before, margin), side - length - margin)
        margins.append((before, side - length - before))
    return np.pad(ink, margins)


def print_on_paper(ink, rng, wear=1.0, jitter=None, widest=560):
    """The base model's domain, a printed page: uint8 (height, width), black on white, scarcely disturbed.

    `wear`: how much size, focus and angle vary, 0 to 1. `jitter`: see `on_grid`; None is a page cut out by hand.
    """
    image = Image.fromarray((ink * 255).astype(np.uint8))
    scale = min(rng.uniform(0.85 - 0.25 * wear, 1.15), widest / image.width)
    image = image.resize(
        (max(round(image.width * scale), 1), max(round(image.height * scale), 1)), Image.Resampling.BICUBIC
    )
    ink = np.asarray(image)
    image = Image.fromarray(with_margins(ink, rng, 2, 10) if jitter is None else on_grid(ink, rng, jitter))
    if rng.random() < 0.3 * wear:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    if rng.random() < 0.3 * wear:
        image = image.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BICUBIC)
    paper, black = rng.uniform(235, 255), rng.uniform(0, 60)
    return (paper + (black - paper) * np.asarray(image, np.float32) / 255).astype(np.uint8)


def photograph_worksheet(latex, rng):
    """The demo's domain, a photo of a worksheet: uint8 (height, width, 3), leaning letters, tinted grainy paper."""
    noise = np.random.default_rng(rng.getrandbits(32))
    ink = on_grid(coverage(latex, rng.uniform(21, 24), "dejavusans"), rng, jitter=8, margin=3)
    height, width = ink.shape
    # The letters lean, and the line climbs or falls.
    slant, climb = rng.uniform(0.1, 0.2), math.tan(math.radians(rng.uniform(-1, 1)))
    shear = (1, slant, -slant * height / 2, climb, 1, -climb * width / 2)
    image = Image.fromarray((ink * 255).astype(np.uint8)).transform(
        (width, height), Image.Transform.AFFINE, shear, Image.Resampling.BICUBIC
    )
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.5)))
    ink = np.asarray(image, np.float32)[..., None] / 255
    gray, black = rng.uniform(228, 242), rng.uniform(30, 60)
    paper = np.array([gray, gray, gray - rng.uniform(0, 8)], np.float32)  # yellowish
    pen = np.array([black, black, black + rng.uniform(0, 25)], np.float32)  # bluish
    shade = 1 - rng.uniform(-0.06, 0.06) * np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    photo = (paper + (pen - paper) * ink) * shade + noise.normal(0, 2, (height, width, 1))
    return np.clip(photo, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# demo/data
# ---------------------------------------------------------------------------------------------------------------------


def draw_row(job):
    """One row of the data set: (WebP bytes, text). `job`: (seed, whether it is held out)."""
    seed, held_out = job
    rng = random.Random(seed)
    while True:
        latex = draw_formula(rng, (0, 1, 0, 0), WORKSHEET, longest=9)
        if is_held_out(latex) != held_out or len(spelling_free(latex)) < 4:
            continue
        try:
            image = photograph_worksheet(latex, rng)
        except (ValueError, RuntimeError):
            continue
        if image.shape[1] <= 280:
            photo = io.BytesIO()
            Image.fromarray(image).save(photo, "WEBP", quality=78)
            return photo.getvalue(), latex


def make_data(folder, train_rows, test_rows, seed, workers):
    """Write `train` and `test` as the hub keeps them: parquet files with an `image` and a `text` column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Read by `datasets`: it makes the column decode to a PIL image.
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "text": pa.string()}, metadata)
    splits = {}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for split, rows in {"train": train_rows, "test": test_rows}.items():
            jobs = ((f"{seed}-{split}-{i}", split == "test") for i in range(rows * 2))
            unique = {}
            for photo, latex in pool.imap(draw_row, jobs, chunksize=8):
                unique.setdefault(spelling_free(latex), ({"bytes": photo, "path": None}, latex))
                if len(unique) == rows:
                    break
            splits[split] = unique
    assert not splits["train"].keys() & splits["test"].keys(), "a held-out formula is among the training rows"
    assert all(is_held_out(latex) for _, latex in splits["test"].values())
    assert not any(is_held_out(latex) for _, latex in splits["train"].values())
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    for split, unique in splits.items():
        images, texts = zip(*unique.values(), strict=True)
        table = pa.table({"image": images, "text": texts}, schema)
        pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
        lengths = sorted(len(text.split()) for text in texts)
        print(f"{split}: {len(texts)} formulas, {lengths[len(lengths) // 2]} tokens (median), {lengths[-1]} (longest)")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*.parquet')) / 1e6:.1f} MB")


# ---------------------------------------------------------------------------------------------------------------------
# demo/model: the empty model, its tokenizer and its processor
# ---------------------------------------------------------------------------------------------------------------------

# Smallest and largest image in pixels: 4 to 128 image tokens of 28 x 28 pixels. The smallest is the real model's too.
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 128 * 28 * 28}

# In the order of the real tokenizer.
SPECIAL_TOKENS = words("""<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
    <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|>
    <|video_pad|>""")

# The real model's chat template, word for word.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_processor(seed):
    """Byte-level BPE trained on the grammar and the prompt, so that one LaTeX token is one token; any text encodes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    pieces = Regex(r" ?[_^](?: \{)?| ?\\[A-Za-z]+[(\[|)\]]?| ?\\.| ?[A-Za-z]+| ?[^\sA-Za-z]|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    prompt = f"system\nYou are a helpful assistant.\nuser\n{INSTRUCTION}\nassistant\n"
    formulas = [draw_formula(rng, (3, 3, 3, 1)) for _ in range(20_000)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=960, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([prompt] * 1000 + formulas, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=32768,
    )
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=PIXELS),
        video_processor=Qwen2VLVideoProcessor(),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer):
    """An untrained Qwen2-VL; all widths are multiples of 64, which 4-bit quantization needs."""
    import torch
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    stop = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            **stop,
        },
        vision_config={"depth": 4, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 4, "hidden_size": 256},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    for name, token in stop.items():  # at the top too, where the trainer compares them with the tokenizer's
        setattr(config, name, token)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
        do_sample=True,  # as the real model has it: what it samples is always the likeliest token
        temperature=0.01,
        top_p=0.001,
        top_k=1,
    )
    # The library's 0.02 is for widths in the thousands: at this width signals fade, above all those of the image, and
    # training stays for long where it writes likely formulas without a look at the image.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed_tokens" not in name:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight"))
                weight.normal_(std=(0.35 if into_residual else 1.0) / math.sqrt(weight.shape[1]))
        kernel = model.model.visual.patch_embed.proj.weight
        kernel -= 0.7 * kernel.mean((1, 2, 3, 4), keepdim=True)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# demo/model: training. Other processes draw batches, this one trains on them
# ---------------------------------------------------------------------------------------------------------------------


def to_patches(image):
    """Resize and cut as Qwen2-VL's image processor does. uint8 (height, width) to uint8 (patches, 196), grid (h, w)."""
    # The library's own `smart_resize`, written out: importing it takes every worker half a minute.
    area, low, high = image.shape[0] * image.shape[1], PIXELS["shortest_edge"], PIXELS["longest_edge"]
    height, width = (round(side / 28) * 28 for side in image.shape)
    if height * width > high:
        height, width = (max(int(side * math.sqrt(high / area) / 28), 1) * 28 for side in image.shape)
    elif height * width < low:
        height, width = (math.ceil(side * math.sqrt(low / area) / 28) * 28 for side in image.shape)
    if (height, width) != image.shape:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    grid = height // 14, width // 14
    blocks = image.reshape(grid[0] // 2, 2, 14, grid[1] // 2, 2, 14).transpose(0, 3, 1, 4, 2, 5)
    return blocks.reshape(-1, 14 * 14), grid


# The curriculum's last level. Up to 1: single symbols, first in the middle of the image, in the end anywhere. Up to 2:
# also formulas of 4 to 24 tokens. Up to 3: longer ones, and pages cut and worn as they come.
LAST_LEVEL, REVISION_LEVEL = 3, 2.5


@functools.cache
def symbol_ink(symbol, pixels):
    return coverage(symbol, pixels, "cm")


def make_samples(rng, level, school=0.0, copies=4):
    """One symbol, or one formula on `copies` pages: a list of (latex, patches, grid); empty where mathtext refuses.

    A share `school` of the formulas is of the smaller alphabet, though printed like the others. Typesetting is the
    slow part (7 ms against 1 ms), so each formula is typeset once, and symbols are kept.
    """
    wear = max(level - 2, 0)
    try:
        if level <= 1 or rng.random() < 0.4 - 0.05 * level:
            latex = draw_formula(rng, (1, 0, 0, 0))
            jitter = 1 + 27 * min(level, 1) ** 2
            jitter = None if rng.random() < 0.5 * wear else jitter
            pages = [print_on_paper(symbol_ink(latex, rng.choice([18, 20, 22, 24, 26])), rng, wear, jitter)]
        else:
            signs = PAPER if rng.random() >= school else SCHOOL
            latex = draw_formula(rng, (0, 1, wear, 0.3 * wear), signs, longest=4 * 6 ** (level - 1))
            if is_held_out(latex):
                return []
            ink = coverage(latex, rng.uniform(18, 26), "cm")
            jitters = (None if rng.random() < 0.6 * wear else 28 for _ in range(copies))
            pages = [print_on_paper(ink, rng, wear, jitter) for jitter in jitters]
    except (ValueError, RuntimeError, IndexError):
        return []
    return [(latex, *to_patches(page)) for page in pages if page.shape[0] <= 180]


def collate(samples, encode, prefix, suffix, image_id, pad_id):
    """Pad samples to one batch of arrays, positions included, so that the training process only copies them.

    patches uint8 (B, P, 196), patch_rows and patch_columns (B, P), patch_count (B), input_ids (B, L), and positions
    (3, B, L) for M-RoPE. Image tokens image_from of (B * P / 4) go to places image_to of (B * L); the tokens at
    learn_from of (B * L) are to be followed by targets.
    """
    answers = [encode(latex) for latex, _, _ in samples]
    count = [len(patches) for _, patches, _ in samples]
    length = [len(prefix) + n // 4 + len(suffix) + len(a) for n, a in zip(count, answers, strict=True)]
    size, longest, most = len(samples), -(-max(length) // 8) * 8, -(-max(count) // 16) * 16
    batch = {
        "patches": np.zeros((size, most, 196), np.uint8),
        "patch_rows": np.zeros((size, most), np.int16),
        "patch_columns": np.zeros((size, most), np.int16),
        "patch_count": np.array(count, np.int16),
        "input_ids": np.full((size, longest), pad_id, np.int16),
        "positions": np.zeros((3, size, longest), np.int16),
    }
    image_from, image_to, learn_from = [], [], []
    for i, ((_, patches, (rows, columns)), answer) in enumerate(zip(samples, answers, strict=True)):
        n, image = len(patches), len(patches) // 4
        batch["patches"][i, :n] = patches
        # Patches come in blocks of 2 x 2, the ones that are merged into one image token.
        row, column = np.mgrid[:rows, :columns]
        for name, index in (("patch_rows", row), ("patch_columns", column)):
            blocks = index.reshape(rows // 2, 2, columns // 2, 2).transpose(0, 2, 1, 3)
            batch[name][i, :n] = blocks.reshape(-1)
        ids = prefix + [image_id] * image + suffix + answer
        batch["input_ids"][i, : len(ids)] = ids
        image_from.append(i * most // 4 + np.arange(image))
        image_to.append(i * longest + len(prefix) + np.arange(image))
        learn_from.append(i * longest + np.arange(len(ids) - len(answer) - 1, len(ids) - 1))
        # M-RoPE: text counts on in all three, an image is one moment with its rows and columns.
        start, (row, column) = len(prefix), np.mgrid[: rows // 2, : columns // 2].reshape(2, -1)
        batch["positions"][:, i, :start] = np.arange(start)
        batch["positions"][:, i, start : start + image] = start + np.stack([row * 0, row, column])
        after = start + max(rows, columns) // 2
        rest = len(ids) - start - image
        batch["positions"][:, i, start + image : len(ids)] = after + np.arange(rest)
    for name, parts in (("image_from", image_from), ("image_to", image_to), ("learn_from", learn_from)):
        batch[name] = np.concatenate(parts).astype(np.int32)
    batch["targets"] = np.concatenate(answers).astype(np.int16)
    return batch


def draw_batches(queue, level, school, seed, budget, tokenizer_file, prompt):
    """A worker: fill `queue` with batches of about `budget` tokens for ever. Samples of like size share a batch."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    rng = random.Random(seed)

    def encode(latex):
        return tokenizer.encode(latex).ids + [prompt["stop"]]

    def cost(sample):
        return len(sample[1]) + sample[0].count(" ") + 32

    while True:
        now, pool, total = level.value, [], 0
        while total < (8 if now > 1 else 1) * budget:
            samples = make_samples(rng, now, school)
            pool += samples
            total += sum(map(cost, samples))
        pool.sort(key=cost)
        # Cut into batches of equal cost.
        count, so_far = max(round(total / budget), 1), 0
        batches = [[] for _ in range(count)]
        for sample in pool:
            batches[so_far * count // total].append(sample)
            so_far += cost(sample)
        rng.shuffle(batches)
        for samples in filter(None, batches):
            queue.put(
                collate(samples, encode, prompt["prefix"], prompt["suffix"], prompt["image_id"], prompt["pad_id"])
            )


def batch_loss(model, batch, spotter=None):
    """Mean loss over the answers' tokens; and, with a `spotter`, the loss of naming the tokens that are in the image.

    Computes what `model(**inputs).loss` computes. The library runs its vision attention image by image; here the images
    of a batch are padded to one length and go together, which is many times faster for small ones.
    """
    import torch
    import torch.nn.functional as F
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    visual, text = model.model.visual, model.model.language_model
    size, most, _ = batch["patches"].shape
    gray = batch["patches"].float() / 255
    mean = gray.new_tensor([0.48145466, 0.4578275, 0.40821073])[:, None]
    deviation = gray.new_tensor([0.26862954, 0.26130258, 0.27577711])[:, None]
    # (B, P, 3 colours, 2 frames, 14 x 14): a gray image has one colour thrice, and a still image two equal frames.
    pixels = ((gray[:, :, None] - mean) / deviation)[:, :, :, None].expand(-1, -1, -1, 2, -1)
    kernel = visual.patch_embed.proj.weight.flatten(1)
    # float() keeps the residual streams in float32 under autocast.
    hidden = F.linear(pixels.reshape(size, most, -1), kernel).float()
    places = torch.stack([batch["patch_rows"], batch["patch_columns"]], -1).view(-1, 2)
    cos, sin = (x.view(size, most, -1) for x in visual.rotary_pos_emb(hidden, places))
    real = torch.arange(most, device=hidden.device) < batch["patch_count"][:, None]
    for block in visual.blocks:
        heads = visual.config.num_heads
        q, k, v = block.attn.qkv(block.norm1(hidden)).view(size, most, 3, heads, -1).unbind(2)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        hidden = hidden + block.attn.proj(mixed.transpose(1, 2).reshape(size, most, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    image_tokens = visual.merger(hidden)
    embeds = text.embed_tokens(batch["input_ids"])
    flat = embeds.view(-1, embeds.shape[-1])
    flat = flat.index_copy(0, batch["image_to"], image_tokens[batch["image_from"]].to(flat.dtype))
    # Padding is on the right and attention looks left, so no mask is needed.
    out = text(inputs_embeds=flat.view_as(embeds), position_ids=batch["positions"], use_cache=False).last_hidden_state
    logits = model.lm_head(out.flatten(0, 1)[batch["learn_from"]])
    loss = F.cross_entropy(logits.float(), batch["targets"])
    if spotter is None:
        return loss
    seen = spotter(image_tokens).view(size, most // 4, -1).float()
    seen = seen.masked_fill(~real[:, ::4, None], -1e9).amax(1)
    present = torch.zeros_like(seen)
    present[batch["learn_from"] // embeds.shape[1], batch["targets"]] = 1
    present[:, model.config.text_config.eos_token_id] = 0
    return loss, F.binary_cross_entropy_with_logits(seen, present, reduction="sum") / present.sum()


def edit_distance(a, b):
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def read(model, processor, images, max_new_tokens=160, batch_size=64):
    """Greedy reading of PIL images through the library's own processor and `generate`: a list of LaTeX strings."""
    import torch

    content = [{"type": "text", "text": INSTRUCTION}, {"type": "image"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    texts = []
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size]
        inputs = processor(
            text=[prompt] * len(chunk), images=chunk, padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def scores(texts, references):
    """Character error rate (edit distance over reference length) and exact match, both without spaces."""
    pairs = [(a.replace(" ", ""), b.replace(" ", "")) for a, b in zip(texts, references, strict=True)]
    errors, characters = sum(edit_distance(a, b) for a, b in pairs), sum(len(b) for _, b in pairs)
    return errors / characters, sum(a == b for a, b in pairs) / len(pairs)


def save(model, processor, folder):
    """Write the model as bfloat16, aside first: a run that is stopped leaves the last whole one."""
    import torch

    aside = folder.with_name(folder.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight")  # tied to the embeddings
    model.config.dtype = torch.bfloat16
    model.save_pretrained(aside, state_dict=weights)
    processor.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def make_base(folder, minutes, seed, workers, budget, learning_rate, warmup=100, revise=False):
    """Train the base model for `minutes` and save it.

    `revise` goes on with the model in `folder`: the curriculum stays between its second and third level, at formulas of
    up to 58 tokens, and most of them are of the school's alphabet. Without it the model is new.

    `budget` is the size of a batch in tokens (patches count too); 2**15 suits a large GPU, 2**11 a CPU. The time is the
    schedule: how many steps fit into it depends on the machine, so another machine's model is as good, not the same.

    Formulas from the start teach only how formulas go: the text alone lowers the loss, and the image, of which nothing
    can be made yet, gets no gradient. What makes reading emerge within a few hundred steps:
    - first single symbols in the middle of the image, then a curriculum that goes on as the loss allows;
    - a spotter, thrown away at the end: a linear layer that has to name from the image tokens which tokens are in the
      picture, in any order. It shows the vision tower the way before the language model looks at it.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    began = time.time()
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    if revise:
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # see `make_model`; loading drops them
            setattr(model.config, name, getattr(model.config.text_config, name))
    else:
        processor = make_processor(seed)
        model = make_model(processor.tokenizer)
        save(model, processor, folder)
    tokenizer = processor.tokenizer
    model.to(device).train()
    spotter = torch.nn.Linear(model.config.text_config.hidden_size, model.config.text_config.vocab_size)
    torch.nn.init.constant_(spotter.bias, -5.0)  # most tokens are absent
    spotter.to(device)

    content = [{"type": "text", "text": INSTRUCTION}, {"type": "image"}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before, after = chat.split("<|image_pad|>")
    prompt = {
        "prefix": tokenizer.encode(before),
        "suffix": tokenizer.encode(after),
        "image_id": model.config.image_token_id,
        "pad_id": tokenizer.pad_token_id,
        "stop": tokenizer.eos_token_id,
    }
    context = multiprocessing.get_context("spawn")
    queue, level = context.Queue(3 * workers), context.Value("d", REVISION_LEVEL if revise else 0.0)
    drawers = []
    for i in range(workers):
        name = f"{seed}-{'revision' if revise else 'base'}-{i}"
        arguments = (queue, level, 0.6 if revise else 0.0, name, budget, str(folder / "tokenizer.json"), prompt)
        drawers.append(context.Process(target=draw_batches, args=arguments, daemon=True))
        drawers[-1].start()
    print(
        f"{model.num_parameters() / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}, {workers} workers", flush=True
    )

    # Held-out printed formulas: never trained on, here or in the fine-tuning.
    rng = random.Random(f"{seed}-validation")
    references, images = [], []
    while len(references) < 192:
        latex = draw_formula(rng, (0, 3, 5, 2))
        if is_held_out(latex):
            try:
                images.append(Image.fromarray(print_on_paper(coverage(latex, 22, "cm"), rng)).convert("RGB"))
                references.append(latex)
            except (ValueError, RuntimeError, IndexError):
                continue

    kernel = model.model.visual.patch_embed.proj.weight
    answer_to_white = kernel.detach().mean((1, 2, 3, 4), keepdim=True)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    everything = [*decay, *rest, *spotter.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": [*rest, *spotter.parameters()], "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
        fused=device == "cuda",
    )
    # Where typesetting is slower than training, recent batches are used again when no new one is ready.
    kept, fresh, step, seen, running = collections.deque(maxlen=1500), 0, 0, 0, None
    start, next_line, next_score = time.time(), 0.0, 0.4
    end = start + 60 * minutes
    while (now := time.time()) < end:
        progress = (now - start) / (end - start)
        if not kept or not queue.empty() or device == "cpu":
            batch = {name: torch.from_numpy(array).to(device) for name, array in queue.get().items()}
            kept.append(batch)
            fresh += 1
        else:
            batch = kept[rng.randrange(len(kept))]
        batch = {name: tensor if name == "patches" else tensor.long() for name, tensor in batch.items()}
        rate = learning_rate * min(1, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, spotting = batch_loss(model, batch, spotter)
        hint = 0.0 if revise else 0.5 * max(1 - progress / 0.7, 0)  # a model that reads needs none
        (loss + hint * spotting).backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            # All pixels of a page are white alike, so every step would add up to a large change of this one number,
            # and what tells one patch from the next would be drowned.
            kernel += answer_to_white - kernel.mean((1, 2, 3, 4), keepdim=True)
            parts = torch.stack([loss, spotting])
            running = parts if running is None else running.lerp(parts, 0.03)
        step += 1
        seen += len(batch["patches"])
        if step % 10 == 0 and not revise:
            # As fast as the model follows; in the end regardless, so that some time is spent on everything.
            if running[0] < (0.8 if level.value < 1 else 0.6):
                level.value = min(level.value + 10 / 1500, LAST_LEVEL)
            level.value = max(level.value, min(LAST_LEVEL * (progress - 0.1) / 0.75, LAST_LEVEL))
        if now - start > next_line:
            next_line = now - start + 10
            print(
                f"{now - start:5.0f} s  level {level.value:.2f}  step {step}  fresh {fresh}  samples {seen}  "
                f"loss {running[0]:.4f}  spotting {running[1]:.3f}",
                flush=True,
            )
        if progress > next_score:
            next_score += 0.2
            save(model, processor, folder)
            model.eval()
            texts = read(model, processor, images[:96], batch_size=96)
            model.train()
            error, exact = scores(texts, references[:96])
            print(f"  held-out printed formulas: CER {error:.3f}, exact {exact:.1%}", flush=True)
    save(model, processor, folder)
    for drawer in drawers:
        drawer.terminate()

    # What was written is what counts: read it again from the folder, as the fine-tuning script will.
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    texts = read(model, AutoProcessor.from_pretrained(folder), images, batch_size=192)
    error, exact = scores(texts, references)
    for text, reference in list(zip(texts, references, strict=True))[:8]:
        print(f"  {reference}\n  {text}\n")
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    print(
        f"{folder}: {megabytes:.1f} MB, held-out printed formulas: CER {error:.3f}, exact {exact:.1%}\n"
        f"{step} steps, {seen} samples ({fresh} batches drawn, {step - fresh} used again), "
        f"{(time.time() - began) / 60:.1f} min on {machine} and {os.cpu_count()} CPU cores",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description="Make demo/model and demo/data again from nothing.")
    parser.add_argument("--only", choices=["data", "model", "revision"], help="make one of them (default: all)")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder that gets `model` and `data`")
    parser.add_argument(
        "--minutes", type=float, help="training time of the base model (default: 7.3 on a GPU, 60 on a CPU)"
    )
    parser.add_argument(
        "--revision_minutes", type=float, help="training time of its revision (default: 1.4 on a GPU, 12.5 on a CPU)"
    )
    parser.add_argument("--workers", type=int, default=max(os.cpu_count() - 1, 1), help="processes that draw formulas")
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--train_rows", type=int, default=7000)
    parser.add_argument("--test_rows", type=int, default=200)
    parser.add_argument("--batch_tokens", type=int, help="tokens in a batch (default: 32768 on a GPU, 2048 on a CPU)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the base model; the revision's is 3e-4")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only in (None, "data"):
        began = time.time()
        make_data(args.out / "data", args.train_rows, args.test_rows, args.seed, args.workers)
        print(f"the data took {time.time() - began:.0f} s on {args.workers} processes")
    if args.only != "data":
        import torch

        gpu = torch.cuda.is_available()
        minutes = args.minutes or (7.3 if gpu else 60)
        budget = args.batch_tokens or (2**15 if gpu else 2**11)
        shared = {"folder": args.out / "model", "seed": args.seed, "workers": args.workers, "budget": budget}
        if args.only != "revision":
            make_base(**shared, minutes=minutes, learning_rate=args.learning_rate)
        minutes = args.revision_minutes or (1.4 if gpu else 12.5)
        make_base(**shared, minutes=minutes, learning_rate=3e-4, revise=True)


if __name__ == "__main__":
    main()
