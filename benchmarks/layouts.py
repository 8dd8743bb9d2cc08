"""Runs finetune_qwen_vl.py once, then trains again: other batches, less memory, PEFT's own layers. For speed.py.

usage: python benchmarks/layouts.py STEPS [--OPTION VALUE ...]

Importing the script runs it; its first run has a learning rate of 0, which leaves the adapters as they start. Then, as
one would execute cells again in a notebook, options are read anew and another trainer is made. speed.py times the lines
that are printed; after each measurement comes one of JSON.
"""

import gc
import json
import sys
import tempfile
import time

import torch
from runs import ROOT, numbers

steps, *arguments = sys.argv[1:]
cuda = torch.cuda if torch.cuda.is_available() else None
arguments += ["--save_strategy", "no", "--disable_tqdm", "true"]
largest, *others = (64, 32) if cuda else (16,)
sys.argv[1:] = [*arguments, "--batch_size", str(largest), "--max_steps", "6", "--learning_rate", "0"]
sys.argv += ["--output_dir", tempfile.mkdtemp()]
sys.path.insert(0, str(ROOT))
import finetune_qwen_vl as script  # noqa: E402, I001 (it imports Unsloth, which comes before other libraries)
from qwen_vl_kit import run  # noqa: E402

trainable = [parameter for parameter in script.model.parameters() if parameter.requires_grad]
untrained = [parameter.detach().clone() for parameter in trainable]


def tell(name, result):
    print("RESULT " + json.dumps({name: result}), flush=True)


def trained():
    return numbers({"log": script.trainer.state.log_history, **run.notes["train"]}, vars(script.options))


def train(name, *changes, limit_gib=None):
    """Trains the adapters from their start, with the options as changed; `limit_gib` limits the GPU memory."""
    changed = [*arguments, *map(str, changes), "--output_dir", tempfile.mkdtemp()]
    script.options = script.read_options(script.Options, changed)
    script.order = script.order_rows(script.train_lengths, script.options)
    script.train_set = script.train_rows.select(script.order).with_transform(script.to_samples)
    for parameter, weights in zip(trainable, untrained, strict=True):
        parameter.data = weights.clone()
    run.trained = False
    script.trainer = None
    gc.collect()
    if cuda:
        cuda.empty_cache()
        cuda.set_per_process_memory_fraction(min(1, limit_gib * 2**30 / cuda.mem_get_info()[1]) if limit_gib else 1.0)
    try:
        script.trainer = script.make_trainer()
        script.trainer.train()
        tell(name, trained())
    except SystemExit as sentence:
        tell(name, {"failed": str(sentence).strip()})


tell(f"batch {largest}", trained())

script.truths[:] = [""] * 64  # else, where one of them is longer than max_new_tokens, so is every reading
script.options.max_new_tokens = 128
started = time.perf_counter()
script.read(script.test_set, 64)
result = {"reading_64_s": time.perf_counter() - started}
samples = [script.train_set[row] for row in range(64)]
started = time.perf_counter()
for start in range(0, 64, 8):
    script.collate(samples[start : start + 8])
tell("reading", result | {"collating_8_s": (time.perf_counter() - started) / 8})

for batch in others:
    train(f"batch {batch}", "--batch_size", batch, "--max_steps", 6)
for limit in (24, 16, 8) if cuda else ():
    train(f"limit {limit} GiB", "--batch_size", 8, "--max_steps", 6, limit_gib=limit)
if run.usual_kernels:
    run.usual_kernels()
usual = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, "--gradient_checkpointing", "false")
usual += ("--cuda_graphs", "false")
train("usual computation", "--batch_size", 8, "--max_steps", steps, *usual)
