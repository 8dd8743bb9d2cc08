"""Times the script with other models of their true sizes and random weights; writes models.json and models.md.

usage: python benchmarks/models.py --processor FOLDER [--dataset NAME] [--models NAME ...] [--steps 10]
                                   [--output FOLDER]

The processor is a Qwen2-VL's, whose tokenizer and chat template serve all of them. Without a GPU the models have two
layers of 64 numbers, and the processor and data are the demo's: that shows only that everything works.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from runs import ROOT, whole_run
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)

# Sizes as published. What a config says of itself by default, such as the vision part of Qwen2-VL, is not named.
SIZES = {
    "Qwen2-VL-2B": (
        Qwen2VLConfig,
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
        | {"num_key_value_heads": 2},
        {"hidden_size": 1536},
    ),
    "Qwen2.5-VL-3B": (
        Qwen2_5_VLConfig,
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
        | {"num_key_value_heads": 2},
        {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048},
    ),
    "Qwen3-VL-4B": (
        Qwen3VLConfig,
        {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "head_dim": 128},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
        | {"deepstack_visual_indexes": [5, 11, 17]},
    ),
}
# In place of these on a machine without a GPU.
SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_TEXT |= {"num_key_value_heads": 1, "head_dim": 32}
SMALL_VISION = {"depth": 2, "intermediate_size": 64, "num_heads": 2, "deepstack_visual_indexes": [0]}


def config_of(name, tokenizer, on_gpu):
    """The config of a model of SIZES, with the tokenizer's numbers; cut down without a GPU."""
    kind, text, vision = SIZES[name]
    sections = [24, 20, 20] if kind is Qwen3VLConfig else [16, 24, 24]
    if not on_gpu:
        wide = {part: 64 for part in ("hidden_size", "out_hidden_size") if part in vision} | {"embed_dim": 64}
        text, vision = text | SMALL_TEXT, vision | SMALL_VISION | wide
        sections = [part // 4 for part in sections]
    places = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    places |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    ids = {f"{part}_token_id": tokenizer.convert_tokens_to_ids(token) for part, token in places.items()}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    text = text | {"rope_parameters": rope, "vocab_size": len(tokenizer) + -len(tokenizer) % 64}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def make(name, folder, base, on_gpu):
    """Saves a model of SIZES with random weights to `folder`; `base` is the processor. Returns its parameters."""
    config = config_of(name, base.tokenizer, on_gpu)
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
    ends = {"eos_token_id": base.tokenizer.eos_token_id, "pad_token_id": base.tokenizer.pad_token_id}
    model.generation_config.update(**ends, do_sample=False)
    model.save_pretrained(folder)
    parts = {"tokenizer": base.tokenizer, "image_processor": base.image_processor, "chat_template": base.chat_template}
    parts |= {"video_processor": base.video_processor} if getattr(base, "video_processor", None) else {}
    processor = type(base)
    if isinstance(config, Qwen2_5_VLConfig):
        processor = Qwen2_5_VLProcessor
    elif isinstance(config, Qwen3VLConfig):
        processor, size = Qwen3VLProcessor, {"shortest_edge": 256**2, "longest_edge": 4096**2}
        parts["image_processor"] = type(base.image_processor)(patch_size=16, size=size)
    processor(**parts).save_pretrained(folder)
    return model.num_parameters()


def table(results):
    """The results as Markdown."""
    lines = [
        "| model | parameters | layout | first step | step | samples/s | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in results.items():
        size, times, recomputed = run["layout"]
        layout = f"{size} x {times}, {'recomputed' if recomputed else 'kept'}"
        memory = f"{run['peak_gib']:.1f} GiB" if run["peak_gib"] else "-"
        seconds = f"{run['first_step_s']:.1f} s | {run['step_s']:.2f} s | {run['samples_per_s']:.1f}"
        lines.append(f"| {name} | {run['parameters'] / 1e9:.2f} billion | {layout} | {seconds} | {memory} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processor", default=str(ROOT / "demo/model"))
    parser.add_argument("--dataset", default=str(ROOT / "demo/data"))
    parser.add_argument("--models", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/benchmark")
    options = parser.parse_args()
    on_gpu, results = torch.cuda.is_available(), {}
    options.output.mkdir(parents=True, exist_ok=True)
    base = AutoProcessor.from_pretrained(options.processor)
    for name in options.models:
        folder = tempfile.mkdtemp()
        parameters = make(name, folder, base, on_gpu)
        if on_gpu:
            torch.cuda.empty_cache()
        how = ("--max_steps", options.steps, "--num_test_rows", 4, "--max_new_tokens", 16, "--save_strategy", "no")
        arguments = ("--model_name_or_path", folder, "--dataset_name", options.dataset, *how)
        results[name] = {"parameters": parameters, **whole_run(*arguments)}
        shutil.rmtree(folder)
        (options.output / "models.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (options.output / "models.md").write_text(table(results), encoding="utf-8")
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
