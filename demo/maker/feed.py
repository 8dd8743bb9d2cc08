"""Processes that write and draw formulas while the model trains, and the pools that its batches come from.

Each formula is drawn once and used as long as its pool holds it; a full pool replaces its oldest. A pool's images have
one size and its formulas one kind, so that a batch needs no padding and the curriculum only chooses between pools.
"""

import os
import queue
import random
import threading
import time
import zlib

import numpy as np

from maker import formulas, pages

KINDS = ("sign", "short", "middle", "print", "other")
MOST_TOKENS = 160  # longer answers are left out
# What share of the drawn formulas is of which kind: at first, and once the curriculum nears its end.
DRAWN_FIRST = {"sign": 0.25, "short": 0.3, "middle": 0.3, "print": 0.1, "other": 0.05}
DRAWN_LATER = {"sign": 0.02, "short": 0.03, "middle": 0.1, "print": 0.6, "other": 0.25}
LONGEST = {"short": 6, "middle": 20}  # LaTeX tokens


def is_held_out(latex):
    """One formula in 64, decided by the formula alone: what is measured on is never trained on."""
    return zlib.crc32(formulas.squeezed(latex).encode()) % 64 == 0


def write(kind, rng, recombiner):
    """A formula of this kind, or None: some attempts come to nothing, and none that the demo holds out are written."""
    latex = write_any(kind, rng, recombiner)
    return None if latex is None or formulas.is_held_out(latex) else latex


def write_any(kind, rng, recombiner):
    """A formula of this kind, or None."""
    if kind == "sign":
        if rng.random() < 0.25:
            return " ".join(formulas.Grammar(rng).any_symbol())
        return " ".join(recombiner.sign(rng))
    if kind == "other" and rng.random() < 0.5 or kind in LONGEST and rng.random() < 0.2:
        longest = LONGEST.get(kind, 150)
        return formulas.draw_formula(rng, (0, 1, 0, 0) if kind in LONGEST else (0, 2, 2, 1), longest=longest)
    if kind in LONGEST:
        return " ".join(recombiner.piece(rng, LONGEST[kind]))
    tokens = recombiner.formula(rng)
    return tokens and " ".join(tokens)


def draw(kind, count, rng, recombiner, held_out=False):
    """About `count` formulas of a kind, drawn: a list of (formula, gray image)."""
    texts = []
    while len(texts) < count:
        latex = write(kind, rng, recombiner)
        if not latex or (held_out is not is_held_out(latex) and kind in ("print", "other")):
            continue
        if kind in ("print", "other") and formulas.squeezed(latex) in recombiner.known:
            continue
        texts.append(latex)
    as_print = kind == "print" or kind != "other" and rng.random() < 0.5
    # 100 dots an inch is the size of print as it is in the public set.
    drawn = pages.typeset(texts, rng, pages.DOTS if as_print else rng.uniform(80, 140))
    place = pages.as_print if as_print else pages.on_sheet
    return [(text, place(page, rng)) for text, page in zip(texts, drawn, strict=True)]


def draw_otherwise(kind, count, rng, recombiner):
    """The same in other typefaces, by matplotlib, which is slow and knows fewer commands."""
    found = []
    for _ in range(count):
        latex = write(kind, rng, recombiner)
        if not latex or is_held_out(latex) or formulas.squeezed(latex) in recombiner.known and kind != "sign":
            continue
        try:
            ink = pages.coverage(latex, rng.uniform(11, 19), rng.choice(pages.TYPEFACES))
        except (ValueError, RuntimeError, IndexError):
            continue
        found.append((latex, pages.on_sheet(255 - (ink * 255).astype(np.uint8), rng)))
    return found


def work(out, stage, seed, texts, forbidden, tokenizer_file, stop):
    """A process: draws for ever. Sends lists of (kind, images, answers, lengths), the images of each of one size.

    `stage` is the training's progress, 0 to 1; a negative one asks to end.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    rng = random.Random(seed)
    recombiner = formulas.Recombiner(texts, forbidden)
    while stage.value >= 0:
        shares = DRAWN_FIRST if stage.value < 0.12 else DRAWN_LATER
        kind = rng.choices(KINDS, [shares[kind] for kind in KINDS])[0]
        try:
            if kind != "print" and rng.random() < 0.35:
                samples = draw_otherwise(kind, 40, rng, recombiner)
            else:
                samples = draw(kind, 300, rng, recombiner)
        except Exception as error:  # one formula in a million must not end a drawer
            print(f"A drawer goes on after {type(error).__name__}: {error}", flush=True)
            time.sleep(0.1)
            continue
        found = {}
        for latex, image in samples:
            if image is None:
                continue
            ids = tokenizer.encode(latex).ids + [stop]
            if len(ids) <= MOST_TOKENS:
                found.setdefault(image.shape, []).append((image, ids))
        message = []
        for some in found.values():
            lengths = np.array([len(ids) for _, ids in some], np.int16)
            answers = np.zeros((len(some), lengths.max()), np.int16)
            for row, (_, ids) in zip(answers, some, strict=True):
                row[: len(ids)] = ids
            message.append((kind, np.stack([image for image, _ in some]), answers, lengths))
        out.put(message)


class Pool:
    """Images of one size with their answers, as many as fit."""

    def __init__(self, size, most_bytes):
        self.most = max(min(32768, most_bytes // (size[0] * size[1])), 64)
        self.images = np.zeros((0, *size), np.uint8)
        self.answers = np.zeros((0, MOST_TOKENS), np.int16)
        self.lengths = np.zeros(0, np.int16)
        self.drawn = 0
        self.pending = []

    def add(self, images, answers, lengths):
        while len(images):
            place = self.drawn % self.most
            if place >= len(self.images):
                self.grow(min(max(256, 2 * len(self.images)), self.most))
            room = min(len(images), len(self.images) - place)
            here = slice(place, place + room)
            self.images[here], self.lengths[here] = images[:room], lengths[:room]
            self.answers[here, : answers.shape[1]] = answers[:room]  # what is left of older ones lies after the length
            images, answers, lengths = images[room:], answers[room:], lengths[room:]
            self.drawn += room

    def grow(self, rows):
        for name in ("images", "answers", "lengths"):
            old = getattr(self, name)
            new = np.zeros((rows, *old.shape[1:]), old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)

    def __len__(self):
        return min(self.drawn, self.most)

    def batch(self, size, chance):
        """(images, answers, lengths) of `size` samples whose answers are of like length."""
        if not self.pending or len(self.pending[-1]) != size:
            chosen = chance.integers(0, len(self), 4 * size)
            chosen = chosen[np.argsort(self.lengths[chosen], kind="stable")]
            self.pending = [chosen[i * size : (i + 1) * size] for i in chance.permutation(4)]
        chosen = self.pending.pop()
        lengths = self.lengths[chosen]
        longest = min(-(-int(lengths.max()) // 8) * 8, MOST_TOKENS)
        return self.images[chosen], self.answers[chosen, :longest], lengths


class Feed:
    """Batches without end: `get` gives (kind, images, answers, lengths) as tensors in pinned memory."""

    def __init__(self, messages, batch_size, shares, seed, most_bytes, pin):
        """`batch_size(height, width)`: how many samples of this size make a batch. `shares()`: of each kind, now."""
        self.messages, self.batch_size, self.shares, self.pin = messages, batch_size, shares, pin
        self.chance, self.most_bytes = np.random.default_rng(seed), most_bytes
        self.pools, self.drawn, self.ended = {}, 0, False
        self.ready = queue.Queue(6)
        self.thread = threading.Thread(target=self.fill, daemon=True)
        self.thread.start()

    def receive(self, wait):
        try:
            message = self.messages.get(timeout=wait) if wait else self.messages.get_nowait()
        except queue.Empty:
            return False
        for kind, images, answers, lengths in message:
            size = images.shape[1:]
            pool = self.pools.get((kind, size))
            if pool is None:
                pool = self.pools[kind, size] = Pool(size, self.most_bytes)
            pool.add(images, answers, lengths)
            self.drawn += len(images)
        return True

    def choose(self):
        """A pool of a kind that is wanted now, so that all samples of a kind are as likely; None if there is none."""
        shares = self.shares()
        there = {}
        for (kind, size), pool in self.pools.items():
            if shares.get(kind) and len(pool) >= 8:
                there.setdefault(kind, []).append((size, pool))
        if not there:
            return None
        kinds = [*there]
        # A sample of each kind as often as its share says: batches of large samples are smaller, so more of them.
        weights, options = [], []
        for kind in kinds:
            total = sum(pool.drawn for _, pool in there[kind])
            for size, pool in there[kind]:
                options.append((kind, size, pool))
                weights.append(shares[kind] * pool.drawn / total / self.batch_size(*size))
        weights = np.array(weights)
        return options[self.chance.choice(len(options), p=weights / weights.sum())]

    def fill(self):
        import torch

        while not self.ended:
            for _ in range(3):
                if not self.receive(0):
                    break
            choice = self.choose()
            if choice is None:
                self.receive(1)
                continue
            kind, size, pool = choice
            arrays = pool.batch(min(self.batch_size(*size), max(8, len(pool) // 8 * 8)), self.chance)
            tensors = [torch.from_numpy(array) for array in arrays]
            if self.pin:
                tensors = [tensor.pin_memory() for tensor in tensors]
            while not self.ended:
                try:
                    self.ready.put((kind, *tensors), timeout=1)
                    break
                except queue.Full:
                    continue

    def get(self, device):
        kind, images, answers, lengths = self.ready.get(timeout=180)
        images, answers, lengths = (t.to(device, non_blocking=True) for t in (images, answers, lengths))
        return kind, images.float(), answers.long(), lengths.long()

    def close(self):
        self.ended = True
