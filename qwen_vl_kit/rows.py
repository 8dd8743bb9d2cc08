"""Rows: which of them can be used, and what is said of the others.

Wraps `load_splits` (any file the README names, images decoded with care, formulas respelled on demand), `choose_rows`
(rows that can't be used are named and left out) and `order_rows` (held-out formulas that training images show, too, are
counted, and formulas that stand in $...$).
"""

import hashlib
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import isinf
from pathlib import Path
from typing import NamedTuple

import PIL
from datasets import Image, Value
from tqdm.auto import tqdm

from qwen_vl_kit import latex, latex_commands, looking, pictures, run
from qwen_vl_kit.pictures import (  # noqa: F401 (as other rooms know them)
    IMAGE_TYPES,
    Picture,
    Unusable,
    as_seen,
    image_bytes,
    open_image,
    opened,
    path_of,
    why,
)
from qwen_vl_kit.sentences import fail
from qwen_vl_kit.sources import as_found, find_images


@dataclass
class Formula(Value):
    """The type of a column of formulas that are respelled when they are asked for: a million at once take minutes."""

    def decode_example(self, value, token_per_repo_id=None):
        return latex.spelled(value)


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
        splits = splits.cast_column(column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError):
        fail(f"Column {column!r} of {options.dataset_name} holds no images; choose another with --image_column.")
    find_images(splits, options)
    return splits.cast_column(column, Picture())


def token_side(processor):
    """How many pixels wide and high an image token is, as the script has it: 28, as in Qwen2-VL, if nothing tells."""
    images = getattr(processor, "image_processor", None)
    return images.patch_size * images.merge_size if hasattr(images, "merge_size") else 28


def tokens_of(picture, text):
    """How many tokens the sample of a row is, from the question to the end of the answer."""
    question = [{"type": "text", "text": run.options.instruction}, {"type": "image"}]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
    sample = run.processor.apply_chat_template(chat, tokenize=False).strip()
    return len(run.processor(text=[sample], images=[[picture]], add_special_tokens=False).input_ids[0])


class Looked(NamedTuple):
    """What looking at a row has found."""

    width: int = 0  # of its image, in pixels
    height: int = 0
    characters: int = 0  # of its text
    digest: bytes = b""  # of the image's pixels
    whole: bytes = b""  # of image and text
    refused: Unusable | None = None  # why the row can't be used, whatever else is
    late: Unusable | None = None  # the same, but to be said only if no better reason is found


def look_at(row, options, special_tokens):
    """A `Looked` of an undecoded row: all that this row alone can tell."""
    text = row[options.text_column]
    if not isinstance(text, str | None):
        return Looked(refused=Unusable("text is not a string"))
    if not (text or "").strip():
        return Looked(refused=Unusable("no text"))
    if len(text) > run.extra.max_characters:
        return Looked(refused=Unusable(f"text of more than {run.extra.max_characters:,} characters"))
    if any(token in text for token in special_tokens):
        return Looked(refused=Unusable("text with special tokens of the model"))
    try:
        content = image_bytes(row[options.image_column], run.data_folder)
    except Unusable as refused:
        return Looked(refused=refused)
    except (OSError, ValueError) as error:  # a name that no file can have, or one that may not be read
        return Looked(refused=Unusable("image file is missing", f" ({getattr(error, 'strerror', None) or error})"))
    try:
        picture = open_image(content)
    except Unusable as refused:
        return Looked(refused=refused)
    except Exception as error:  # on a broken file Pillow's decoders raise anything
        return Looked(refused=why(error, content))
    if picture.getcolors(1):
        return Looked(refused=Unusable("image of one color"))
    digest, late = hashlib.sha256(picture.tobytes()).digest(), None
    if options.max_length and tokens_of(picture, text) > options.max_length:
        late = Unusable(f"more than {options.max_length:,} tokens")
    return Looked(*picture.size, len(text), digest, hashlib.sha256(digest + text.encode()).digest()[:16], late=late)


def name_of(row, number, split, column):
    """How people can find an undecoded row: its image's file and its line, or else its number."""
    image, line = row[column], run.lines_of.get(split)
    path = path_of(image) if image and image["path"] else None
    if path and run.data_folder and path.startswith(f"{run.data_folder}/"):
        path = path[len(f"{run.data_folder}/") :]
    if path and len(path) > 200:
        path = path[:200] + "..."
    line = line and line(number)
    return f"{path} on {line}" if path and line else path or line or f"row {number}"


def report_skipped(skipped, kind):
    """Prints how many rows were left out, and why. `record` writes them down when it is clear that the run begins."""
    reasons = defaultdict(list)
    for reason, row in skipped:
        detail = reason.detail.strip(": ()")
        reasons[reason.reason].append((row["row"], row["name"] + f" ({detail})" * bool(detail)))
    for reason, rows in reasons.items():
        named = ", ".join(name for _, name in sorted(rows)[:20]) + (", ..." if len(rows) > 20 else "")
        print(f"Left out {len(rows)} {kind} row{'s' * (len(rows) > 1)} ({reason}): {named}")
    run.skipped += [row for _, row in skipped]


def keep(rows, options, special_tokens):
    """Where what is found in these rows is kept, or None: by all that decides what is found, this code included."""
    modules = (pictures, latex, latex_commands, sys.modules[__name__])
    code = [hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() for module in modules]
    how = [options.image_column, options.text_column, run.extra.max_characters, special_tokens, PIL.__version__, *code]
    how += [run.extra.normalize_latex]
    if options.max_length:
        how += [options.max_length, run.options.instruction, run.processor.chat_template, run.record.get("base")]
        how += [run.processor.image_processor.size, len(run.processor.tokenizer)]
    return looking.kept(rows, options.image_column, Looked, *how)


def pick(rows, wanted, excluded, options, kind, done=()):
    """Looks for `wanted` usable rows, in an order that the seed decides, none with an image whose digest is `excluded`.

    Returns {number: about tokens}, the digests of their images, and the numbers of all rows looked at. `done` are
    numbers of rows to pass by. What is left out is reported as rows of this `kind`.
    """
    total = len(rows) if isinf(wanted) else min(wanted, len(rows))
    lengths, digests, skipped, examined = {}, set(), [], set()
    added = run.processor.tokenizer.added_tokens_decoder.values()
    special_tokens = [token.content for token in added if token.special]
    same = Unusable(f"same image as a held-out{' or validation' * bool(run.validation_set)} row")
    order = (number for number in random.Random(options.seed).sample(range(len(rows)), len(rows)) if number not in done)
    look = partial(look_at, options=options, special_tokens=special_tokens)
    split, column = str(rows.split), options.image_column
    side = token_side(run.processor)
    kept = keep(rows, options, special_tokens) if total > looking.ALONE else None
    with tqdm(desc=f"Checking {kind} rows", total=total, leave=False) as bar:
        for number, looked in looking.look(rows, order, look, wanted, kept):
            examined.add(number)
            if reason := looked.refused or (same if looked.digest in excluded else looked.late):
                name = name_of(rows[number], number, split, column)
                skipped.append((reason, {"row": number, "split": split, "name": name, "reason": str(reason)}))
                continue
            lengths[number] = looked.width * looked.height / side**2 + looked.characters / 2
            digests.add(looked.digest)
            run.digests[kind, number] = looked.whole
            bar.update()
            if len(lengths) >= wanted:
                break
    if kept:
        kept.save()
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


def order_rows(step, lengths, options):
    run.order = step(lengths, options)
    used, there = len({*run.order}), len(run.train_rows) - (len(run.validation_set) if run.validation_set else 0)
    if run.train_rows.split == run.test_rows.split:
        there -= len(run.test_numbers)
    if not options.num_train_epochs and used < there:
        print(f"{options.max_steps:,} steps of {options.batch_size} need {used:,} of {there:,} rows to train on")

    column, order = options.text_column, {*run.order}
    held_out = ["".join(text.split()) for text in texts_of(run.test_rows, run.test_numbers, column)]
    known = {*held_out}.intersection("".join(text.split()) for text in texts_of(run.train_rows, order, column))
    seen = sum(formula in known for formula in held_out)
    run.notes["rows_of_seen_formulas"] = seen
    if seen:
        print(f"{seen} of the held-out images show formulas that also appear in training images")
    parts = texts_of(run.train_rows, order, column), texts_of(run.test_rows, run.test_numbers, column)
    if said := delimited(chain(*parts)):
        print(said)
    return run.order


def texts_of(rows, numbers, column):
    """Yields the texts of some rows, as they are in the data set, by 10,000: one by one takes 25 times as long."""
    numbers, rows = sorted(numbers), rows.select_columns(column).with_format("arrow")
    for start in range(0, len(numbers), 10_000):
        yield from rows.select(numbers[start : start + 10_000])[:][column].to_pylist()


def delimited(texts):
    """A sentence on how many formulas stand in $...$ or the like, if any does."""
    counts = Counter(map(latex.delimiter, texts))
    total, bare = sum(counts.values()), counts.pop("", 0)
    kinds = [f"{count} of {total} texts stand in {latex.AROUND[kind]}" for kind, count in counts.most_common()]
    if not kinds:
        return ""
    if run.extra.normalize_latex:
        return f"{', '.join(kinds)}: that is taken off"
    if bare or len(kinds) > 1:
        return f"{', '.join(kinds)}: the model learns all of that; --normalize_latex writes them in one way"
    return f"{', '.join(kinds)}, and so will readings; scores look at what is inside"
