"""Times how the README's "Use it" reads images with an adapter, and the merge of it. Prints two lines of JSON.

usage: python benchmarks/reading.py OUTPUTS [--base FOLDER] [--tokens 128]

OUTPUTS is what a run of finetune_qwen_vl.py has left; its held-out images are read, at batch 1, 16 and 64. A model with
random weights never ends a reading by itself: each is then as long as `--tokens` says. --base is a base model that lies
elsewhere than the adapter remembers.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

parser = argparse.ArgumentParser()
parser.add_argument("outputs", type=Path)
parser.add_argument("--base")
parser.add_argument("--tokens", type=int, default=128)
options = parser.parse_args()
on_gpu = torch.cuda.is_available()
adapter = options.outputs / "adapter"
base = options.base or json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]

model = AutoModelForImageTextToText.from_pretrained(base, device_map="auto" if on_gpu else "cpu")
model.load_adapter(str(adapter))
reader = pipeline("image-text-to-text", model, processor=AutoProcessor.from_pretrained(adapter))
reader.tokenizer.padding_side = "left"
reader.generation_config.update(max_new_tokens=options.tokens, max_length=None, do_sample=False, repetition_penalty=1.0)
question = {"type": "text", "text": "Write the LaTeX representation for this image."}
files = sorted((options.outputs / "held_out").glob("*.png"))[:64]
chats = [[{"role": "user", "content": [question, {"type": "image", "path": str(file)}]}] for file in files]
reader(chats[:2], batch_size=2, return_full_text=False)  # what is done once is not timed
result = {"device": torch.cuda.get_device_name() if on_gpu else "CPU", "images": len(files), "tokens": options.tokens}
for batch_size in (1, 16, 64):
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    some = chats if batch_size > 1 else chats[:8]
    started = time.perf_counter()
    reader(some, batch_size=batch_size, return_full_text=False)
    result[f"images_per_s_at_{batch_size}"] = round(len(some) / (time.perf_counter() - started), 2)
    if on_gpu:
        result[f"peak_gib_at_{batch_size}"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
print(json.dumps(result), flush=True)

del model, reader
if on_gpu:
    torch.cuda.empty_cache()
started = time.perf_counter()
export = [sys.executable, Path(__file__).resolve().parents[1] / "export.py", options.outputs, "--save_merged"]
ended = subprocess.run(export, capture_output=True, text=True)
said = (ended.stdout.strip() or ended.stderr.strip()).splitlines()[-1:]
print(json.dumps({"merge_s": round(time.perf_counter() - started, 1), "exit_code": ended.returncode, "said": said}))
