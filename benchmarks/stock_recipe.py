"""The yardstick: the fine-tuning that Unsloth's public Qwen2-VL notebook does, timed. Prints one line of JSON.

usage: python benchmarks/stock_recipe.py MODEL DATASET STEPS

2 x 4 samples a step, activations recomputed, 8-bit AdamW, every sample converted to a list beforehand, loss on the
whole conversation, Unsloth's collator and compilation. Without a GPU, where Unsloth can't be loaded: plain
transformers, PEFT and TRL, with TRL's own collator.
"""

import json
import statistics
import sys
import tempfile
import time

begun = time.perf_counter()  # the imports are timed too
# ruff: noqa: E402
import torch

on_gpu = torch.cuda.is_available()
if on_gpu:
    from unsloth import FastVisionModel
    from unsloth.trainer import UnslothVisionDataCollator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

name, data, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
result = {"import_s": time.perf_counter() - begun}
if on_gpu:
    model, processor = FastVisionModel.from_pretrained(name, load_in_4bit=True, use_gradient_checkpointing="unsloth")
    model = FastVisionModel.get_peft_model(model, r=16, lora_alpha=16, lora_dropout=0, bias="none", random_state=3407)
    FastVisionModel.for_training(model)
    collator = UnslothVisionDataCollator(model, processor)
else:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForImageTextToText.from_pretrained(name, quantization_config=nf4, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(name)
    layers = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|attn\.proj|fc1|fc2)"
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=layers, task_type="CAUSAL_LM"))
    collator = None
result["load_s"] = time.perf_counter() - begun - result["import_s"]

question = {"type": "text", "text": "Write the LaTeX representation for this image."}
samples = [
    {
        "messages": [
            {"role": "user", "content": [question, {"type": "image", "image": row["image"]}]},
            {"role": "assistant", "content": [{"type": "text", "text": row["text"]}]},
        ]
    }
    for row in load_dataset(data, split="train")
]
options = {"remove_unused_columns": False, "dataset_text_field": "", "dataset_kwargs": {"skip_prepare_dataset": True}}
if not on_gpu:
    samples = load_dataset(data, split="train").select(range(steps * 8))
    samples = samples.map(
        lambda row: {
            "prompt": [{"role": "user", "content": [question, {"type": "image"}]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": row["text"]}]}],
        },
        remove_columns="text",
    )
    options = {}


class Clock(TrainerCallback):
    """Notes when each optimizer step was done."""

    ticks = []

    def on_step_end(self, *_, **__):
        if on_gpu:
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())


training_args = SFTConfig(
    per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=steps, warmup_steps=5, learning_rate=2e-4,
    weight_decay=0.001, lr_scheduler_type="linear", optim="adamw_8bit", bf16=on_gpu, seed=3407, max_length=2048,
    gradient_checkpointing=True, logging_steps=1, report_to="none", save_strategy="no",
    output_dir=tempfile.mkdtemp(), dataloader_pin_memory=on_gpu, **options,
)  # fmt: skip
trainer = SFTTrainer(
    model=model, processing_class=processor, train_dataset=samples, data_collator=collator, args=training_args,
    callbacks=[Clock()],
)  # fmt: skip
started = time.perf_counter()
trainer.train()
each = [after - before for before, after in zip(Clock.ticks, Clock.ticks[1:], strict=False)]
result |= {
    "steps": steps,
    "first_step_s": Clock.ticks[0] - started,
    "step_s": statistics.median(each),
    "train_s": time.perf_counter() - started,
    "start_to_first_step_s": Clock.ticks[0] - begun,
    "peak_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
}
print(json.dumps(result))
