"""Feeding the GPU: the next batch is prepared while this one is computed.

`training` has its trainer's data loader do so on a GPU: preparing 8 samples takes 9 to 72 ms, in which a step of 0.2 s
would wait. On a CPU it would take the cores from the step.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial


def ahead(iterate):
    """Yields what iterate() does, none of it None; the next one is made by a thread meanwhile."""
    items = iterate()
    with ThreadPoolExecutor(1, thread_name_prefix="feeding") as worker:
        following = worker.submit(next, items, None)
        while (item := following.result()) is not None:
            following = worker.submit(next, items, None)
            yield item


def feed(loader):
    """Has a data loader that accelerate has prepared be one batch ahead. Returns it."""
    if source := getattr(loader, "base_dataloader", None):  # which it iterates over by this method's name
        source.__iter__ = partial(ahead, source.__iter__)
    return loader
