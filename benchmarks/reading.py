"""Times how fast images are read: by `python -m qwen_vl_kit read`, or by the README's lines. Prints a line of JSON.

usage: python benchmarks/reading.py MODEL IMAGES [--by read|lines] [--tokens 128] [--cuda_graphs true|false]

MODEL is what a run of finetune_qwen_vl.py has left, outputs/adapter or outputs/merged. IMAGES is a folder of PNG files,
such as outputs/held_out; up to 64 of them are read, one by one the first 4. A model with random weights never ends a
reading by itself: each is then as long as `--tokens` says. With `--by read`, tokens are counted, too, and CUDA graphs
can be turned off.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
QUESTION = "Write the LaTeX representation for this image."

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("images", type=Path)
parser.add_argument("--by", choices=("read", "lines"), default="lines")
parser.add_argument("--tokens", type=int, default=128)
parser.add_argument("--cuda_graphs", choices=("true", "false"), default="true")
options = parser.parse_args()
on_gpu = torch.cuda.is_available()
files = sorted(options.images.glob("*.png"))[:64]


def by_lines():
    """A function that reads files as the README's lines do, a number of them at once."""
    from transformers import pipeline

    torch.backends.cuda.enable_cudnn_sdp(False)
    read = pipeline("image-text-to-text", options.model, processor=options.model, device_map="auto")
    how = {"max_new_tokens": options.tokens, "max_length": None, "do_sample": False, "repetition_penalty": 1.0}
    read.generation_config.update(**how)
    question = {"type": "text", "text": QUESTION}

    def run(some, batch_size):
        chats = [[{"role": "user", "content": [question, {"type": "image", "path": str(file)}]}] for file in some]
        read(chats, batch_size=batch_size, return_full_text=False)

    return run


def by_read():
    """The same as the command reads them; it returns how many tokens were written."""
    from qwen_vl_kit import arguments, images, reader

    wanted = arguments.Parser("reading.py", "")
    arguments.add_model(wanted)
    words = [options.model, "--instruction", QUESTION, "--max_new_tokens", str(options.tokens)]
    words += ["--cuda_graphs", options.cuda_graphs]
    read = reader.load(wanted.parse_args(words))

    def run(some, batch_size):
        read.batch_size = batch_size
        readings = read.read([picture for file in some for _, picture in images.pages(str(file), file)])
        counted = [len(tokens) + 1 for tokens in read.processor.tokenizer([one.text for one in readings]).input_ids]
        return sum(options.tokens if one.cut else count for one, count in zip(readings, counted, strict=True))

    return run


started = time.perf_counter()
run = by_read() if options.by == "read" else by_lines()
result = {"device": torch.cuda.get_device_name() if on_gpu else "CPU", "by": options.by, "model": options.model}
result |= {"cuda_graphs": options.by == "read" and on_gpu and options.cuda_graphs == "true"}
result |= {"images": len(files), "tokens": options.tokens, "load_s": round(time.perf_counter() - started, 1)}
run(files[:2], 2)  # what is done once is not timed
for batch_size in (1, 16, 64):
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    some = files if batch_size > 1 else files[:4]
    started = time.perf_counter()
    tokens = run(some, batch_size)
    seconds = time.perf_counter() - started
    result[f"images_per_s_at_{batch_size}"] = round(len(some) / seconds, 2)
    if tokens:
        result[f"tokens_per_s_at_{batch_size}"] = round(tokens / seconds, 1)
    if on_gpu:
        result[f"peak_gib_at_{batch_size}"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
print(json.dumps(result))
