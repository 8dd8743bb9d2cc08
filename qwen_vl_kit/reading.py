"""Reading images: as many at once as fit into memory.

Wraps `read`: where memory runs out, the batch is halved, and reading resumes where it was.
"""

import torch
from tqdm.auto import tqdm

from qwen_vl_kit.memory import is_shortage


def read(step, samples, batch_size):
    readings = []
    with tqdm(total=len(samples), desc="Reading held-out images") as bar:
        while len(readings) < len(samples):
            batch = samples.select(range(len(readings), min(len(readings) + batch_size, len(samples))))
            if some := read_if_it_fits(step, batch, batch_size):
                readings += some
                bar.update(len(some))
            else:  # memory is released only here, outside the except block
                batch_size //= 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    return readings


def read_if_it_fits(step, batch, batch_size):
    """The readings of a batch, or None if they take more memory than there is, and the batch can be made smaller."""
    try:
        return step(batch, batch_size)
    except RuntimeError as error:
        if not is_shortage(error) or batch_size == 1:
            raise
