"""Takes what a run of finetune_qwen_vl.py has learned to where it is used.

    python export.py outputs --save_merged                                   # outputs/merged: one model, without PEFT
    python export.py outputs --save_gguf q8_0                                # outputs/merged_gguf: llama.cpp and Ollama
    python export.py outputs --push_to_hub true --hub_model_id owner/name    # the adapter, on the hub

The script calls this at its end for the options of the same names, in a process of its own: there the memory is free
again, and transformers is as everybody has it (Unsloth changes it).
"""

import argparse
import gc
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

for library in ("torchao", "bitsandbytes", "transformers.integrations"):  # they warn of what does not matter here
    logging.getLogger(library).setLevel(logging.ERROR)

# What Unsloth offers beside these is for other kinds of models, or needs a matrix of importances.
GGUF_TYPES = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
ROWS = 32  # held-out images that a merged model has to read as the adapters do
# How many of them, at least. Rounding to 16 bits can tip the balance between two tokens that are nearly as likely.
SHARE = {"float32": 1.0, "bfloat16": 0.95, "float16": 0.95}
# All that an adapter and its processor consist of. Whatever else lies in the folder is nobody's business.
SHARED = ["README.md", "adapter_config.json", "adapter_model.safetensors", "*token*.json", "*processor_config.json"]
SHARED += ["chat_template.j*", "vocab.json", "merges.txt"]


def prepare(settings, training_args):
    """What a run wants done at its end, checked, as options of `main`."""
    wanted = {"save_merged": settings.save_merged, "save_gguf": settings.save_gguf}
    if training_args.push_to_hub:
        wanted |= {name: getattr(training_args, name) for name in ("push_to_hub", "hub_model_id", "hub_private_repo")}
    check(**wanted)
    return wanted


def check(save_gguf=None, push_to_hub=False, hub_model_id=None, hub_private_repo=None, **_):
    """Ends the program with a sentence if what is asked for can't be done here. Makes the repository for a push."""
    if save_gguf and save_gguf not in GGUF_TYPES:
        sys.exit(f"--save_gguf takes one of {', '.join(GGUF_TYPES)}, not {save_gguf!r}.")
    if save_gguf:
        import torch

        if not (torch.cuda.is_available() and find_spec("unsloth")):
            sys.exit(
                "--save_gguf is done by Unsloth, which needs an NVIDIA GPU: there is none here. Without one, take "
                "--save_merged true, and give its folder to llama.cpp's convert_hf_to_gguf.py."
            )
    if push_to_hub:
        from httpx import HTTPError
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

        if not hub_model_id:
            sys.exit("--push_to_hub needs a name on the hub: --hub_model_id owner/name")
        try:
            HfApi().create_repo(hub_model_id, private=hub_private_repo, exist_ok=True)
        except HFValidationError as error:
            sys.exit(f"The hub takes no such name as {hub_model_id!r}: {first_line(error)}")
        except LocalTokenNotFoundError:
            sys.exit("You are not logged in to the hub: hf auth login, with a token that may write, or set HF_TOKEN.")
        except (HfHubHTTPError, HTTPError, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            what = "Log in with a token that may write there: hf auth login" if status in (401, 403) else "Try again"
            sys.exit(f"The hub does not let this run push to {hub_model_id}: {first_line(error)}. {what}.")


def run(outputs, **wanted):
    """Does in another process what `wanted` asks for, options as in `main`; ends the program if that fails."""
    command = [sys.executable, __file__, str(outputs)]
    for name, value in wanted.items():
        command += [f"--{name}", str(value)] if value else []
    sys.stdout.flush()
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)


def first_line(error):
    """What an error says, on one line, without the dot or the like at its end."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".!")


# ---------------------------------------------------------------------------------------------------------------------
# One model out of base and adapters
# ---------------------------------------------------------------------------------------------------------------------


def load_base(name, metrics, dtype, device):
    """The base model as the run had it: in 4 bits if it was trained on in 4 bits."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

    how = {"dtype": dtype, "device_map": {"": device}}
    if metrics["settings"]["load_in_4bit"] and not hasattr(AutoConfig.from_pretrained(name), "quantization_config"):
        how["quantization_config"] = BitsAndBytesConfig(**metrics["quantization"])
    model = AutoModelForImageTextToText.from_pretrained(name, **how)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):  # else some CPUs compute in bfloat16, whatever `dtype` says
            layer.support_avx512bf16_for_cpu = False
    return model


def read(model, processor, files, settings):
    """Reads images greedily, eight at a time, as the run's scores were taken. Returns their texts."""
    from PIL import Image

    content = [{"type": "text", "text": settings["instruction"]}, {"type": "image"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    texts = []
    model.eval()
    for start in range(0, len(files), 8):
        images = [[Image.open(file)] for file in files[start : start + 8]]
        inputs = processor(
            text=[prompt] * len(images),
            images=images,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(model.device, model.dtype)
        tokens = model.generate(
            **inputs, max_new_tokens=settings["max_new_tokens"], do_sample=False, repetition_penalty=1.0
        )
        texts += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def add_adapters(model, dtype):
    """Adds the adapters of a PeftModel to its weights, and returns it without PEFT, its weights of this dtype.

    Layer by layer, 4-bit weights are expanded to 32 bits, the adapters added, and the sum is rounded, once. Expanded to
    16 bits first, as is usual, a weight lies on a grid from which a small change does not move it: the change is lost.
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            if isinstance(base, Linear4bit):
                if dtype != torch.float32:
                    base.weight.quant_state.dtype = torch.float32
                linear = torch.nn.Linear(base.in_features, base.out_features, device="meta")
                linear.weight, linear.bias = torch.nn.Parameter(dequantize_bnb_weight(base.weight)), base.bias
                layer.base_layer = base = linear
            (adapter,) = layer.active_adapters
            merged = base.weight.data.float() + layer.get_delta_weight(adapter).float()
            if not merged.isfinite().all():
                raise ValueError("its adapters hold numbers that are none")
            base.weight.data = merged.to(dtype)
    model = model.unload()
    if any(isinstance(layer, Linear4bit) for layer in model.modules()):
        model = model.dequantize(dtype=dtype)
    elif getattr(model, "is_loaded_in_4bit", False):
        model.hf_quantizer.remove_quantization_config(model)
    return model.to(dtype)


def merge(outputs, metrics, dtype=None):
    """Writes `outputs/merged`: base and adapters as one model with 16-bit weights (or as `dtype` says).

    The adapters were trained beside the 4-bit weights, so these, dequantized, are what they are added to: the original
    that was once rounded to 4 bits is another model, on which they read otherwise (README). It only counts once the
    folder, loaded afresh, reads held-out images as the adapters do; until then it is called `merged.part`.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
    from transformers.integrations.bitsandbytes import Bnb4bitDeserialize

    settings, adapter = metrics["settings"], outputs / "adapter"
    trained_in = torch.bfloat16 if settings["bf16"] else torch.float16 if settings["fp16"] else torch.float32
    stored_in = getattr(torch, dtype) if dtype else torch.float16 if trained_in == torch.float32 else trained_in
    precise = torch.float32 if torch.float32 in (trained_in, stored_in) else trained_in
    dtype = str(stored_in).removeprefix("torch.")
    base_name = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]

    def unpacks(step):
        return any(isinstance(operation, Bnb4bitDeserialize) for operation in getattr(step, "operations", []))

    rows = [json.loads(line) for line in (outputs / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = rows[:ROWS]
    files = [outputs / row["image"] for row in rows]
    processor = AutoProcessor.from_pretrained(adapter)
    part, merged = outputs / "merged.part", outputs / "merged"

    torch.backends.cuda.enable_cudnn_sdp(False)  # as in the run: it plans anew for every size of an image or a text
    device = 0 if torch.cuda.is_available() else "cpu"
    model = PeftModel.from_pretrained(load_base(base_name, metrics, precise, device), adapter)
    by_adapters = read(model, processor, files, settings)
    with model.disable_adapter():
        by_base = read(model, processor, files, settings)
    as_base = sum(one == other for one, other in zip(by_adapters, by_base, strict=True))
    if as_base >= SHARE[dtype] * len(rows):  # it would pass for merged itself
        sys.exit(
            f"Not merged, as nothing could show that it worked: the base alone reads {as_base} of {len(rows)} held-out "
            "images as the adapters do. Train for longer."
        )
    for place in dict.fromkeys((device, "cpu")):  # in 16 bits a model can be too large for the GPU it was trained on
        del model
        gc.collect()
        torch.cuda.empty_cache()
        try:
            model = load_base(base_name, metrics, precise, place)
            in_4bit = getattr(model, "is_loaded_in_4bit", False)
            model = add_adapters(PeftModel.from_pretrained(model, adapter), stored_in)
            break
        except torch.OutOfMemoryError:
            if place == "cpu":
                raise
            model = None
    if in_4bit:
        # transformers can't undo the unpacking of 4-bit weights, and so would not save them; no need to.
        model._weight_conversions = [step for step in model._weight_conversions if not unpacks(step)]
    # The base's own habits (Qwen's: to sample, and to avoid what it has already written) are not how formulas are read.
    ends = {name: getattr(model.generation_config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    ends = {f"{name}_token_id": value for name, value in ends.items() if value is not None}
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=1024, **ends)
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor.save_pretrained(part)
    del model
    gc.collect()
    torch.cuda.empty_cache()

    merged_model = AutoModelForImageTextToText.from_pretrained(part, dtype="auto", device_map="auto")
    by_merged = read(merged_model, processor, files, settings)
    same = sum(one == other for one, other in zip(by_adapters, by_merged, strict=True))
    base_kind = f"{base_name}, its 4-bit weights dequantized" if in_4bit else f"{base_name}, as it is"
    said = f"it reads {same} of {len(rows)} held-out images as the adapters do, the base alone {as_base}"
    if same < SHARE[dtype] * len(rows):
        sys.exit(
            f"Not merged: {said}; {SHARE[dtype]:.0%} are needed. What was made is in {part}, not to be used."
            + f" If only the rounding to {dtype} is to blame, this helps: export.py {outputs} --save_merged --dtype "
            "float32" * (dtype != "float32")
        )
    shutil.rmtree(merged, ignore_errors=True)
    part.replace(merged)
    print(f"Merged into {merged}, in {dtype} ({base_kind}): {said}.")


# ---------------------------------------------------------------------------------------------------------------------
# GGUF, and the hub
# ---------------------------------------------------------------------------------------------------------------------


def to_gguf(merged, kind):
    """Lets Unsloth turn the folder `merged` into GGUF files, in `merged_gguf` beside it."""
    from unsloth import FastVisionModel

    try:
        model, processor = FastVisionModel.from_pretrained(str(merged), load_in_4bit=False)
        model.save_pretrained_gguf(str(merged), processor, quantization_method=kind)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(
            f"Unsloth could not make a GGUF file: {first_line(error)}. It needs llama.cpp, which it downloads or "
            f"builds (network, git, cmake, a compiler), or finds where UNSLOTH_LLAMA_CPP_PATH says. {merged} is whole."
        )
    print(f"The GGUF files are in {merged}_gguf.")


def push(outputs, metrics, name):
    """Uploads the adapter, its processor and its model card, and nothing else, to the repository `name`.

    Of paths on this machine that the files name, only the last part is shown.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    base = json.loads((outputs / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    base = base["base_model_name_or_path"]
    paths = (Path(name) for name in (base, metrics["settings"]["dataset_name"]))
    names = {str(path): path.name for path in paths if path.name and (path.is_absolute() or ".." in path.parts)}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(outputs / "adapter", folder, dirs_exist_ok=True)
        for file in Path(folder).iterdir():
            if file.suffix in (".md", ".json"):
                text = file.read_text(encoding="utf-8")
                for path, shown in names.items():
                    text = text.replace(path, shown)
                file.write_text(text, encoding="utf-8")
        try:
            commit = HfApi().upload_folder(
                repo_id=name, folder_path=folder, allow_patterns=SHARED, commit_message="LoRA adapters for LaTeX OCR"
            )
        except (HfHubHTTPError, HTTPError, OSError) as error:
            sys.exit(f"Could not push to {name}: {first_line(error)}. {outputs / 'adapter'} is whole; try again.")
    print(f"Pushed to {commit.repo_url}")


def main():
    def true_or_false(text):
        return {"true": True, "false": False}[text.lower()]

    parser = argparse.ArgumentParser(usage="%(prog)s FOLDER [--OPTION VALUE ...]", allow_abbrev=False)
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("outputs", type=Path, help="the --output_dir of a run")
    flag = {"type": true_or_false, "nargs": "?", "const": True, "default": False, "metavar": "true|false"}
    parser.add_argument("--save_merged", **flag, help="write base and adapters as one model to FOLDER/merged")
    parser.add_argument(
        "--dtype", choices=SHARE, help="how merged weights are stored (as trained; float16 if in 32 bits)"
    )
    parser.add_argument(
        "--save_gguf", choices=GGUF_TYPES, help="write FOLDER/merged_gguf too, for llama.cpp and Ollama"
    )
    parser.add_argument("--push_to_hub", **flag, help="upload the adapter, its processor and its model card")
    parser.add_argument("--hub_model_id", help="where to, owner/name")
    parser.add_argument("--hub_private_repo", **flag, help="make that repository a private one")
    wanted = parser.parse_args()
    if not (wanted.save_merged or wanted.save_gguf or wanted.push_to_hub):
        parser.error("nothing to do: --save_merged, --save_gguf q8_0 or --push_to_hub (--help says more)")
    outputs = wanted.outputs
    try:
        metrics = json.loads((outputs / "metrics.json").read_text(encoding="utf-8"))
        check(**vars(wanted))
        if wanted.push_to_hub:  # first, because it is soon done
            push(outputs, metrics, wanted.hub_model_id)
        if wanted.save_merged or (wanted.save_gguf and not (outputs / "merged").is_dir()):
            merge(outputs, metrics, wanted.dtype)
        if wanted.save_gguf:
            to_gguf(outputs / "merged", wanted.save_gguf)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"There is no finished run in {outputs}, or its base model is not at hand: {first_line(error)}")
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        sys.exit("The memory does not suffice: a merge takes 2 bytes a parameter (7B: 17 GB), on the GPU or in RAM.")


if __name__ == "__main__":
    main()
