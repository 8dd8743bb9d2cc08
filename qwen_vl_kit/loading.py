"""Loads a model that reads: what a run has left, an adapter, a merged or a base model, from a folder or the hub.

It wraps no step. `export` merges what it loads, `reader` reads with it. An adapter is put beside the base model that it
was trained beside, in 4 bits if that was: beside other weights it reads otherwise.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from qwen_vl_kit.finished import HUB_NAME, RECORD, adapter_in, metrics_of, not_made_of, parsed, text_of
from qwen_vl_kit.sentences import told

# How the script quantizes a base model that is not stored in 4 bits, where a run has not written it down.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
HOW = "reading.json"  # lies beside an adapter's weights, and those of a merge
# All that an adapter and its processor consist of. Whatever else lies in the folder is not pushed, and not fetched.
SHARED = ["README.md", "adapter_config.json", "adapter_model.safetensors", "*token*.json", "*processor_config.json"]
SHARED += ["chat_template.j*", "vocab.json", "merges.txt", HOW]
SETTINGS = {"instruction": str, "load_in_4bit": bool, "bf16": bool, "fp16": bool}
INSTRUCTION = "Write the LaTeX representation for this image."  # the script's, of models that don't say theirs


class Source(NamedTuple):
    """What a name on the command line stands for."""

    name: str  # as it was typed, or the folder in it that is taken
    model: str  # where the weights are: a folder or a hub name
    is_adapter: bool
    run: Path | None  # the folder of the run that it belongs to
    how: dict  # what `how_of` says of that run; empty if nothing is known


def how_of(metrics):
    """How a model of a run is asked and loaded: {"instruction", "load_in_4bit", "bf16", "fp16", "quantization"}."""
    return {name: metrics["settings"].get(name) for name in SETTINGS} | {"quantization": metrics.get("quantization")}


def checked(how, file):
    """The same, which `file` says; ends the program with a sentence if that lacks something, or has something else."""
    wrong = [name for name, kind in SETTINGS.items() if not isinstance(how.get(name), kind)]
    wrong += ["quantization"] * (not isinstance(how.get("quantization"), dict | None))
    if wrong:
        sys.exit(f"{file} is damaged, or of another version: it does not say {', '.join(wrong)}. Copy it again.")
    return how


def write_how(folder, how):
    (folder / HOW).write_text(json.dumps(how, indent=2) + "\n", encoding="utf-8")


def find(name, adapter=False):
    """The `Source` that `name` stands for: a run's folder, an adapter's, a model's, or a name on the hub.

    Of a run the merged model is taken if it was made of this adapter and fits, else, or if asked for, the `adapter`;
    which, it prints.
    Ends the program with a sentence if there is no such model.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return in_folder(name, folder)
        adapter_in(folder / "adapter", folder)
        why = not adapter and (not_made_of(folder) or too_large(folder / "merged"))
        taken = folder / ("adapter" if adapter or why else "merged")
        reason = f": {why}" if why and (folder / "merged").exists() else ""
        print(f"Reading with {taken}{reason}", file=sys.stderr)
        return in_folder(str(taken), taken)
    owner = folder.parent
    if not HUB_NAME.fullmatch(name) or (owner != Path() and owner.is_dir()):  # outputs/demoo is no name on the hub
        sys.exit(f"There is no folder {name}: name the --output_dir of a run, a model's folder, or a name on the hub.")
    return on_hub(name)


def in_folder(name, folder):
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter:
        adapter_in(folder, folder)
    run = folder.parent if (folder.parent / "metrics.json").is_file() else None
    how = {}
    if (folder / HOW).is_file():
        how = checked(parsed(folder / HOW, text_of(folder, folder / HOW)), folder / HOW)
    elif (folder / RECORD).is_file():  # a checkpoint
        how = checked(how_of(parsed(folder / RECORD, text_of(folder, folder / RECORD))), folder / RECORD)
    elif run and folder.name in ("adapter", "merged"):
        how = checked(how_of(metrics_of(run)), run / "metrics.json")
    return Source(name, str(folder), is_adapter, run, how)


def on_hub(name):
    from huggingface_hub import snapshot_download
    from transformers.utils.hub import cached_file

    from qwen_vl_kit import hub

    def get():
        try:
            cached_file(name, "config.json")
            how = cached_file(name, HOW, _raise_exceptions_for_missing_entries=False)
            return None, checked(json.loads(Path(how).read_text(encoding="utf-8")), f"{name}/{HOW}") if how else {}
        except OSError:
            cached_file(name, "adapter_config.json")
            return snapshot_download(name, allow_patterns=SHARED, ignore_patterns="*/*"), {}

    adapter, how = hub.load("model", name, get)
    if adapter:
        return in_folder(name, Path(adapter))._replace(name=name, run=None)
    return Source(name, name, False, None, how)


def too_large(merged):
    """Why a merged model can't be taken here, in words, or None: on a GPU it needs room for its 16 bits."""
    import torch

    size = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else size * 2
    if free < size * 1.2:
        return f"{merged} needs {size * 1.2 / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free"
    return None


def base_of(adapter):
    """The base model that the adapter names, a hub name or a folder. Ends the program if it is not at hand.

    A relative path is looked for where the run was started from, if that is this folder or one above the run's own.
    """
    from transformers import AutoConfig

    from qwen_vl_kit import hub

    name = adapter_in(adapter)["base_model_name_or_path"]
    places = [Path(), *adapter.resolve().parents]
    base = next((str(at / name) for at in places if (at / name / "config.json").is_file()), name)
    if Path(name).is_absolute() and not Path(name).exists():
        sys.exit(f"The base model {name} of this adapter was not found: put it back, or edit adapter_config.json.")
    tried = "" if Path(base).exists() else f" (no such folder in {Path.cwd()}, nor in one above {adapter})"
    with told(f"The base model {name!r} of this adapter was not found{tried}", OSError, ValueError):
        hub.patiently(base, lambda: AutoConfig.from_pretrained(base))
    return base


def load_processor(name):
    """The processor of a model or an adapter. As in the script, it is told that answers come without a thought."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(name)
    if "enable_thinking" in (processor.chat_template or ""):
        processor.chat_template = "{% set enable_thinking = false %}" + processor.chat_template
    return processor


def load_base(name, how, dtype, device):
    """The base model as the run had it: in 4 bits if it was trained on in 4 bits."""
    from bitsandbytes.nn import Linear4bit
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

    from qwen_vl_kit import hub

    more = {"dtype": dtype, "device_map": {"": device}}
    if how["load_in_4bit"] and not hasattr(AutoConfig.from_pretrained(name), "quantization_config"):
        more["quantization_config"] = BitsAndBytesConfig(
            **how["quantization"] or NF4 | {"bnb_4bit_compute_dtype": dtype}
        )
    with told(f"The base model {name} can't be loaded", OSError, SafetensorError):
        model = hub.patiently(name, lambda: AutoModelForImageTextToText.from_pretrained(name, **more))
    model.generation_config = greedy(model.generation_config)  # as in the run
    for layer in model.modules():
        if isinstance(layer, Linear4bit):  # else some CPUs compute in bfloat16, whatever `dtype` says
            layer.support_avx512bf16_for_cpu = False
    return model


def load_with_adapter(base, adapter, how, dtype, device):
    """The model as it was trained. Ends the program if the adapter was not made for this base."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    model = load_base(base, how, dtype, device)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # told below
            model = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        if isinstance(error, KeyError):
            sys.exit(f"{adapter / 'adapter_config.json'} is damaged: it lacks {error}. Copy the adapter again.")
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")  # PyTorch's first line names the class alone
        sys.exit(f"The adapter in {adapter} does not fit the base model {base}: {reason}.")
    with safe_open(adapter / "adapter_model.safetensors", "numpy") as file:
        missing = {*get_peft_model_state_dict(model)} - {*file.keys()}
    if missing:  # they would be what they start as, and the model would read as its base
        sys.exit(
            f"The adapter in {adapter} does not fit the base model {base}: {len(missing)} of its weights are missing, "
            f"such as {min(missing)}."
        )
    return model


def greedy(base):
    """How formulas are read, instead of the base's own habits (Qwen's: sampling, and a penalty on repetition)."""
    from transformers import GenerationConfig

    ends = {name: getattr(base, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    given = {name: value for name, value in ends.items() if value is not None}
    return GenerationConfig(do_sample=False, max_new_tokens=1024, **given)
