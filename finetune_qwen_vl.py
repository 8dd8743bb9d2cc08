# %% [markdown]
# # Teach Qwen2-VL to read formulas
# Fine-tune a 4-bit vision-language model with LoRA adapters to turn the picture of a formula into LaTeX, and measure
# the difference on pictures it never trained on. Read it top to bottom, run it top to bottom:
# - on a GPU: `python finetune_qwen_vl.py`
# - anywhere, in a few minutes, without a network: `python finetune_qwen_vl.py --config demo/config.yaml`
#
# A notebook installs these packages first (in a terminal, use `requirements.txt`). An installed torch stays as it is.

# %%
# %pip freeze | grep -E "^torch(vision|audio)?==" > /tmp/torch-here.txt
# %pip install -q -c /tmp/torch-here.txt unsloth==2026.10.7 unsloth_zoo==2026.10.7 transformers==5.17.0 trl==1.14.2
# %pip install -q -c /tmp/torch-here.txt peft==0.21.2 bitsandbytes==0.50.2 accelerate==1.15.0 datasets==4.8.5
# %pip install -q -c /tmp/torch-here.txt rapidfuzz==3.14.5 sacrebleu==2.6.0 latex2mathml==3.81.1 jinja2==3.1.6
# %pip install -q -c /tmp/torch-here.txt --only-binary xformers xformers

# %% [markdown]
# ## Settings
# What people change comes first. In a notebook, change it here; in a terminal each setting is an option (`--lora_r 32`,
# or a line of the YAML file that `--config` names), and so are most other options of TRL's `SFTConfig`.

# %%
from dataclasses import dataclass

NOTEBOOK_OPTIONS = ""  # in a notebook: options as in a terminal, such as "--config demo/config.yaml"


@dataclass
class Settings:
    """Every number of the recipe. The comment after a setting is its --help."""

    model_name_or_path: str = "unsloth/Qwen2-VL-7B-Instruct-bnb-4bit"  # base model: hub name or folder
    dataset_name: str = "unsloth/LaTeX_OCR"  # hub name, folder, or parquet, JSON or CSV file
    output_dir: str = "outputs"  # the folder for all that is written
    max_steps: int = 30  # optimizer steps: 30 show that it works, a few hundred teach
    num_train_epochs: float = 0  # if above 0, overrides max_steps: passes over all training rows
    batch_size: int | None = None  # samples per optimizer step, over all GPUs; None: 8
    learning_rate: float = 2e-4  # the highest; lower it if the loss jumps
    lora_r: int = 16  # rank of the adapters: larger ones can learn more
    lora_alpha: int = 16  # what the adapters add is scaled by lora_alpha / lora_r
    min_pixels: int | None = 30_000  # enlarge images with a smaller area; None: the model's default
    num_test_rows: int = 64  # held-out images, read before and after
    seed: int = 3407  # decides the held-out rows, the order, how adapters start
    resume_from_checkpoint: str | None = None  # a checkpoint's folder, or true: the last one in output_dir

    instruction: str = "Write the LaTeX representation for this image."  # what the model is asked
    image_column: str = "image"  # the column of images
    text_column: str = "text"  # the column of their LaTeX
    dataset_config: str | None = None  # which configuration of the data set, if it has several
    dataset_train_split: str = "train"  # the split to train on
    dataset_test_split: str = "test"  # the split to measure on; if there is none, part of train
    load_in_4bit: bool = True  # keep the frozen weights in 4 bits (bitsandbytes nf4)
    lora_dropout: float = 0.0  # dropout before the adapters
    lora_target_modules: str | None = None  # pattern of the layers with adapters; None: all in attention and MLPs
    max_pixels: int | None = None  # shrink images with a larger area; None: the model's default
    test_batch_size: int = 64  # held-out images to read at once
    max_new_tokens: int = 128  # token limit of a reading; scores raise it to the longest truth
    temperature: float = 1.5  # of the streamed reading; scores use greedy decoding
    min_p: float = 0.1  # of the streamed reading: tokens at least this share as likely as the likeliest
    per_device_train_batch_size: int | None = None  # samples at once on a GPU; None: as many as fit
    gradient_accumulation_steps: int | None = None  # micro-batches per optimizer step; None: as batch_size needs
    gradient_checkpointing: bool | None = None  # recompute activations: less memory, slower; None: only if needed
    warmup_steps: float = 5  # steps in which the learning rate rises, before it falls
    optim: str = "adamw_torch_fused"  # adamw_8bit saves 0.3 GB and adds 0.1 s to a step
    weight_decay: float = 0.001  # pulls the adapters towards zero
    bf16: bool | None = None  # train in bfloat16; None: on GPUs that have it, else fp16; CPU: fp32
    logging_steps: float = 1  # steps from one loss in the log to the next
    save_steps: float = 0.2  # steps from one checkpoint to the next; below 1: share of the run


# %% [markdown]
# ## Libraries and options
# This file alone is the whole recipe. With `qwen_vl_kit` beside it, the functions marked `@step` run faster, on several
# GPUs, and more safely: options, rows and checkpoints are checked, and there are a report and an export.

# %%
import json
import os
import random
import re
import sys
from importlib.util import find_spec
from math import ceil, inf
from pathlib import Path

if find_spec("qwen_vl_kit"):
    from qwen_vl_kit.seam import step
else:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("Alone, this file trains on one GPU: start it with python, or run it in a clone of its repository.")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the trainer would spread a step over all it sees
    print("This file runs alone: on one GPU, with nothing checked.")
    step = lambda function: function  # noqa: E731 (a name for "as it is")

os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")  # compiling takes two minutes, and no later step is faster
import torch

FastVisionModel = None
if torch.cuda.is_available():
    try:
        from unsloth import FastVisionModel  # before transformers, TRL and PEFT, which it patches
    except (ImportError, NotImplementedError, RuntimeError) as error:
        print(f"Continuing without Unsloth, which can't be used here: {error}")

from bitsandbytes.nn import Linear4bit
from datasets import Image, load_dataset
from peft import LoraConfig, get_peft_model
from rapidfuzz.distance import Levenshtein
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, GenerationConfig, TextStreamer
from trl import SFTConfig, SFTTrainer, TrlParser


# %%
@step
def split_batch(options, free):
    """Fills in how an optimizer step is split into micro-batches that fit into `free` GB. The 7B's weights take 8."""
    size, times = options.per_device_train_batch_size, options.gradient_accumulation_steps
    batch = options.batch_size or (size or 8) * (times or 1)
    if options.gradient_checkpointing is None:
        options.gradient_checkpointing = free < 8 + 2.7 * batch
    fitting = (free - 8) / (0.4 if options.gradient_checkpointing else 2.7)  # GB of a formula's activations
    divisors = [n for n in range(1, batch + 1) if batch % n == 0 and n <= max(fitting, 1)]
    size = size or (batch // times if times else divisors[-1])
    options.per_device_train_batch_size, options.gradient_accumulation_steps = size, times or max(batch // size, 1)
    options.batch_size = size * options.gradient_accumulation_steps


@dataclass
class Options(Settings, SFTConfig):  # and all other options of TRL's trainer, with its own defaults
    def __post_init__(self):
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
        self.fp16 = self.fp16 or (on_gpu and not self.bf16)
        self.train_sampling_strategy, self.remove_unused_columns = "sequential", False  # the rows are ordered below
        split_batch(self, torch.cuda.mem_get_info()[0] / 1e9 if on_gpu else inf)
        super().__post_init__()


@step
def read_options(options_class, arguments):
    """The options that a command line asks for, given as a list of words."""
    return TrlParser(options_class).parse_args_and_config(arguments)[0]


in_notebook = "get_ipython" in globals()
options = read_options(Options, NOTEBOOK_OPTIONS.split() if in_notebook else sys.argv[1:])
if "7B" in options.model_name_or_path and not (torch.cuda.is_available() or Path(options.model_name_or_path).exists()):
    sys.exit("The 7B needs an NVIDIA GPU with 10 GB. Without one: python finetune_qwen_vl.py --config demo/config.yaml")
outputs = Path(options.output_dir)
outputs.mkdir(parents=True, exist_ok=True)
dtype = torch.bfloat16 if options.bf16 else torch.float16 if options.fp16 else torch.float32

# %% [markdown]
# ## Question
# The processor turns text and images into tokens. Its chat template says how to ask this model and how answers end.


# %%
@step
def load_processor(options):
    """The model's processor. Without min_pixels, images that are 40 pixels high would reach Qwen2-VL 28 high."""
    processor = AutoProcessor.from_pretrained(options.model_name_or_path, trust_remote_code=False)
    if "enable_thinking" in (processor.chat_template or ""):  # it is always told that answers come without a thought
        processor.chat_template = "{% set enable_thinking = false %}" + processor.chat_template
    area = processor.image_processor.size or {}
    if "shortest_edge" in area and "longest_edge" in area and hasattr(processor.image_processor, "merge_size"):
        area["longest_edge"] = options.max_pixels or area["longest_edge"]
        area["shortest_edge"] = min(options.min_pixels or area["shortest_edge"], area["longest_edge"])
    return processor


processor = load_processor(options)
sizes = processor.image_processor
token_side = sizes.patch_size * sizes.merge_size if hasattr(sizes, "merge_size") else 28  # pixels across an image token
question = {"role": "user", "content": [{"type": "text", "text": options.instruction}, {"type": "image"}]}
answer = {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]}
prompt = processor.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
end_of_turn = processor.apply_chat_template([question, answer], tokenize=False).rpartition("ANSWER")[2].strip()
end_of_turn = end_of_turn or processor.tokenizer.eos_token  # some templates end no turn

# %% [markdown]
# ## Data
# Images and LaTeX, in two parts that share no image: one to train on, one held out to measure on. Each row is a chat.


# %%
@step
def load_splits(options):
    """The splits of the data set, by name, their images as RGB."""
    file = Path(options.dataset_name)
    how = {"path": file.suffix[1:].replace("jsonl", "json"), "data_files": str(file)}
    splits = load_dataset(**how if file.is_file() else {"path": str(file), "name": options.dataset_config})
    return splits.cast_column(options.image_column, Image(mode="RGB"))


@step
def choose_rows(rows, wanted, held_out, options):
    """Takes `wanted` rows, none with an image in `held_out`. Returns {number: approximate tokens}, and digests."""
    lengths, digests = {}, set()
    for number in random.Random(options.seed).sample(range(len(rows)), len(rows)):
        if len(lengths) < wanted:
            image, text = map(rows[number].get, (options.image_column, options.text_column))
            if (digest := hash(image.tobytes())) not in held_out:
                lengths[number] = image.width * image.height / token_side**2 + len(text) / 2
                digests.add(digest)
    return lengths, digests


@step
def order_rows(lengths, options):
    """The rows of all steps, in order. Those of one step have similar lengths, to keep padding small."""
    chance, rows, order, size = random.Random(options.seed), [*lengths], [], options.batch_size
    while len(order) < options.max_steps * size:
        whole = len(rows) // size * size
        for start in range(0, whole, 16 * size):  # 16 steps at a time: a higher max_steps changes no earlier step
            like = sorted(rows[start : min(start + 16 * size, whole)], key=lengths.get)
            batches = [like[first : first + size] for first in range(0, len(like), size)]
            order += [row for batch in chance.sample(batches, len(batches)) for row in batch]
        # The last step of an epoch is as large as the others, with some rows repeated.
        order += (rows[whole:] + rows * (size // len(rows) + 1))[: ceil((len(rows) - whole) / size) * size]
        rows = chance.sample(rows, len(rows))
    return order[: options.max_steps * size]


splits = load_splits(options)
test_split = options.dataset_test_split if options.dataset_test_split in splits else options.dataset_train_split
train_rows, test_rows = splits[options.dataset_train_split], splits[test_split]
test_lengths, held_out = choose_rows(test_rows, options.num_test_rows, set(), options)
wanted = inf if options.num_train_epochs else (options.max_steps + 16) * options.batch_size  # 16: see order_rows
train_lengths, _ = choose_rows(train_rows, wanted, held_out, options)
options.max_steps = ceil(options.num_train_epochs * ceil(len(train_lengths) / options.batch_size)) or options.max_steps
order = order_rows(train_lengths, options)
print(f"{options.dataset_name}: {len({*order}):,} rows to train on, {len(test_lengths):,} others held out")


# %%
def to_samples(rows):
    """Turns rows into samples on demand: all of them in a list ran out of memory (unslothai/unsloth issue 2315)."""
    answers = [text.strip() + end_of_turn for text in rows[options.text_column]]
    return {"image": rows[options.image_column], "answer": answers}


def encode(images, padding_side, answers=None):
    """Tensors that ask the model to read `images`, with these answers if given, padded to one length."""
    texts = [prompt + answer for answer in answers or [""] * len(images)]
    padding = {"padding": True, "padding_side": padding_side, "add_special_tokens": False, "return_tensors": "pt"}
    return processor(text=texts, images=[[image] for image in images], **padding)


def collate(samples):
    """One batch of samples. Its `labels`, (samples, tokens), are the answers and their ends, and -100 elsewhere."""
    answers = [sample["answer"] for sample in samples]  # TRL's collator adds a newline, and fails for Llama-3.2
    batch = encode([sample["image"] for sample in samples], "right", answers)
    answered = [len(tokens) for tokens in processor.tokenizer(answers, add_special_tokens=False).input_ids]
    ends, column = batch["attention_mask"].sum(dim=1, keepdim=True), torch.arange(batch["input_ids"].shape[1])
    answer = (ends - torch.tensor(answered)[:, None] <= column) & (column < ends)
    return {**batch, "labels": batch["input_ids"].where(answer, -100)}


train_set = train_rows.select(order).with_transform(to_samples)
test_set = test_rows.select([*test_lengths]).with_transform(to_samples)
truths = [text.strip() for text in test_rows.select([*test_lengths])[options.text_column]]

# %% [markdown]
# ## Model
# The base in 4 bits, frozen, with small trainable LoRA matrices beside its layers: by Unsloth on a GPU, else by PEFT.


# %%
@step
def load_model(options, dtype, device, storage="uint8"):
    """The base model with new adapters, its 4-bit weights packed into numbers of the type `storage`."""
    if FastVisionModel:
        how = {"load_in_4bit": options.load_in_4bit, "dtype": dtype, "use_gradient_checkpointing": False}
        model, _ = FastVisionModel.from_pretrained(options.model_name_or_path, **how)
    else:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": storage}
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **nf4)
        how = {"quantization_config": nf4 if options.load_in_4bit else None, "dtype": dtype, "device_map": {"": device}}
        model = AutoModelForImageTextToText.from_pretrained(options.model_name_or_path, **how)
        for layer in model.modules():
            if isinstance(layer, Linear4bit):  # else, on some CPUs, it can't be trained after generate()
                layer.support_avx512bf16_for_cpu = False
    parts = [*model.named_modules()]  # the blocks of images and text are lists with attention: no merger, no head
    blocks = tuple(name for name, part in parts if isinstance(part, torch.nn.ModuleList) and "ttention" in repr(part))
    linear = [name for name, part in parts if isinstance(part, torch.nn.Linear) and name.startswith(blocks)]
    linear = {re.sub(r"\.\d+\.", r".\\d+.", name) for name in linear if "audio" not in name}
    how = {"target_modules": options.lora_target_modules or "|".join(sorted(linear)), "bias": "none"}
    how |= {"r": options.lora_r, "lora_alpha": options.lora_alpha, "lora_dropout": options.lora_dropout}
    if FastVisionModel:
        return FastVisionModel.get_peft_model(model, **how, use_gradient_checkpointing=False, random_state=options.seed)
    torch.manual_seed(options.seed)
    return get_peft_model(model, LoraConfig(**how, task_type="CAUSAL_LM"))


model = load_model(options, dtype, options.device)
base = model.generation_config  # without its beams, penalties, ...: only the tokens stay
base.update(**GenerationConfig(eos_token_id=base.eos_token_id, pad_token_id=base.pad_token_id).to_dict())
trainable, total = model.get_nb_trainable_parameters()
print(f"{options.model_name_or_path} on {options.device}: {trainable:,} of {total:,} parameters train")

# %% [markdown]
# ## Before
# What does the model read in images that it will not train on? In one of them as it writes, token by token, then in
# all, by character error rate (CER: edit distance over length, both without spaces) and exact match.


# %%
@step
def read(samples, batch_size):
    """Reads images greedily. Returns [{"text": str, "cut": whether the length limit ended it}, ...]."""
    longest = max(len(tokens) for tokens in processor.tokenizer([truth + end_of_turn for truth in truths]).input_ids)
    limit, readings = max(longest, options.max_new_tokens), []  # no right answer is cut
    for start in range(0, len(samples), batch_size):
        inputs = encode(samples[start : start + batch_size]["image"], "left").to(model.device, dtype)  # answers follow
        tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False, use_cache=True)
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(tokens, torch.tensor(model.generation_config.eos_token_id, device=tokens.device)).any(dim=1)
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        readings += [{"text": text, "cut": not end} for text, end in zip(texts, ended.tolist(), strict=True)]
    return readings


@step
def measure(when):
    """Streams one held-out reading, then reads all. Returns the readings with their edit distances, and the scores."""
    FastVisionModel.for_inference(model) if FastVisionModel else model.eval()
    image = test_set[0]["image"]
    if in_notebook:
        display(image)  # noqa: F821 (IPython's)
    print(f"\n      image: {outputs / 'sample.png'}\n true LaTeX: {truths[0]}\nmodel reads: ", end="")
    how = {"do_sample": True, "temperature": options.temperature, "min_p": options.min_p, "use_cache": True}
    how |= {"streamer": TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)}
    model.generate(**encode([image], "left").to(model.device, dtype), **how, max_new_tokens=options.max_new_tokens)
    readings = read(test_set, options.test_batch_size)
    for truth, reading in zip(truths, readings, strict=True):
        truth, text = "".join(truth.split()), "".join(reading["text"].split())
        reading |= {"errors": Levenshtein.distance(text, truth), "length": len(truth)}
    errors, lengths, cut = ([reading[name] for reading in readings] for name in ("errors", "length", "cut"))
    scores = {"cer": sum(errors) / sum(lengths), "exact_match": errors.count(0) / len(cut), "cut": sum(cut) / len(cut)}
    print(f"{when} training: CER {scores['cer']:.3f}, exact match {scores['exact_match']:.1%}")
    return readings, scores


test_set[0]["image"].save(outputs / "sample.png")
readings_before, before = measure("Before")

# %% [markdown]
# ## Train
# The loss counts what the model has to write, the LaTeX and its end-of-turn token, and not the prompt.


# %%
@step
def make_trainer(Trainer=SFTTrainer):
    """A trainer for the model, with the options as they are now."""
    size, times = options.per_device_train_batch_size, options.gradient_accumulation_steps
    how = f"{size} x {times} per device, activations {'recomputed' if options.gradient_checkpointing else 'kept'}"
    print(f"Training {options.max_steps} steps of {options.batch_size} samples ({how})")
    FastVisionModel.for_training(model, options.gradient_checkpointing) if FastVisionModel else model.train()
    adapters = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    data = {"train_dataset": train_set, "eval_dataset": None if options.eval_strategy == "no" else test_set}
    trainer = Trainer(model=model, processing_class=processor, args=options, data_collator=collate, **data)
    for parameter, weights in adapters:  # TRL rounds them to bf16, where small updates are lost and fp16 fails
        parameter.data = weights.float()
    return trainer


trainer = make_trainer()
trainer.train(resume_from_checkpoint=options.resume_from_checkpoint == "true" or options.resume_from_checkpoint)

# %% [markdown]
# ## After
# The same again: only what was held out can tell whether the model has learned to read. Then everything is saved.


# %%
@step
def save(outputs, predictions, metrics):
    """Writes the results of the run to the folder `outputs`."""
    model.save_pretrained(outputs / "adapter")
    processor.tokenizer.padding_side = "left"  # for whoever reads several images at once
    processor.save_pretrained(outputs / "adapter")
    (outputs / "held_out").mkdir(exist_ok=True)
    for prediction, sample in zip(predictions, test_set, strict=True):
        sample["image"].save(outputs / prediction["image"])
    (outputs / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    (outputs / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


readings_after, after = measure("After")
predictions = [
    {"row": row, "image": f"held_out/{row}.png", "truth": truth, "before": old, "after": new}
    for row, truth, old, new in zip(test_lengths, truths, readings_before, readings_after, strict=True)
]
metrics = {"rows": len(truths), "test_split": test_split, "before": before, "after": after}
metrics |= {"train": {"log": trainer.state.log_history}, "settings": options.to_sanitized_dict()}
save(outputs, predictions, metrics)
print(f"The adapter is in {outputs / 'adapter'}, all numbers in {outputs / 'metrics.json'}.")
