# %% [markdown]
# # Teach Qwen2-VL to read formulas
# Fine-tune a 4-bit vision-language model with LoRA adapters to turn the picture of a formula into LaTeX, and measure
# the difference on pictures it never trained on. Read it top to bottom, run it top to bottom:
#
# - on a GPU: `python finetune_qwen_vl.py`
# - anywhere, in minutes, without a network: `python finetune_qwen_vl.py --config demo/config.yaml`

# %% [markdown]
# ## Install
# Only a notebook runs this cell; for a terminal there is `requirements.txt`. The torch that is here already stays, and
# xformers comes in the version made for it (if there is none, Unsloth does without).

# %%
# %pip freeze | grep -E "^torch(vision|audio)?==" > /tmp/torch-here.txt
# %pip install -q -c /tmp/torch-here.txt unsloth==2026.10.7 unsloth_zoo==2026.10.7 transformers==5.17.0 trl==1.14.2
# %pip install -q -c /tmp/torch-here.txt peft==0.21.2 bitsandbytes==0.50.2 accelerate==1.15.0 datasets==4.8.5
# %pip install -q -c /tmp/torch-here.txt rapidfuzz==3.14.5 sacrebleu==2.6.0 latex2mathml==3.81.1 jinja2==3.1.6
# %pip install -q -c /tmp/torch-here.txt --only-binary xformers xformers

# %% [markdown]
# ## Settings
# Every number of the recipe. In a terminal each one is an option (`--lora_r 32`, or a line of the file named by
# `--config`), and so is every other option of TRL's `SFTConfig`. In a notebook, change them here.

# %%
import gc
import hashlib
import io
import json
import logging
import os
import random
import re
import signal
import sys
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle, islice
from math import gcd
from pathlib import Path

# Compiling takes two minutes before the first step, and no later one is faster (benchmarks/README.md).
os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")
# Unsloth writes patched copies of its libraries: into the user's cache rather than the working directory.
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path.home() / ".cache" / "unsloth_compiled"))
for setting in ("HF_HUB_DISABLE_TELEMETRY", "UNSLOTH_DISABLE_STATISTICS"):  # nobody is told of a run
    os.environ.setdefault(setting, "1")
# On a CPU, threads that spin for long while they wait crawl beside another busy program: 2 samples/s, and so 26.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
for library in ("torchao", "bitsandbytes", "transformers.trainer_utils", "datasets.load", "datasets.packaged_modules"):
    logging.getLogger(library).setLevel(logging.ERROR)  # they warn of what does not matter here
warnings.filterwarnings("ignore", "Could not find a config file")  # PEFT would ask the hub for the base model's
# accelerate launch and torchrun start this file once for each GPU, and the first of these processes speaks for all.
if int(os.environ.get("RANK", 0)):
    sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"  # noqa: SIM115
if "get_ipython" not in globals():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save, Ctrl-C leaves at once, silently

import torch

FastVisionModel = None
sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # as configs/fsdp.yaml asks for, and Unsloth can't
if torch.cuda.is_available() and not sharded:
    try:
        from unsloth import FastVisionModel  # before transformers, TRL and PEFT, which it patches
        from unsloth.kernels.fast_lora import LoRA_W
        from unsloth.kernels.utils import get_lora_parameters_bias
    except (ImportError, NotImplementedError, RuntimeError) as error:
        print(f"Without Unsloth, which can't be used here: {error}")

import yaml
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from bitsandbytes.nn import Linear4bit
from datasets import Image, load_dataset
from datasets.config import DOWNLOADED_DATASETS_PATH
from datasets.exceptions import DatasetGenerationError, DatasetsError
from httpx import HTTPError
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from PIL import Image as Pillow
from PIL import ImageOps
from rapidfuzz.distance import Levenshtein
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TextStreamer
from transformers.hf_argparser import HfArg
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import cached_file
from trl import SFTConfig, SFTTrainer, TrlParser

gc.freeze()  # Unsloth collects garbage 18 times as it loads a model: 7 s, if all that was imported is looked through


@dataclass
class Settings:
    """What is fine-tuned, on what, and how it is measured."""

    model_name_or_path: str = HfArg(default="unsloth/Qwen2-VL-7B-Instruct-bnb-4bit", help="a hub name or a folder")
    load_in_4bit: bool = HfArg(default=True, help="keep the frozen weights in 4 bits (bitsandbytes nf4)")
    lora_r: int = HfArg(default=16, help="rank of the adapters")
    lora_alpha: int = HfArg(default=16, help="what the adapters add is scaled by lora_alpha / lora_r")
    lora_dropout: float = HfArg(default=0.0, help="dropout before the adapters")
    lora_target_modules: str = HfArg(
        default=r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|attn\.proj|out_proj|fc1|fc2)",
        help="regular expression of the layers with adapters: attention and MLP, vision and language",
    )
    # Three times the median area of unsloth/LaTeX_OCR, where most images are 40 pixels high and would reach Qwen2-VL 28
    # high. The demo's model, trained on them so, read with a CER of 0.51, and with 0.74 on the images as they are.
    min_pixels: int | None = HfArg(default=30_000, help="enlarge images of a smaller area (None: as the model has it)")
    max_pixels: int | None = HfArg(default=None, help="shrink images of a larger area (None: as the model has it)")

    dataset_name: str = HfArg(default="unsloth/LaTeX_OCR", help="a hub name, a folder, or a parquet, JSON or CSV file")
    dataset_config: str | None = HfArg(default=None, help="which configuration of the data set, if it has several")
    dataset_train_split: str = HfArg(default="train", help="the split to train on")
    dataset_test_split: str = HfArg(default="test", help="the split to measure on; if absent, part of train is")
    image_column: str = HfArg(default="image", help="the column of images")
    text_column: str = HfArg(default="text", help="the column of their LaTeX")
    max_characters: int = HfArg(default=4000, help="leave out rows whose LaTeX is longer: it would fill the memory")
    instruction: str = HfArg(default="Write the LaTeX representation for this image.", help="what the model is asked")

    num_test_rows: int = HfArg(default=64, help="held-out rows to read before and after")
    test_batch_size: int = HfArg(default=64, help="held-out images to read at once (fewer where memory is short)")
    max_new_tokens: int = HfArg(default=128, help="length limit of a reading, in tokens; scores take more if need be")
    temperature: float = HfArg(default=1.5, help="temperature of the streamed sample (scores are greedy)")
    min_p: float = HfArg(default=0.1, help="the streamed sample takes no token below this share of the likeliest one")

    save_merged: bool = HfArg(default=False, help="also write base and adapters as one 16-bit model (export.py)")
    save_gguf: str | None = HfArg(default=None, help="also write that for llama.cpp and Ollama: q8_0, ... (export.py)")


@dataclass
class TrainingSettings(SFTConfig):
    """TRL's training options with this recipe's defaults."""

    output_dir: str = "outputs"
    # 8 samples a step, as 8 x 1, 4 x 2, 2 x 4 or 1 x 8, with activations kept or recomputed: what is None here becomes,
    # in training, the fastest split that fits the memory. Several GPUs share them. The losses are the same.
    per_device_train_batch_size: int | None = None  # alone, it is the samples of a step
    gradient_accumulation_steps: int | None = None
    gradient_checkpointing: bool | None = None
    max_steps: int = 30  # for all samples once: --max_steps -1 --num_train_epochs 1
    warmup_steps: float = 5
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "linear"
    optim: str = "adamw_torch_fused"  # the usual 8-bit one saves 0.3 GB, and a step takes 0.1 s more
    weight_decay: float = 0.001
    bf16: bool | None = None  # None: bf16 where the GPU has it, else fp16; 32 bits without a GPU
    seed: int = 3407
    max_length: int | None = None  # a formula cut short would teach the model to stop early
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False  # it would hide from the log what ends the run (see Train)
    eval_steps: float = 0.2  # of the run, with --eval_strategy steps: then the checkpoint of the lowest loss is kept
    save_steps: float = 0.2  # of the run; a whole number: every so many steps
    save_total_limit: int | None = 2
    ddp_find_unused_parameters: bool | None = False  # every step uses all adapters
    hub_strategy: str = "end"  # with --push_to_hub: what export.py pushes, not all of outputs/ with every checkpoint
    report_to: str = "none"
    remove_unused_columns: bool = False  # samples are made out of these columns

    def __post_init__(self):
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
        self.fp16 = self.fp16 or (on_gpu and not self.bf16)
        asked = self.per_device_train_batch_size, self.gradient_accumulation_steps, self.gradient_checkpointing
        effective = (asked[0] or max(8 // (asked[1] or 1), 1)) * (asked[1] or 1)
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if processes > 1 and not torch.accelerator.is_available():  # "cpu:0", as it would be, can't load a checkpoint
            self.use_cpu, os.environ["ACCELERATE_TORCH_DEVICE"] = True, "cpu"
        # (samples at once, times a step, whether recomputed), the fastest first. To keep the activations of a quarter
        # at once is slower than to recompute those of all, and takes more memory.
        self.splits = [
            (effective // (times * processes), times, recompute)
            for recompute, choice in ((False, (1, 2)), (True, (1, 2, 4, 8)))
            for times in ([asked[1] // gcd(asked[1], processes)] if asked[1] else choice)
            if effective % (times * processes) == 0 and asked[2] in (None, recompute)
        ]
        if not self.splits:
            raise ValueError(
                f"{effective} samples a step can't be shared out evenly over {processes} processes: start a number of "
                f"them that divides {effective}, or give a multiple of {processes} as --per_device_train_batch_size"
            )
        self.per_device_train_batch_size, self.gradient_accumulation_steps, self.gradient_checkpointing = self.splits[0]
        if self.eval_strategy != "no" and self.save_strategy != "no":
            self.save_strategy, self.save_steps, self.load_best_model_at_end = self.eval_strategy, self.eval_steps, True
            self.save_total_limit = self.save_total_limit and max(self.save_total_limit, 2)  # the best and the last
        self.dataloader_pin_memory = self.dataloader_pin_memory and on_gpu
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # started as one process, the trainer would take a step on each GPU


def fail(sentence, end=sys.exit):
    """Ends the run with a sentence that says what to do."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(5)  # where all processes fail alike, the first says why, and the launcher ends the others meanwhile
    for bar in [*getattr(tqdm, "_instances", ())]:
        bar.close()  # else it would be drawn once more, below the sentence
    end(sentence)


class Parser(TrlParser):
    """TRL's parser; numbers in a config file, which it takes unchecked, are checked like those of the command line."""

    def set_defaults_with_config(self, **config):
        typed = {key: str(value) if isinstance(value, (bool, int, float)) else value for key, value in config.items()}
        return super().set_defaults_with_config(**typed)

    def error(self, message):
        fail(message, super().error)


in_notebook = "get_ipython" in globals()
arguments = [] if in_notebook else sys.argv[1:]
usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"
parser = Parser((Settings, TrainingSettings), usage=usage, allow_abbrev=False)
try:
    settings, training_args, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
except IndexError:
    parser.error("--config needs the name of a YAML file")
except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
    parser.error(str(error))
if unknown:  # without their values: one can be a token
    names = " ".join(word.split("=")[0] for word in unknown if word.startswith("-"))
    parser.error(f"unknown option {names or unknown[0]} (--help lists them all)")
if settings.num_test_rows < 1:
    parser.error("--num_test_rows has to be 1 at least: without held-out rows nothing is proved")
if training_args.hub_token:  # the libraries take it from here, too; as an option it would be saved with checkpoints
    os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
outputs = Path(training_args.output_dir)
try:
    outputs.mkdir(parents=True, exist_ok=True)
except OSError as error:
    parser.error(f"can't write to {outputs} ({error.strerror}): choose another folder with --output_dir")
checkpoint = training_args.resume_from_checkpoint
if checkpoint and checkpoint.lower() == "true":
    checkpoint = get_last_checkpoint(outputs)
    print(f"Going on from {checkpoint}" if checkpoint else f"There is no checkpoint in {outputs} yet: from the start")
if checkpoint and not Path(checkpoint, "trainer_state.json").is_file():
    parser.error(f"there is no checkpoint {checkpoint} to go on from: start anew, without --resume_from_checkpoint")
guard = None
if find_spec("guard"):  # what can't be done is said now rather than after hours of training
    import guard

    guard.check(outputs, checkpoint, training_args.max_steps, parser.error)
beyond = settings.save_merged or settings.save_gguf or training_args.push_to_hub
if beyond:
    if not find_spec("export"):
        parser.error("--save_merged, --save_gguf and --push_to_hub need export.py, which has to lie beside this file")
    import export

    beyond = training_args.process_index == 0 and export.prepare(settings, training_args)
if not torch.cuda.is_available() and settings.model_name_or_path == Settings.model_name_or_path:
    fail(
        f"{settings.model_name_or_path} needs an NVIDIA GPU with 10 GB of free memory, and there is none here. "
        "To see everything work on this machine: python finetune_qwen_vl.py --config demo/config.yaml"
    )

if not guard:
    print("guard.py is not beside this file: Ctrl-C does not save, and a kill can leave half a checkpoint.")

# %% [markdown]
# ## Question
# The processor that belongs to the model makes tokens of text and images, and its chat template says how this model is
# asked, and how its answers end ("<|im_end|>" for Qwen2-VL).


# %%
def load(what, name, get, cached=True):
    """What `get` loads by `name`; if it can't, the run ends with the reason, plainer than the libraries' where need be.

    `guard.py` asks the hub for what is not `cached` alone, and again where it is busy.
    """
    try:
        return guard.patiently(name, get, cached) if guard else get()
    except (OSError, TypeError, ValueError, DatasetsError, HTTPError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        reason = (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".:")
        if not Path(name).exists() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):  # nor can the hub have it
            reason = "there is no such file or folder"
        elif cause is not error:
            reason = f"there are no rows that can be read ({reason})"
        fail(
            f"Could not load the {what} {name!r}: {reason}. Check the name or the path, the network, and, if it is "
            "gated, that you are logged in (hf auth login)."
        )


def get_processor():
    config = AutoConfig.from_pretrained(settings.model_name_or_path, trust_remote_code=False)  # says best what is wrong
    # The weights are what comes last to the cache: where they are, all is.
    cached_file(settings.model_name_or_path, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    return config, AutoProcessor.from_pretrained(settings.model_name_or_path, trust_remote_code=False)


config, processor = load("model", settings.model_name_or_path, get_processor)
if sharded and hasattr(config, "quantization_config"):
    fail(
        f"{settings.model_name_or_path} is stored in few bits, which FSDP can't share out: name the 16-bit model it "
        "was made from, such as Qwen/Qwen2-VL-7B-Instruct. It gets its 4 bits when it is loaded."
    )
# Qwen2-VL resizes an image to sides that are multiples of 28 pixels and to an area between these two.
area = processor.image_processor.size
if "shortest_edge" in area and "longest_edge" in area:
    area["longest_edge"] = settings.max_pixels or area["longest_edge"]
    area["shortest_edge"] = min(settings.min_pixels or area["shortest_edge"], area["longest_edge"])
elif settings.max_pixels or settings.min_pixels not in (None, Settings.min_pixels):
    fail(f"{settings.model_name_or_path} has no min_pixels and max_pixels: leave them out.")

question = {"role": "user", "content": [{"type": "text", "text": settings.instruction}, {"type": "image"}]}
answer = {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]}
try:
    prompt = processor.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    end_of_turn = processor.apply_chat_template([question, answer], tokenize=False).rpartition("ANSWER")[2].strip()
except ValueError:
    fail(f"{settings.model_name_or_path} has no chat template: choose an instruction-tuned model (...-Instruct).")

# %% [markdown]
# ## Data
# Images and their LaTeX, in two parts that share no image: one to train on, one held out to measure on. Rows that can't
# be used are named and left out. Only rows of this run are decoded: once to see that they can be, then when needed.

# %%
FILE_TYPES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
source = Path(settings.dataset_name)
if source.is_file() and source.suffix not in FILE_TYPES:
    fail(f"{source} is none of {', '.join(FILE_TYPES)}. Name such a file, a folder, or a hub name.")


def get_rows():
    if source.is_file():
        return load_dataset(FILE_TYPES[source.suffix], data_files=str(source))
    return load_dataset(settings.dataset_name, settings.dataset_config)


with training_args.main_process_first():  # around all attempts: each process may need another number of them
    splits = load("data set", settings.dataset_name, get_rows)
if settings.dataset_train_split not in splits:
    fail(f"{source} has no split {settings.dataset_train_split!r}; --dataset_train_split takes one of {[*splits]}.")
train_rows = splits[settings.dataset_train_split]
for option in ("image_column", "text_column"):
    column = getattr(settings, option)
    if column not in train_rows.column_names:
        fail(f"{source} has no column {column!r}; --{option} takes one of {train_rows.column_names}.")
held_out_from_train = settings.dataset_test_split not in splits
test_split = settings.dataset_train_split if held_out_from_train else settings.dataset_test_split
test_rows = splits[test_split]
try:
    train_rows = train_rows.cast_column(settings.image_column, Image(decode=False))
    test_rows = test_rows.cast_column(settings.image_column, Image(decode=False))
except (TypeError, ValueError, NotImplementedError):
    fail(f"Column {settings.image_column!r} of {source} holds no images; choose another with --image_column.")


class Unusable(Exception):
    """Why a row can't be used, in words."""


# Where the paths of a JSON or CSV file start, and the only places that the paths of a data set may lead to.
data_folder = source if source.is_dir() else source.parent if source.is_file() else Path(HF_HUB_CACHE)
places = data_folder.resolve(), Path(DOWNLOADED_DATASETS_PATH).resolve()
warnings.simplefilter("error", Pillow.DecompressionBombWarning)  # from 89 million pixels on
Pillow.init()
IMAGE_TYPES = [name for name in Pillow.ID if name != "EPS"]  # that is a program, for Ghostscript to run


def image_bytes(image):
    """The file of `image`, {"bytes": bytes or None, "path": str or None} as `datasets` has it undecoded."""
    if image["bytes"]:
        return image["bytes"]
    path = image["path"]
    if path.startswith('"'):  # as `datasets` has it where other rows of a JSON file hold other things than paths
        path = json.loads(path)
    file = (data_folder / path).resolve()
    if not any(file.is_relative_to(place) for place in places):
        raise Unusable("image outside the data set's folder")
    if not file.is_file():  # a pipe would be waited for
        raise FileNotFoundError(file)
    return file.read_bytes()


def open_image(image):
    """Decodes such an image to RGB as a person would see it; raises what Pillow raises if it can't.

    Transparency becomes white paper (else black text on it is black on black), 16 bits a pixel become 8 (else they are
    clipped to white), and a photo is turned as its EXIF data says.
    """
    try:
        picture = Pillow.open(io.BytesIO(image_bytes(image)), formats=IMAGE_TYPES)
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
        raise Unusable("image of too many pixels") from None
    if max(picture.size) > 200 * min(picture.size):  # Qwen2-VL takes no others
        raise Unusable("image over 200 times as long as wide")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = picture.point(lambda level: level * (1 / 256)).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Pillow.alpha_composite(Pillow.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def shuffled(rows):
    """The row numbers in an order that the seed decides, as an iterator."""
    return iter(random.Random(training_args.seed).sample(range(len(rows)), len(rows)))


def usable(rows, numbers, split, wanted, held_out=frozenset()):
    """Takes rows by the iterator `numbers` until `wanted` are found that can be used (None: all that can).

    A row can be used if its text is not empty and its image decodes, shows something, and is not in `held_out`, a set
    of digests of images. Prints which others it met. Returns {row's number: pixels of its image}, and the digests.
    """
    kept, digests, left_out = {}, set(), defaultdict(list)
    for number in tqdm(numbers, f"Checking {split} rows", total=wanted or len(rows), leave=False):
        row = rows[number]
        text, image = row[settings.text_column], row[settings.image_column]
        try:
            if not isinstance(text, str | None):
                raise Unusable("text is not a string")
            if not (text or "").strip():
                raise Unusable("no text")
            if len(text) > settings.max_characters:
                raise Unusable(f"text of more than {settings.max_characters:,} characters")
            if any(token in text for token in special_tokens):
                raise Unusable("text with special tokens of the model")
            picture = open_image(image)
            if picture.getcolors(1):
                raise Unusable("image of one color")
            digest = hashlib.sha256(picture.tobytes()).digest()
            if digest in held_out:
                raise Unusable("same image as a held-out row")
            kept[number] = picture.width * picture.height
            digests.add(digest)
        except Exception as error:  # on a broken file Pillow's decoders raise anything
            reason = str(error) if isinstance(error, Unusable) else "image missing or unreadable"
            left_out[reason].append(number)
            skipped.append(json.dumps({"row": number, "split": str(rows.split), "reason": reason}))
        if len(kept) == wanted:
            break
    for reason, numbers in left_out.items():
        named = ", ".join(map(str, sorted(numbers)[:20])) + (", ..." if len(numbers) > 20 else "")
        print(f"Left out {len(numbers)} {split} row{'s' * (len(numbers) > 1)} ({reason}): {named}")
    return kept, digests


effective_batch = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
needed = training_args.max_steps * effective_batch if training_args.max_steps > 0 else None
special_tokens = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
skipped = []
numbers = shuffled(test_rows)
test_pixels, test_images = usable(test_rows, numbers, "held-out", settings.num_test_rows)
numbers = numbers if held_out_from_train else shuffled(train_rows)
train_pixels, _ = usable(train_rows, numbers, "training", needed, held_out=test_images)
if training_args.process_index == 0:
    (outputs / "skipped.jsonl").write_text("".join(f"{line}\n" for line in skipped), encoding="utf-8")
test_rows, train_rows = test_rows.select([*test_pixels]), train_rows.select([*train_pixels])
if len(test_rows) < settings.num_test_rows or len(train_rows) == 0:
    fail(
        f"{source} has too few rows: {len(test_rows)} to hold out (--num_test_rows {settings.num_test_rows}) and "
        f"{len(train_rows)} others to train on. Lower --num_test_rows, or add data."
    )
known = {"".join(text.split()) for text in train_rows[settings.text_column]}
seen = sum("".join(text.split()) in known for text in test_rows[settings.text_column])
also = f" ({seen} of them of formulas that other images in training show)" if seen else ""
print(f"{source}: {len(train_rows):,} rows to train on, {len(test_rows):,} others held out{also}")

# %% [markdown]
# ## Model
# The base model in 4 bits, frozen, with small trainable LoRA matrices beside its attention and MLP layers. Unsloth does
# it on a GPU, plain transformers and PEFT anywhere else; from the next cell on there is one code for both.


# %%
@contextmanager
def must_fit(task):
    """Turns running out of memory in `task` into one sentence that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error) and "No executable batch size" not in str(error):
            raise
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        free += torch.cuda.memory_reserved()  # our own share
        fail(
            f"\nThe memory does not suffice for {task}: {free / 1e9:.1f} of the GPU's {total / 1e9:.1f} GB are free "
            "for this run. Close what else uses the GPU, leave batch size and gradient checkpointing to the script, or "
            "take a smaller model, such as --model_name_or_path unsloth/Qwen2-VL-2B-Instruct-bnb-4bit"
        )


def fuse(layer):
    """Has a layer with LoRA computed by Unsloth's kernel for text models: a few launches instead of a dozen."""

    def forward(x):
        weight, quantization, a, b, scale, bias = get_lora_parameters_bias(layer)
        y = LoRA_W.apply(x[None] if x.dim() == 2 else x, weight, quantization, a, b, scale).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    layer.forward = forward


# Where PyTorch prefers cuDNN's attention (Hopper), it plans anew for every new size of an image or a text.
torch.backends.cuda.enable_cudnn_sdp(False)
dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
lora = {"r": settings.lora_r, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout, "bias": "none"}
lora["target_modules"] = settings.lora_target_modules


def with_adapters():
    """Returns the base model with new adapters."""
    with must_fit("the model"):
        if FastVisionModel:
            model, _ = FastVisionModel.from_pretrained(
                settings.model_name_or_path,
                load_in_4bit=settings.load_in_4bit,
                dtype=dtype,
                use_gradient_checkpointing=False,
            )
            model = FastVisionModel.get_peft_model(
                model, **lora, use_gradient_checkpointing=False, random_state=training_args.seed
            )
            for layer in model.modules():
                if isinstance(layer, LoraLayer) and not settings.lora_dropout:
                    fuse(layer)
        else:
            nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            stored = dtype if sharded else torch.uint8  # FSDP shares out what look like floating-point numbers
            if sharded:  # the launcher gives each process one thread, and 4 bits are made on the CPU
                torch.set_num_threads(max(1, os.cpu_count() // training_args.world_size))
            nf4 = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=stored)
            model = AutoModelForImageTextToText.from_pretrained(
                settings.model_name_or_path,
                **({"quantization_config": nf4} if settings.load_in_4bit else {}),
                dtype=dtype,
                device_map={"": "cpu" if sharded else training_args.device},
            )
            for layer in model.modules():
                if isinstance(layer, Linear4bit):  # else, on some CPUs, it can't be trained once it has generated
                    layer.support_avx512bf16_for_cpu = False
            torch.manual_seed(training_args.seed)
            model = get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM"))
    return model


weights = f"models--{settings.model_name_or_path.replace('/', '--')}/snapshots/*/*.safetensors"
model = load("model", settings.model_name_or_path, with_adapters, cached=any(Path(HF_HUB_CACHE).glob(weights)))
if guard:
    guard.allow_network(bool(beyond))  # all that training needs is here
if FastVisionModel:
    to_inference, to_training = FastVisionModel.for_inference, FastVisionModel.for_training
else:
    to_inference, to_training = torch.nn.Module.eval, lambda model, recompute: model.train()

trainable, total = model.get_nb_trainable_parameters()
print(
    f"{settings.model_name_or_path} on {training_args.device} by {'Unsloth' if FastVisionModel else 'transformers'}: "
    f"{trainable:,} of {total:,} parameters train"
)
if sharded:  # each process keeps its part of the weights, and is sent the others' layer by layer
    fsdp2_prepare_model(Accelerator(mixed_precision=training_args.mixed_precision), model)
    register_fsdp_forward_method(model, "generate")
    model.set_reshard_after_forward(True)  # none of what was sent for reading stays

# %% [markdown]
# ## Samples
# Each row becomes a chat: the user asks and shows the image, the assistant answers in LaTeX. Samples are made at the
# moment they are needed; a list of them, as other recipes make, has filled memories (unslothai/unsloth issue 2315).
# The LaTeX stays as the data spells it: fewer spaces, a third fewer tokens, did not teach a small model more (README).


# %%
def to_samples(rows):
    """Turns a batch of rows into samples: an RGB image, and the answer that the model has to learn to give."""
    return {
        "image": [open_image(image) for image in rows[settings.image_column]],
        "answer": [text.strip() + end_of_turn for text in rows[settings.text_column]],
    }


def encode(images, padding_side, answers=None):
    """Makes the model's inputs that ask it to read `images`, with these answers: tensors, padded to one length."""
    return processor(
        text=[prompt + answer for answer in answers or [""] * len(images)],
        images=[[image] for image in images],
        padding=True,
        padding_side=padding_side,
        add_special_tokens=False,  # the chat template has put them
        return_tensors="pt",
    )


max_length = training_args.max_length  # kept here because Unsloth's trainer sets it to 2048


def collate(samples):
    """Makes one batch of samples: the tokens that ask, then those of the answer, padded on the right.

    `labels`, shape (samples, tokens) like `input_ids`, holds the answer, from the first token of the LaTeX to the
    end-of-turn token, and -100 elsewhere. (TRL's own collator adds the template's next newline, and can't do Llama.)
    """
    answers = [sample["answer"] for sample in samples]
    batch = encode([sample["image"] for sample in samples], "right", answers)
    answered = [len(tokens) for tokens in processor.tokenizer(answers, add_special_tokens=False).input_ids]
    ends = batch["attention_mask"].sum(dim=1, keepdim=True)
    column, shape = torch.arange(ends.max()), batch["input_ids"].shape
    answer = (ends - torch.tensor(answered)[:, None] <= column) & (column < ends)
    batch["labels"] = batch["input_ids"].where(answer, -100)
    return {name: value[:, :max_length] if value.shape[:2] == shape else value for name, value in batch.items()}


class LikeLengths(Sampler):
    """All rows in an order that the seed and the epoch decide, those of one step of like length: little is padding.

    `lengths` of the rows, in about tokens. The longest come first: a split that fits them fits all. What the last step
    lacks is taken once more, so that every step can be shared out evenly.
    """

    def __init__(self, lengths, rows_a_step):
        self.lengths, self.rows_a_step, self.epoch = lengths, rows_a_step, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return -(-len(self.lengths) // self.rows_a_step) * self.rows_a_step

    def __iter__(self):
        size, chance = self.rows_a_step, random.Random(f"{training_args.seed} {self.epoch}")
        rows = [*islice(cycle(chance.sample(range(len(self.lengths)), len(self.lengths))), len(self))]
        for pool in (slice(start, start + 16 * size) for start in range(0, len(rows), 16 * size)):
            rows[pool] = sorted(rows[pool], key=self.lengths.__getitem__)
        steps = [rows[start : start + size] for start in range(0, len(rows), size)]
        chance.shuffle(steps)
        steps.sort(key=lambda step: max(self.lengths) not in [self.lengths[row] for row in step])
        return (row for step in steps for row in step)


train_set, test_set = train_rows.with_transform(to_samples), test_rows.with_transform(to_samples)
truths = [text.strip() for text in test_rows[settings.text_column]]
# Qwen2-VL takes a token for 28 x 28 pixels; two characters of LaTeX are about one.
lengths = [
    max(pixels, area.get("shortest_edge", 0)) / 28**2 + len(text) / 2
    for pixels, text in zip(train_pixels.values(), train_rows[settings.text_column], strict=True)
]

# %% [markdown]
# ## Before
# What does the model read in images it will not train on? In one of them as it writes, token by token, then in all, by
# character error rate (CER: edit distance over length, both without spaces) and exact match.


# %%
def stream_sample():
    """Shows the first held-out formula and, token by token, what the model reads in its image."""
    if training_args.process_index and not sharded:
        return
    if in_notebook:
        display(test_set[0]["image"])  # noqa: F821 (IPython's)
    print(f"\n      image: {outputs / 'sample.png'}\n true LaTeX: {truths[0]}\nmodel reads: ", end="")
    model.generate(
        **encode([test_set[0]["image"]], "left").to(model.device, dtype),
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
        max_new_tokens=settings.max_new_tokens,
        do_sample=True,
        temperature=settings.temperature,
        min_p=settings.min_p,
        use_cache=True,
        synced_gpus=sharded,
    )


# Room for the longest held-out formula and its end token: no right answer is cut.
longest = max(len(processor.tokenizer(text + end_of_turn).input_ids) for text in truths)


def read_test_set():
    """Reads all held-out images greedily, each process its share.

    Returns [{"text": str, "cut": whether the length limit ended it}, ...], in all processes.
    """
    with training_args.distributed_state.split_between_processes(test_set) as mine:
        mine = test_set if sharded else mine  # with the weights in parts, all have to take every step together
        readings, bar = [], tqdm(total=len(mine), desc="Reading held-out images")
    less = iter([settings.test_batch_size >> halvings for halvings in range(1, 32)])

    @find_executable_batch_size(starting_batch_size=settings.test_batch_size, reduce_batch_size_fn=lambda: next(less))
    def read_on(batch_size):
        while len(readings) < len(mine):
            images = mine[len(readings) : len(readings) + batch_size]["image"]
            # Padded on the left: the answer has to follow the prompt directly.
            inputs = encode(images, "left").to(model.device, dtype)
            tokens = model.generate(
                **inputs,
                max_new_tokens=max(longest, settings.max_new_tokens),
                do_sample=False,
                repetition_penalty=1.0,  # some models' own default, but formulas do repeat themselves
                use_cache=True,
                synced_gpus=sharded,
            )[:, inputs["input_ids"].shape[1] :]
            ends = torch.tensor(model.generation_config.eos_token_id, device=tokens.device)
            cut = (~torch.isin(tokens, ends).any(dim=1)).tolist()
            texts = processor.batch_decode(tokens, skip_special_tokens=True)
            readings.extend({"text": text, "cut": cut} for text, cut in zip(texts, cut, strict=True))
            bar.update(len(texts))

    read_on()
    bar.close()
    return readings if sharded else gather_object(readings)


def score(readings):
    """Returns {"cer": character error rate, "exact_match": share, "cut": share} of the held-out images' readings."""
    pairs = ["".join(truth.split()) for truth in truths], ["".join(reading["text"].split()) for reading in readings]
    return {
        "cer": sum(map(Levenshtein.distance, *pairs)) / sum(map(len, pairs[0])),
        "exact_match": sum(map(str.__eq__, *pairs)) / len(truths),
        "cut": sum(reading["cut"] for reading in readings) / len(truths),
    }


to_inference(model)
if training_args.process_index == 0:
    test_set[0]["image"].save(outputs / "sample.png")
with must_fit("reading an image"):
    stream_sample()
    readings_before = read_test_set()
before = score(readings_before)
print(f"Before training: CER {before['cer']:.3f}, exact match {before['exact_match']:.1%}")

# %% [markdown]
# ## Train
# The loss counts what the model is to write, the LaTeX and its end-of-turn token, and not the prompt. The samples of a
# step are split as is fastest; where that runs out of memory, training goes on, from the step it had come to, with the
# next split. Killed or stopped (Ctrl-C: after the step), it goes on from its last checkpoint, as if nothing had
# happened, with `--resume_from_checkpoint true`.


# %%
class LossBar(ProgressCallback):
    """The trainer's progress bar with the loss in it, instead of a line for every step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")
        elif self.training_bar is not None and "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")


sampler = LikeLengths(lengths, effective_batch)
first_step = json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"] if checkpoint else 0
started = time.perf_counter()
with must_fit("a training step"):
    for trial, split in enumerate(training_args.splits):
        size, times, recompute = split
        by = f" in each of {training_args.world_size} processes" * (training_args.world_size > 1)
        why = "as set" if len(training_args.splits) == 1 else "the fastest" + " that fits" * (trial > 0)
        kept = "recomputed" if recompute else "kept"
        print(f"Training {size} x {times} samples a step{by}, activations {kept}: {why}")
        training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps = size, times
        training_args.gradient_checkpointing = recompute
        to_training(model, recompute)
        adapters = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        trainer = (guard.Trainer if guard else SFTTrainer)(
            model=model,
            processing_class=processor,
            args=training_args,
            data_collator=collate,
            train_dataset=train_set,
            eval_dataset=test_set if training_args.eval_strategy != "no" else None,
        )
        trainer._get_train_sampler, trainer.row_numbers = lambda *_: sampler, [*train_pixels]
        trainer.create_model_card = lambda **_: None  # it would not know the base model; report.py makes one that does
        if not in_notebook and not training_args.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(LossBar)
        # TRL rounds the adapters of a 4-bit model to bf16, where small updates are lost and fp16 training fails.
        for parameter, data in adapters:
            parameter.data = data.float()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            train = trainer.train(resume_from_checkpoint=checkpoint).metrics
            break
        except RuntimeError as error:
            together = training_args.world_size == 1 or "rehearsal" in str(error)
            if "out of memory" not in str(error) or split == training_args.splits[-1] or not together:
                raise
        # Only here, past the error, is what it was computing let go.
        print("\nThat takes more memory than there is; on with the next fastest:")
        model.zero_grad(set_to_none=True)
        if trainer.state.global_step:
            trainer._save_checkpoint(model, trial=None)
            checkpoint = outputs / f"checkpoint-{trainer.state.global_step}"
        trainer = None
        gc.collect()

train["train_runtime"] = time.perf_counter() - started
train["train_samples_per_second"] = (trainer.state.global_step - first_step) * effective_batch / train["train_runtime"]
train["samples"] = trainer.state.global_step * effective_batch  # also those from before a resumed run's checkpoint
train["log"] = trainer.state.log_history
if torch.cuda.is_available():
    train["peak_memory_gb"] = max(gather_object([torch.cuda.max_memory_reserved() / 1e9]))  # of one GPU

# %% [markdown]
# ## After
# The same image and the same scores again. Only what was held out can tell whether the model has learned to read.

# %%
to_inference(model)
stream_sample()
readings_after = read_test_set()
after = score(readings_after)
print(f"After training: CER {after['cer']:.3f}, exact match {after['exact_match']:.1%}")

# %% [markdown]
# ## Save
# The adapters and their processor, for PEFT and Unsloth to load; every held-out image with its readings; every number
# of the run. `report.py`, where it lies beside this file, makes a page to look at out of them, and `export.py` what was
# asked for beyond: merged weights, a GGUF file, a push to the hub.

# %%
weights = None
if sharded:  # put together what each process has of the adapters
    weights = {name: value.full_tensor() for name, value in model.named_parameters() if value.requires_grad}
training_args.distributed_state.destroy_process_group()
if training_args.process_index:
    sys.exit()  # the rest is for one process
packages = ["torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "pillow", "rapidfuzz"]
metrics = {
    "rows": len(truths),
    "test_split": test_split,
    "processes": training_args.world_size,
    "rows_of_seen_formulas": seen,
    "before": before,
    "after": after,
    "train": train,
    "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
    "settings": asdict(settings) | training_args.to_sanitized_dict(),
    "quantization": model.config.to_dict().get("quantization_config"),
    "versions": {name: version(name) for name in packages + ["unsloth", "unsloth_zoo"] * bool(FastVisionModel)},
}
processor.tokenizer.padding_side = "left"  # for whoever reads several images at once: answers follow the questions
with guard.saving(outputs, "the results") if guard else nullcontext(outputs) as results:
    model.save_pretrained(results / "adapter", state_dict=weights)
    processor.save_pretrained(results / "adapter")
    (results / "held_out").mkdir(exist_ok=True)
    predictions = []
    for row, truth, old, new, sample in zip(
        test_pixels, truths, readings_before, readings_after, test_set, strict=True
    ):
        image = f"held_out/{row}.png"
        sample["image"].save(results / image)
        predictions.append(json.dumps({"row": row, "image": image, "truth": truth, "before": old, "after": new}))
    (results / "predictions.jsonl").write_text("\n".join(predictions) + "\n", encoding="utf-8")
    (results / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

memory = f", {train['peak_memory_gb']:.1f} GB of GPU memory at most" if "peak_memory_gb" in train else ""
print(f"Trained in {train['train_runtime']:.0f} s, {train['train_samples_per_second']:.1f} samples/s{memory}.")
print(f"The adapter is in {outputs / 'adapter'}, all numbers in {outputs / 'metrics.json'}.")
if find_spec("report"):
    import report

    report.make(outputs)
if beyond:
    del model, trainer  # their memory is needed
    torch.cuda.empty_cache()
    export.run(outputs, **beyond)
