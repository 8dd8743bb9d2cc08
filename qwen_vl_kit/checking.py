"""What `check` finds in a data set, and how it tells: on the terminal in short, on a page with the rows by name."""

import base64
import io
import re
from collections import Counter, defaultdict
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

from datasets import Image
from jinja2 import Environment
from tqdm.auto import tqdm
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from qwen_vl_kit import hub, latex, looking, rows, run
from qwen_vl_kit.report_page import template

SHOWN = 12  # images on the page
NAMED = 50  # rows of a kind that are named on the page
CHAT = 30  # tokens of question and chat template, about
LARGEST = 12_845_056  # Qwen2-VL's own max_pixels
LINES = re.compile(r"\s*(\\begin\{(align|gather)\*?\})")  # several formulas: scores don't take it off


class Found(NamedTuple):
    """What is kept of a row."""

    looked: rows.Looked
    tokens: int
    formula: int  # a hash of its text without spaces
    spelling: str  # what stands around it, as `around` has it
    spacing: str  # "apart" if its tokens are, as in "\frac { a } { b }", "close" as in "\frac{a}{b}", or ""
    unicode: str  # its characters that are no ASCII


def check(wanted):
    """Looks at the data set that `wanted` names, tells of it and writes a page. Returns whether it can be used."""
    run.options = run.extra = wanted
    wanted.normalize_latex = False
    processor = None
    if wanted.model_name_or_path:
        name = wanted.model_name_or_path
        processor = hub.load("model", name, lambda: AutoProcessor.from_pretrained(name, trust_remote_code=False))
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    if processor:
        added = processor.tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
    splits = hub.load_splits(lambda options: rows.load_splits(None, options), wanted)
    tokenizer = processor and processor.tokenizer
    parts = {}
    for split, these in splits.items():
        if {wanted.image_column, wanted.text_column} <= {*these.column_names}:
            parts[split] = of_split(split, these, wanted, special, tokenizer, rows.token_side(processor))
    together = [*across(parts, wanted), counted(processor, wanted.model_name_or_path)]
    about = "" if tokenizer else "about "
    for part in parts.values():
        part["spelled"] = spelled_in(part)
    lines = [line for part in parts.values() for line in told(part, about, wanted)] + together
    print("\n".join(["", *lines]))
    wanted.output.parent.mkdir(parents=True, exist_ok=True)
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template("check.html.j2"))
    page = page.render(name=wanted.dataset_name, parts=parts.values(), together=together, about=about, named=NAMED)
    wanted.output.write_text(page, encoding="utf-8")
    print(f"\nThe rows by name, and the first images, are in {wanted.output}.")
    return all(part["usable"] for part in parts.values())


def counted(processor, model):
    """How tokens were counted, as a sentence."""
    side = rows.token_side(processor)
    text = f"as {model} does" if model else "by estimate; --model_name_or_path names a model that counts its own"
    return f"Tokens: an image has one for every {side} x {side} pixels; text is counted {text}."


def look_at(row, options, special, tokenizer, side):
    # Lengths are counted here: without a model, `rows` could not.
    looked = rows.look_at(row, SimpleNamespace(**vars(options) | {"max_length": None}), special)
    text = row[options.text_column]
    if looked.refused:
        return Found(looked, 0, 0, "", "", "")
    height, width = max(looked.height, 1), max(looked.width, 1)
    high, wide = smart_resize(height, width, side, options.min_pixels, options.max_pixels or LARGEST)
    written = len(tokenizer(text, add_special_tokens=False).input_ids) if tokenizer else len(text) // 2
    tokens = high * wide // side**2 + written + CHAT
    if options.max_length and tokens > options.max_length:
        refused = rows.Unusable(f"more than {options.max_length:,} tokens", f" ({tokens:,})")
        looked = looked._replace(refused=refused)
    beyond = "" if text.isascii() else "".join(sorted({letter for letter in text if ord(letter) > 127}))
    spacing = "apart" if re.search(r"[{^_] \S", text) else "close" if re.search(r"[{^_]\S", text) else ""
    return Found(looked, tokens, hash("".join(text.split())), around(text), spacing, beyond)


def of_split(split, these, options, special, tokenizer, side):
    """What is found in a split, as the page and the terminal have it."""
    decoded, these = these, these.cast_column(options.image_column, Image(decode=False))
    look = partial(look_at, options=options, special=special, tokenizer=tokenizer, side=side)
    bad, sizes, tokens, spellings, letters = defaultdict(list), Counter(), Counter(), Counter(), Counter()
    images, wholes, formulas, first, spacings = {}, Counter(), set(), [], Counter()
    same, conflicts = [], []
    found = looking.look(these, range(len(these)), look, len(these))
    for number, one in tqdm(found, total=len(these), desc=f"Looking at {split}", leave=False):
        looked = one.looked
        if looked.refused:
            name = rows.name_of(these[number], number, split, options.image_column)
            bad[looked.refused.reason].append((name, looked.refused.detail.strip(": ()")))
            continue
        sizes[looked.width, looked.height] += 1
        tokens[one.tokens] += 1
        spellings[one.spelling] += 1
        spacings[one.spacing] += 1
        letters.update(one.unicode)
        formulas.add(one.formula)
        if looked.digest in images:
            (same if looked.whole in wholes else conflicts).append((number, images[looked.digest]))
        images.setdefault(looked.digest, number)
        wholes[looked.whole] += 1
        if len(first) < SHOWN:
            first.append(number)

    def name(number):
        return rows.name_of(these[number], number, split, options.image_column)

    usable = sum(tokens.values())
    return {
        "split": split, "rows": len(these), "usable": usable, "bad": dict(bad), "sizes": spread_of_sizes(sizes),
        "tokens": spread(tokens), "lengths": bars(tokens), "spellings": spellings, "spacings": spacings,
        "letters": letters, "images": images, "formulas": formulas,
        "same": len(same), "conflicts": len(conflicts),
        "same_named": [(name(one), name(other)) for one, other in same[:NAMED]],
        "conflicts_named": [(name(one), name(other)) for one, other in conflicts[:NAMED]],
        "first": [(name(at), drawn(decoded[at][options.image_column]), these[at][options.text_column]) for at in first],
    }  # fmt: skip


def drawn(picture):
    """An image as the address that a page can have it by, at most 640 pixels wide."""
    picture.thumbnail((640, 320))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def at_share(counts, share):
    """The number below which `share` of what is counted lies."""
    left = share * sum(counts.values())
    for value, count in sorted(counts.items()):
        left -= count
        if left <= 0:
            return value
    return 0


def spread(counts):
    return {"least": min(counts, default=0), "median": at_share(counts, 0.5), "p99": at_share(counts, 0.99),
            "most": max(counts, default=0)}  # fmt: skip


def spread_of_sizes(sizes):
    wide, high = Counter(), Counter()
    for (width, height), count in sizes.items():
        wide[width] += count
        high[height] += count
    return {"width": spread(wide), "height": spread(high)}


def bars(counts, number=24):
    """A histogram: [(from, to, rows, share of the highest bar), ...]."""
    if not counts:
        return []
    top = max(at_share(counts, 0.995), 1)
    width = max(-(-top // number), 1)
    piles = Counter(min(value // width, number) for value in counts.elements())
    return [(at * width, (at + 1) * width, piles[at], piles[at] / max(piles.values())) for at in range(max(piles) + 1)]


def across(parts, options):
    """Sentences about what two splits share."""
    train, test = (parts.get(split) for split in (options.dataset_train_split, options.dataset_test_split))
    if not (train and test) or train is test:
        return []
    images = len(train["images"].keys() & test["images"].keys())
    are, those = ("image is", "that") if images == 1 else ("images are", "those")
    formulas = len(train["formulas"] & test["formulas"])
    return [
        f"{images:,} {are} in {train['split']} and in {test['split']}: a run does not train on {those}.",
        f"{formulas:,} of {len(test['formulas']):,} formulas of {test['split']} are also in {train['split']}.",
    ]


def told(part, about, options):
    """What the terminal says of a split."""
    split, tokens, sizes = part["split"], part["tokens"], part["sizes"]
    yield f"{split}: {part['usable']:,} of {part['rows']:,} rows can be used"
    for reason, named in part["bad"].items():
        some = ", ".join(name + f" ({detail})" * bool(detail) for name, detail in named[:5])
        yield f"  left out: {len(named):,} ({reason}): {some}{', ...' if len(named) > 5 else ''}"
    if not part["usable"]:
        return
    yield "  images: {median} pixels wide ({least} to {most})".format(**sizes["width"]) + (
        ", {median} high ({least} to {most})".format(**sizes["height"])
    )
    limit = f" (the limit: {options.max_length:,})" if options.max_length else ""
    yield f"  tokens: {about}{tokens['median']:,}, at most {tokens['most']:,}, 99% up to {tokens['p99']:,}{limit}"
    if part["same"]:
        yield f"  {count(part['same'])} image and text of another one"
    if part["conflicts"]:
        yield f"  {count(part['conflicts'])} the image of another one, and another text"
    if spelled := part["spelled"]:
        yield f"  spelling is mixed: {spelled}"


def around(text):
    """What stands around a formula, such as "$" or "\\begin{align}", or "" if nothing does."""
    lines = LINES.match(text)
    return lines[1] if lines else latex.delimiter(text)


def count(rows):
    return "1 row has" if rows == 1 else f"{rows:,} rows have"


def spelled_in(part):
    """How the formulas of a split are spelled where that is more than one way, in words."""
    ways = {name: count for name, count in part["spellings"].items() if name}
    said = [f"{count:,} stand in {latex.AROUND.get(name, f'{name}...')}" for name, count in ways.items() if count]
    if part["spellings"][""] and said:
        said.append(f"{part['spellings']['']:,} in nothing")
    elif len(said) == 1:
        said = []
    if part["spacings"]["apart"] and part["spacings"]["close"]:
        said.append("{apart:,} have spaces between tokens, {close:,} have none".format(**part["spacings"]))
    if part["letters"]:
        some = " ".join(letter for letter, _ in part["letters"].most_common(8))
        said.append(f"characters beyond ASCII: {some}")
    return ", ".join(said)
