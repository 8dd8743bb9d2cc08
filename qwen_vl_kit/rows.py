"""Rows: what people's files look like, which rows can be used, and images as a person sees them.

Wraps `load_splits` (any file the README names, images decoded with care, formulas respelled on demand), `choose_rows`
(rows that can't be used are named and left out) and `order_rows` (held-out formulas that training images show, too, are
counted, and formulas that stand in $...$).
"""

import hashlib
import io
import json
import random
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from math import isinf
from pathlib import Path

from datasets import Image, Value, load_dataset
from datasets.config import DOWNLOADED_DATASETS_PATH
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image as Pillow
from PIL import ImageOps
from tqdm.auto import tqdm

from qwen_vl_kit import latex, run
from qwen_vl_kit.sentences import fail

FILE_TYPES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
warnings.simplefilter("error", Pillow.DecompressionBombWarning)  # from 89 million pixels on
Pillow.init()
IMAGE_TYPES = [name for name in Pillow.ID if name != "EPS"]  # that is a program, for Ghostscript to run


class Unusable(Exception):
    """Why a row can't be used, in words."""


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def image_bytes(image, folder):
    """The file of `image`, {"bytes": bytes or None, "path": str or None} as `datasets` has it undecoded.

    Paths start in `folder`, and may lead nowhere else, but into the cache of what was downloaded.
    """
    if image["bytes"]:
        return image["bytes"]
    path = image["path"]
    if path.startswith('"'):  # as `datasets` has it where other rows of a JSON file hold other things than paths
        path = json.loads(path)
    file = (folder / path).resolve()
    if not any(file.is_relative_to(place) for place in (folder.resolve(), Path(DOWNLOADED_DATASETS_PATH).resolve())):
        raise Unusable("image outside the data set's folder")
    if not file.is_file():  # a pipe would be waited for
        raise FileNotFoundError(file)
    return file.read_bytes()


def open_image(content):
    """Decodes the bytes of an image file to RGB as a person would see it; raises what Pillow raises if it can't."""
    return as_seen(opened(content))


def opened(content):
    """The image in the bytes of a file, not decoded yet. Raises Unusable if it has too many pixels."""
    try:
        return Pillow.open(io.BytesIO(content), formats=IMAGE_TYPES)
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
        raise Unusable("image of too many pixels") from None


def as_seen(picture):
    """An image as RGB, as a person would see it. Raises Unusable if it is too narrow for the model.

    Transparency becomes white paper (else black text on it is black on black), 16 bits a pixel become 8 (else they are
    clipped to white), and a photo is turned as its EXIF data says.
    """
    if max(picture.size) > 200 * min(picture.size):  # Qwen2-VL takes no others
        raise Unusable("image over 200 times as long as wide")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = picture.point(lambda level: level * (1 / 256)).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Pillow.alpha_composite(Pillow.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


@dataclass
class Picture(Image):
    """The type of a column of images that are decoded by `open_image`."""

    def decode_example(self, value, token_per_repo_id=None):
        return open_image(image_bytes(value, run.data_folder))


@dataclass
class Formula(Value):
    """The type of a column of formulas that are respelled when they are asked for: a million at once take minutes."""

    def decode_example(self, value, token_per_repo_id=None):
        return latex.spelled(value)


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def load_splits(step, options):
    splits = as_found(options)
    check_columns(splits, options.dataset_train_split, "--dataset_train_split", options)
    return with_spelling(with_pictures(splits, options), options, run.extra.normalize_latex)


def with_spelling(splits, options, uniform):
    """The same splits, their formulas in one spelling if that is asked for."""
    kinds = {str(getattr(rows.features[options.text_column], "dtype", "")) for rows in splits.values()}
    if not uniform or kinds - {"string", "large_string"}:  # the rows of others are left out
        return splits
    print("Formulas are written in one spelling, in training and in what readings are compared with.")
    return splits.cast_column(options.text_column, Formula("string"))


def as_found(options):
    """The splits of `options.dataset_name` as they are there: a hub name, a file, or a folder."""
    source = Path(options.dataset_name)
    if source.is_file() and source.suffix not in FILE_TYPES:
        fail(f"{source} is not a supported file ({', '.join(FILE_TYPES)}). Name one, a folder, or a hub data set.")
    run.data_folder = source if source.is_dir() else source.parent if source.is_file() else Path(HF_HUB_CACHE)
    if source.is_file():
        return load_dataset(FILE_TYPES[source.suffix], data_files=str(source))
    return load_dataset(options.dataset_name, options.dataset_config)


def check_columns(splits, split, option, options):
    """Ends the run if there is no such split, which `option` names, or if it lacks a column."""
    if split not in splits:
        fail(f"{options.dataset_name} has no split {split!r}; set {option} to one of {[*splits]}.")
    columns = splits[split].column_names
    for option in ("image_column", "text_column"):
        if (name := getattr(options, option)) not in columns:
            fail(f"{options.dataset_name} has no column {name!r}; set --{option} to one of {columns}.")


def with_pictures(splits, options):
    """The same splits, their images decoded by `open_image` when they are asked for."""
    column = options.image_column
    try:
        return splits.cast_column(column, Image(decode=False)).cast_column(column, Picture())
    except (TypeError, ValueError, NotImplementedError):
        fail(f"Column {column!r} of {options.dataset_name} holds no images; choose another with --image_column.")


def tokens_of(picture, text):
    """How many tokens the sample of a row is, from the question to the end of the answer."""
    question = [{"type": "text", "text": run.options.instruction}, {"type": "image"}]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
    sample = run.processor.apply_chat_template(chat, tokenize=False).strip()
    return len(run.processor(text=[sample], images=[[picture]], add_special_tokens=False).input_ids[0])


def examine(row, options, held_out, special_tokens):
    """The image of a row and the digest of its pixels. Raises Unusable with the reason if the row can't be used."""
    text = row[options.text_column]
    if not isinstance(text, str | None):
        raise Unusable("text is not a string")
    if not (text or "").strip():
        raise Unusable("no text")
    if len(text) > run.extra.max_characters:
        raise Unusable(f"text of more than {run.extra.max_characters:,} characters")
    if any(token in text for token in special_tokens):
        raise Unusable("text with special tokens of the model")
    try:
        picture = open_image(image_bytes(row[options.image_column], run.data_folder))
    except Unusable:
        raise
    except Exception as error:  # on a broken file Pillow's decoders raise anything
        raise Unusable("image missing or unreadable") from error
    if picture.getcolors(1):
        raise Unusable("image of one color")
    digest = hashlib.sha256(picture.tobytes()).digest()
    if digest in held_out:
        raise Unusable(f"same image as a held-out{' or validation' * bool(run.validation_set)} row")
    if options.max_length and tokens_of(picture, text) > options.max_length:
        raise Unusable(f"more than {options.max_length:,} tokens")
    return picture, digest


def report_skipped(skipped, kind):
    """Prints how many rows were left out, and why. `record` writes them down when it is clear that the run begins."""
    reasons = defaultdict(list)
    for row in skipped:
        reasons[row["reason"]].append(row["row"])
    for reason, numbers in reasons.items():
        named = ", ".join(map(str, sorted(numbers)[:20])) + (", ..." if len(numbers) > 20 else "")
        print(f"Left out {len(numbers)} {kind} row{'s' * (len(numbers) > 1)} ({reason}): {named}")
    run.skipped += skipped


def pick(rows, wanted, excluded, options, kind, done=()):
    """Looks for `wanted` usable rows, in an order that the seed decides, none with an image whose digest is `excluded`.

    Returns {number: about tokens}, the digests of their images, and the numbers of all rows looked at. `done` are
    numbers of rows to pass by. What is left out is reported as rows of this `kind`.
    """
    total = len(rows) if isinf(wanted) else min(wanted, len(rows))
    lengths, digests, skipped, examined = {}, set(), [], set()
    added = run.processor.tokenizer.added_tokens_decoder.values()
    special_tokens = [token.content for token in added if token.special]
    with tqdm(desc=f"Checking {kind} rows", total=total, leave=False) as bar:
        for number in random.Random(options.seed).sample(range(len(rows)), len(rows)):
            if len(lengths) >= wanted:
                break
            if number in done:
                continue
            examined.add(number)
            row = rows[number]
            try:
                picture, digest = examine(row, options, excluded, special_tokens)
            except Unusable as reason:
                skipped.append({"row": number, "split": str(rows.split), "reason": str(reason)})
                continue
            text = row[options.text_column]
            lengths[number] = picture.width * picture.height / 28**2 + len(text) / 2
            digests.add(digest)
            run.digests[kind, number] = hashlib.sha256(digest + text.encode()).digest()[:16]
            bar.update()
    report_skipped(skipped, kind)
    return lengths, digests, examined


def choose_rows(step, rows, wanted, held_out, options):
    """The first call is for held-out rows, the second for those to validate and to train on."""
    decoded, rows = rows, rows.cast_column(options.image_column, Image(decode=False))
    if not held_out:
        run.digests, run.skipped = {}, []
        lengths, digests, run.test_examined = pick(rows, wanted, held_out, options, "held-out")
        if len(digests) < len(lengths):
            print(f"{len(lengths) - len(digests)} of the held-out rows have the same image as another one")
        run.test_rows, run.test_numbers = rows, [*lengths]
        enough(options, "", lengths)
        return lengths, digests
    done = {*run.test_examined} if rows.split == run.test_rows.split else set()
    run.train_rows, run.validation_set, apart = rows, None, held_out
    if count := run.extra.num_validation_rows:
        validation, digests, examined = pick(rows, count, held_out, options, "validation", done)
        apart, done = held_out | digests, done | examined
        run.validation_set = decoded.select([*validation])
        if len(validation) < count:
            enough(options, f" and {len(validation)} for validation (--num_validation_rows {count})", {})
        print(f"{count} training rows are set aside for validation")
    run.lengths, digests, _ = pick(rows, wanted, apart, options, "training", done)
    enough(options, f" and {len(run.lengths)} others to train on", run.lengths)
    return run.lengths, digests


def enough(options, others, lengths):
    """Ends the run if there are fewer held-out rows than asked for, or none in `lengths`."""
    if len(run.test_numbers) < options.num_test_rows or not lengths:
        fail(
            f"{options.dataset_name} has too few rows: {len(run.test_numbers)} to hold out (--num_test_rows "
            f"{options.num_test_rows}){others}. Lower --num_test_rows, or add data."
        )


def texts_of(rows, numbers, column):
    """The texts of some rows, as they are in the data set."""
    return rows.select([*numbers]).select_columns(column).with_format("arrow")[:][column].to_pylist()


def order_rows(step, lengths, options):
    run.order = step(lengths, options)
    trained = texts_of(run.train_rows, dict.fromkeys(run.order), options.text_column)
    held_out = texts_of(run.test_rows, run.test_numbers, options.text_column)
    known = {"".join(text.split()) for text in trained}
    seen = sum("".join(text.split()) in known for text in held_out)
    run.notes["rows_of_seen_formulas"] = seen
    if seen:
        print(f"{seen} of the held-out images show formulas that also appear in training images")
    if said := delimited(trained + held_out):
        print(said)
    return run.order


def delimited(texts):
    """A sentence on how many formulas stand in $...$ or the like, if any does."""
    counts = Counter(map(latex.delimiter, texts))
    bare = counts.pop("", 0)
    kinds = [f"{count} of {len(texts)} texts stand in {latex.AROUND[kind]}" for kind, count in counts.most_common()]
    if not kinds:
        return ""
    if run.extra.normalize_latex:
        return f"{', '.join(kinds)}: that is taken off"
    if bare or len(kinds) > 1:
        return f"{', '.join(kinds)}: the model learns all of that; --normalize_latex writes them in one way"
    return f"{', '.join(kinds)}, and so will readings; scores look at what is inside"
