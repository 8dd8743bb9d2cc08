"""Looking at many rows: on all cores, and what was found is kept for the next start.

Wraps no step. What comes out is the same however many processes look, and whether it was kept or not.
"""

import hashlib
import json
import multiprocessing
import os
import zipfile
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Image
from datasets.config import HF_CACHE_HOME

from qwen_vl_kit import run
from qwen_vl_kit.pictures import Unusable, path_of, placed

ALONE = 2000  # as many rows are looked at before other processes would have begun, and are not worth keeping
CHUNK = 250  # rows that a process looks at in one go
KEPT = Path(HF_CACHE_HOME, "qwen_vl_kit")
FILES = 20  # of what is kept; the oldest go
work = None  # what the processes do: they are forked, and have it from there


def cores():
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(here // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def look(rows, numbers, look_at, wanted, kept=None):
    """Yields (number, what `look_at` returns for that row) in the order of `numbers`; about `wanted` will be asked for.

    Nothing is looked at before it is asked for if few are wanted, and little of it else. What is in `kept`, a `Kept`,
    is not looked at again.
    """
    numbers = iter(numbers)
    if min(wanted, len(rows)) <= ALONE:
        yield from ((number, look_at(rows[number])) for number in numbers)
        return
    many = cores() > 1 and "fork" in multiprocessing.get_all_start_methods()
    global work
    work = partial(look_at_all, rows, look_at)
    ahead, waiting, pool = 4 * cores() if many else 0, [], None
    try:
        while chunk := [*islice(numbers, CHUNK)] or waiting:
            if chunk is not waiting:
                new = [number for number in chunk if kept is None or not kept.has(number)]
                if new and many and not pool:  # forked, as another start would load all libraries anew, and the script
                    pool = multiprocessing.get_context("fork").Pool(cores(), initializer=begin)
                waiting.append((chunk, new, pool.apply_async(call, (new,)) if new and many else None))
            if len(waiting) > ahead or chunk is waiting:
                chunk, new, coming = waiting.pop(0)
                found = dict(zip(new, coming.get() if coming else call(new), strict=True))
                if kept is not None:
                    for number, one in found.items():
                        kept.put(number, one)
                for number in chunk:
                    yield number, found[number] if number in found else kept.get(number)
    finally:
        work = None
        if pool:
            pool.terminate()


def begin():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def call(chunk):
    return work(chunk)


def look_at_all(rows, look_at, chunk):
    return [look_at(rows[number]) for number in chunk]


class Kept:
    """What was found in rows, `rows.Looked` each, by their numbers, in a file of the cache."""

    NUMBERS = ("width", "height", "characters")

    def __init__(self, file, rows, kind):
        self.file, self.kind, self.new = file, kind, False
        self.numbers = np.zeros((rows, 3), np.int32)
        self.digests = np.zeros((rows, 48), np.uint8)  # of the image, 32, and the whole, 16
        self.known = np.zeros(rows, bool)
        self.reasons = {}  # {number: [refused or None, late or None]}, each [reason, detail]
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(file) as read:
            found = read["numbers"], read["digests"], read["known"], json.loads(read["reasons"].tobytes())
            if len(found[0]) == rows:
                self.numbers, self.digests, self.known, reasons = found
                self.reasons = {int(number): reason for number, reason in reasons.items()}

    def has(self, number):
        return self.known[number]

    def put(self, number, looked):
        self.new = self.known[number] = True
        self.numbers[number] = looked.width, looked.height, looked.characters
        if looked.digest:
            self.digests[number] = np.frombuffer(looked.digest + looked.whole, np.uint8)
        if looked.refused or looked.late:
            why = [reason and [reason.reason, reason.detail] for reason in (looked.refused, looked.late)]
            self.reasons[int(number)] = why

    def get(self, number):
        refused, late = (reason and Unusable(*reason) for reason in self.reasons.get(number, (None, None)))
        if refused:
            return self.kind(refused=refused)
        digests = self.digests[number].tobytes()
        return self.kind(*self.numbers[number].tolist(), digests[:32], digests[32:], late=late)

    def save(self):
        """Writes the file, whole or not at all. A cache that can't be written is none."""
        if not self.new:
            return
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_suffix(f".{os.getpid()}.part")
            reasons = np.frombuffer(json.dumps(self.reasons).encode(), np.uint8)
            with part.open("wb") as opened:
                np.savez(opened, numbers=self.numbers, digests=self.digests, known=self.known, reasons=reasons)
            part.replace(self.file)
            files = sorted(self.file.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime)
            for file in files[:-FILES]:
                file.unlink()


def kept(rows, column, kind, *how):
    """A `Kept` for rows as they are now, to be looked at in the way that `how` says; None where that can't be told.

    Rows are known by the files of `datasets`' cache, which are made anew when the data changes, images beside the data
    by the times and sizes of their files.
    """
    files = [Path(file["filename"]) for file in rows.cache_files]
    if not files or rows._indices is not None:  # made by hand, or a part of them
        return None
    digest = hashlib.sha256(json.dumps([str(rows.split), len(rows), *how], default=str).encode())
    for file in files:
        digest.update(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    images = rows.select_columns(column).cast_column(column, Image(decode=False))
    if any(image and not image["bytes"] for image in images[:100][column]):
        digest.update(f"{run.data_folder} {run.dropped_parts}".encode())
        for start in range(0, len(images), 10_000):
            for image in images[start : start + 10_000][column]:
                digest.update(state_of(image).encode())
    return Kept(KEPT / f"{digest.hexdigest()[:32]}.npz", len(rows), kind)


def state_of(image):
    """What changes when the file of an image does."""
    if not image or image["bytes"] is not None or not path_of(image):
        return "-"
    try:
        state = placed(path_of(image), run.data_folder, run.dropped_parts).stat()
    except (OSError, ValueError):
        return "none"
    return f"{state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
