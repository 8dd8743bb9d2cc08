"""Running out of memory, told in a sentence.

Wraps `load_model` and `measure`: where the memory does not hold what they need, the run ends with what can be done.
"""

import gc
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from qwen_vl_kit.sentences import fail


class TooLarge(RuntimeError):
    """What was tried is known not to fit into memory, before any process has run out of it."""


def is_shortage(error):
    """Whether an exception says that memory has run out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, TooLarge)) or should_reduce_batch_size(error):
        return True
    return "CUDA error: out of memory" in str(error)  # the driver's own words, which PyTorch has no class for


@contextmanager
def must_fit(task):
    """Ends the run with a sentence if `task` runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        free += torch.cuda.memory_reserved() if torch.cuda.is_available() else 0  # our own share
        fail(
            f"\nThere is not enough GPU memory for {task}: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free for this "
            "run. Close other programs on the GPU, leave micro-batches and gradient checkpointing to the script, or "
            "use a smaller model, such as --model_name_or_path unsloth/Qwen2-VL-2B-Instruct-bnb-4bit"
        )


def if_it_fits(call, divisible):
    """What `call()` returns; None if it takes more memory than there is, and what it does is `divisible`."""
    try:
        return call()
    except RuntimeError as error:
        if not is_shortage(error) or not divisible:
            raise
    if torch.cuda.is_available():  # memory is released only here, outside the except block
        torch.cuda.empty_cache()


def free_memory():
    """Releases what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def leave_gpu(model):
    """Moves a model's weights to the main memory, for another process that needs the GPU's."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.cpu()
    torch.cuda.empty_cache()


def load_model(step, *arguments, **options):
    with must_fit("the model"):
        return step(*arguments, **options)


def measure(step, when):
    with must_fit("reading an image"):
        return step(when)
