"""Several processes, several machines, and models in parts (FSDP2).

Wraps `split_batch`, `load_splits`, `load_model`, `read` and `save`: each process takes its share of a step and of the
held-out images, the first one downloads and saves, and with `fsdp.yaml` each keeps a part of the weights.
"""

import atexit
import os
import sys
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import register_fsdp_forward_method

from qwen_vl_kit import run

sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # as fsdp.yaml asks for
processes = int(os.environ.get("WORLD_SIZE", 1))
saved = False  # whether all that a run is to leave is there


@atexit.register
def end():
    """Ends a process of several whose work is done, without taking Python down.

    With torch 2.10, gloo's threads outlive the process group, and once in some hundred runs a process aborted as Python
    ended: the launcher called a run failed that had saved everything. Registered early, this is called late.
    """
    if processes > 1 and saved:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def split_batch(step, options, free):
    if processes > 1 and not torch.accelerator.is_available():  # "cpu:0", as it would be, can't load a checkpoint
        options.use_cpu, os.environ["ACCELERATE_TORCH_DEVICE"] = True, "cpu"
    step(options, free)


def load_splits(step, options):
    with options.main_process_first():  # around all attempts: each process may need another number of them
        return step(options)


def load_model(step, options, dtype, device):
    if not sharded:
        return step(options, dtype, device)
    # Launchers give each process one thread, and 4 bits are made on the CPU.
    torch.set_num_threads(max(1, os.cpu_count() // processes))
    # FSDP shares out what looks like floating-point numbers.
    model = step(options, dtype, "cpu", storage=dtype)
    fsdp2_prepare_model(Accelerator(mixed_precision=options.mixed_precision), model)
    register_fsdp_forward_method(model, "generate")
    model.set_reshard_after_forward(True)  # none of what was sent for reading stays
    model.generate = partial(model.generate, synced_gpus=True)
    return model


def read(step, samples, batch_size):
    if processes == 1 or sharded:  # with the weights in parts, all have to take every step together
        return step(samples, batch_size)
    with run.options.distributed_state.split_between_processes(samples) as mine:
        readings = step(mine, batch_size)
    return gather_object(readings)


def save(step, outputs, predictions, metrics):
    global saved
    if sharded:  # put together what each process has of the adapters
        weights = {name: value.full_tensor() for name, value in run.model.named_parameters() if value.requires_grad}
        run.model.save_pretrained = partial(run.model.save_pretrained, state_dict=weights)
    run.options.distributed_state.destroy_process_group()
    if run.options.process_index == 0:
        step(outputs, predictions, metrics | {"processes": run.options.world_size})
    saved = True
