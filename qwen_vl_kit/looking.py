"""Looking at many rows: on all cores.

Wraps no step. What comes out is the same however many processes look.
"""

import multiprocessing
import os
from functools import partial
from itertools import islice

ALONE = 2000  # as many rows are looked at before other processes would have begun
CHUNK = 250  # rows that a process looks at in one go
work = None  # what the processes do: they are forked, and have it from there


def cores():
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def look(rows, numbers, look_at, wanted):
    """Yields (number, what `look_at` returns for that row) in the order of `numbers`; about `wanted` will be asked for.

    Nothing is looked at before it is asked for if few are wanted, and little of it else.
    """
    numbers = iter(numbers)
    if min(wanted, len(rows)) <= ALONE or cores() == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from ((number, look_at(rows[number])) for number in numbers)
        return
    global work
    work = partial(look_at_all, rows, look_at)
    ahead, waiting = 4 * cores(), []
    # Forked, as another start would load all libraries anew, and the script with them.
    with multiprocessing.get_context("fork").Pool(cores(), initializer=begin) as pool:
        while chunk := [*islice(numbers, CHUNK)] or waiting:
            if chunk is not waiting:
                waiting.append((chunk, pool.apply_async(call, (chunk,))))
            if len(waiting) > ahead or chunk is waiting:
                chunk, found = waiting.pop(0)
                yield from zip(chunk, found.get(), strict=True)


def begin():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def call(chunk):
    return work(chunk)


def look_at_all(rows, look_at, chunk):
    return [look_at(rows[number]) for number in chunk]
