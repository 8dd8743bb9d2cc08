"""Times how the README's "Use it" reads images, at batch 1, 16 and 64. Prints a line of JSON.

usage: python benchmarks/reading.py MODEL IMAGES [--tokens 128]

MODEL is what a run of finetune_qwen_vl.py has left, outputs/adapter or outputs/merged. IMAGES is a folder of PNG files,
such as outputs/held_out; up to 64 of them are read, one by one the first 4. A model with random weights never ends a
reading by itself: each is then as long as `--tokens` says.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import pipeline

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("images", type=Path)
parser.add_argument("--tokens", type=int, default=128)
options = parser.parse_args()
on_gpu = torch.cuda.is_available()

torch.backends.cuda.enable_cudnn_sdp(False)
reader = pipeline("image-text-to-text", options.model, processor=options.model, device_map="auto")
reader.generation_config.update(max_new_tokens=options.tokens, max_length=None, do_sample=False, repetition_penalty=1.0)
question = {"type": "text", "text": "Write the LaTeX representation for this image."}
files = sorted(options.images.glob("*.png"))[:64]
chats = [[{"role": "user", "content": [question, {"type": "image", "path": str(file)}]}] for file in files]
reader(chats[:2], batch_size=2, return_full_text=False)  # what is done once is not timed
result = {"device": torch.cuda.get_device_name() if on_gpu else "CPU", "images": len(files), "tokens": options.tokens}
for batch_size in (1, 16, 64):
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    some = chats if batch_size > 1 else chats[:4]
    started = time.perf_counter()
    reader(some, batch_size=batch_size, return_full_text=False)
    result[f"images_per_s_at_{batch_size}"] = round(len(some) / (time.perf_counter() - started), 2)
    if on_gpu:
        result[f"peak_gib_at_{batch_size}"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
print(json.dumps(result))
