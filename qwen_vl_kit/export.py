"""Takes what a run has learned to where it is used: merged weights, GGUF files, the hub.

    python -m qwen_vl_kit export outputs --save_merged                            # outputs/merged, without PEFT
    python -m qwen_vl_kit export outputs --save_gguf q8_0                         # outputs/merged_gguf, for llama.cpp
    python -m qwen_vl_kit export outputs --push_to_hub --hub_model_id owner/name  # the adapter, on the hub

Wraps `save`: when that has written the adapter, this does what the options of the same names ask for, in a process of
its own. There the memory is free again, and transformers is unpatched (Unsloth patches it). `prepare` reports what
can't be done before anything is loaded. Wraps `load_model`: whether the disk can hold it is known when that has been.
"""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath

from qwen_vl_kit import run as this_run
from qwen_vl_kit.arguments import Parser, add_flag
from qwen_vl_kit.finished import (
    HUB_NAME,
    NOTE,
    adapter_of,
    adapter_sums,
    last_part,
    local_names,
    metrics_of,
    not_finished,
    not_made_of,
    note_of,
    parsed,
    predictions_of,
    text_of,
)
from qwen_vl_kit.loading import SHARED, base_of, greedy, how_of, load_with_adapter, write_how
from qwen_vl_kit.sentences import first_line, told

# And the bytes per parameter that one takes on the disk: the last three are made of an f16 one, which lies beside them.
# What Unsloth offers beside these is for other kinds of models, or needs an importance matrix.
GGUF_TYPES = {"f16": 2, "bf16": 2, "q8_0": 1.1, "q6_k": 2.9, "q5_k_m": 2.8, "q4_k_m": 2.7}
ROWS = 32  # held-out images that a merged model has to read as the adapter does
# How many of them, at least. Rounding to 16 bits can tip the balance between two tokens that are nearly as likely.
SHARE = {"float32": 1.0, "bfloat16": 0.95, "float16": 0.95}
VOCABULARY = ["tokenizer.json", "vocab.json"]  # whatever looks like a path in there is a token


def prepare(options, extra):
    """What a run wants done at its end, as arguments of `run`, once it is clear that it can be done.

    `options` are the trainer's arguments (push_to_hub, hub_model_id, hub_private_repo), `extra` has save_merged and
    save_gguf. Ends the program with a sentence if something can't be done.
    """
    wanted = {"save_merged": extra.save_merged, "save_gguf": extra.save_gguf}
    if options.push_to_hub:
        wanted |= {name: getattr(options, name) for name in ("push_to_hub", "hub_model_id", "hub_private_repo")}
    wanted = {name: value for name, value in wanted.items() if value}
    check(**wanted)
    if options.push_to_hub and options.hub_strategy != "end":
        sys.exit(
            f"--hub_strategy {options.hub_strategy.value} has the trainer upload all of {options.output_dir}, with "
            "images and names of folders on this machine: leave it out. The adapter is pushed at the end."
        )
    if options.push_to_hub:
        make_repository(options.hub_model_id, options.hub_private_repo)
    return wanted


def check(save_gguf=None, push_to_hub=False, hub_model_id=None, **_):
    """Ends the program with a sentence if what is asked for can't be done here."""
    if save_gguf:
        check_gguf(save_gguf)
    if push_to_hub and not hub_model_id:
        sys.exit("--push_to_hub needs a name on the hub: --hub_model_id owner/name")


def check_gguf(kind):
    import torch

    if kind not in GGUF_TYPES:
        sys.exit(f"--save_gguf takes one of {', '.join(GGUF_TYPES)}, not {kind!r}.")
    if not (torch.cuda.is_available() and find_spec("unsloth")):
        sys.exit(
            "--save_gguf needs Unsloth, which needs an NVIDIA GPU: one of them is missing here. Instead, use "
            "--save_merged true, and convert its folder with llama.cpp's convert_hf_to_gguf.py."
        )


def make_repository(name, private):
    """Makes the repository `name`, if there is none, and returns its full name.

    Ends the program with a sentence if it can't be written to. That takes a question of its own: of a repository that
    is there already, `create_repo` says nothing, neither that the token may only read nor that it is a public one.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    from qwen_vl_kit import hub

    with told(f"The hub does not accept the name {name!r}", HFValidationError):
        validate_repo_id(name)
    if not hub.online:
        sys.exit("--push_to_hub needs the network, but HF_HUB_OFFLINE is set: unset it, or push later.")
    if not get_token():
        sys.exit("You are not logged in to the hub: run hf auth login with a write token, or set HF_TOKEN.")
    api = HfApi()

    def get():
        full = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        try:
            api.auth_check(full, write=True)
        except RepositoryNotFoundError:
            raise
        except HfHubHTTPError as error:
            if error.response.status_code != 404:  # a hub without that question
                raise
        return full, private and not api.repo_info(full).private

    try:
        full, public = hub.patiently(name, get, cached=False)
    except ConnectionError as error:
        sys.exit(
            f"The hub ({constants.ENDPOINT}) can't be reached: {first_line(error)}. Check the network (behind a proxy, "
            "set HTTPS_PROXY), and try again."
        )
    except HfHubHTTPError as error:
        what = {
            401: "The hub does not know this token. Log in again with a write token: hf auth login, or set HF_TOKEN",
            403: f"This token may not write to {name}. Log in with one that may: hf auth login, or set HF_TOKEN",
        }
        status = 403 if isinstance(error, RepositoryNotFoundError) else error.response.status_code
        sys.exit(f"{what.get(status, f'The hub refuses a push to {name}')} ({first_line(error)}).")
    if public:
        sys.exit(f"{full} is public, and --hub_private_repo asks for a private one: make it private on the hub first.")
    return full


def check_room(outputs, parameters, dtype="float16", save_merged=False, save_gguf=None, **_):
    """Ends the program if the disk can't hold what is asked for of a model of so many parameters.

    A merge that is there stays until the new one is whole; what a failed one has left goes first.
    """
    merged = {"float32": 4}.get(dtype, 2) * save_merged
    needed = parameters * (merged + GGUF_TYPES.get(save_gguf, 0)) / 1e9
    left = sum(file.stat().st_size for file in (outputs / "merged.part").glob("*"))
    free = (shutil.disk_usage(outputs).free + left) / 1e9
    if needed > free:
        what = " and ".join(["the merged model"] * bool(save_merged) + ["GGUF files"] * bool(save_gguf))
        sys.exit(
            f"Not enough disk space in {outputs} for {what}: {needed:.2f} GB are needed, {free:.2f} GB are free. Make "
            "room, or leave that for later: it can be made of the adapter at any time."
        )


def load_model(step, options, *arguments, **more):
    model = step(options, *arguments, **more)
    if this_run.exports:
        merging = any(this_run.exports.get(name) for name in ("save_merged", "save_gguf"))
        parameters = model.get_nb_trainable_parameters()[1]
        check_room(Path(options.output_dir), parameters, **this_run.exports | {"save_merged": merging})
    return model


def save(step, outputs, predictions, metrics):
    step(outputs, predictions, metrics)
    for sentence in outdated(outputs, **this_run.exports):
        print(sentence)
    if this_run.exports:
        from qwen_vl_kit.memory import leave_gpu

        leave_gpu(this_run.model)
        run(outputs, **this_run.exports)


def outdated(outputs, save_merged=False, save_gguf=None, **_):
    """A sentence for each folder beside the adapter that was made of another one, and is not asked for now."""
    kinds = note_of(outputs / "merged_gguf").get("types", ["q8_0"])
    for name, asked, options in (
        ("merged", save_merged or save_gguf, "--save_merged"),
        ("merged_gguf", save_gguf, f"--save_gguf {kinds[0]}"),
    ):
        if (outputs / name).is_dir() and not asked and (why := not_made_of(outputs, name)):
            yield f"{why}. To make it anew: {command_for(outputs, options)}"


def run(outputs, **wanted):
    """Does what `wanted` asks for in a process of its own, options as in `main`; ends the program if that fails."""
    command = [sys.executable, "-m", __package__, "export", str(outputs)]
    command += [word for name, value in wanted.items() if value for word in (f"--{name}", str(value))]
    # The package need not be installed, nor lie in the working directory.
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    sys.stdout.flush()
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}).returncode
    if code:
        sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# One model out of base and adapter
# ---------------------------------------------------------------------------------------------------------------------


def merge(outputs, metrics, dtype=None):
    """Writes `outputs/merged`: base and adapter as one model with 16-bit weights (or as `dtype` says).

    The adapter was trained beside the 4-bit weights, so these, dequantized, are what it is added to: the original,
    before rounding to 4 bits, is a different model, on which it reads differently (docs/use.md). The folder only counts
    once it reads held-out images, loaded afresh, as the adapter does; until then it is called `merged.part`.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)  # as in the run: it plans anew for every size of an image or a text
    made_of = adapter_sums(outputs)
    base, files, processor = sources(outputs)
    reader = partial(read, processor=processor, files=files, settings=metrics["settings"])
    computed, stored = precisions(metrics["settings"], dtype)
    how = how_of(metrics)
    load = partial(load_with_adapter, base, outputs / "adapter", how, computed)
    by_adapter, base_agrees = read_unmerged(load, reader)
    name = str(stored).removeprefix("torch.")
    if base_agrees >= SHARE[name] * len(files):  # the base would pass for the merged model
        sys.exit(
            f"Not merged, as a check would prove nothing: the base alone reads {base_agrees} of {len(files)} "
            "held-out images as the adapter does. Train for longer."
        )
    kind = save_merged(load, stored, processor, outputs / "merged.part")
    if adapter_sums(outputs) != made_of:
        shutil.rmtree(outputs / "merged.part")
        sys.exit(f"Not merged: another run has replaced {outputs / 'adapter'} meanwhile. Merge again.")
    agrees = agreement(by_adapter, read_merged(outputs / "merged.part", reader))
    said = f"it reads {agrees} of {len(files)} held-out images as the adapter does, the base alone {base_agrees}"
    if agrees < SHARE[name] * len(files):
        again = command_for(outputs, "--save_merged --dtype float32")
        instead = f"If only the rounding to {name} is to blame, this helps: {again}"
        sys.exit(
            f"Not merged: {said}; {SHARE[name]:.0%} are needed. The result is in {outputs / 'merged.part'}; do not "
            "use it." + f" {instead}" * (name != "float32")
        )
    note = made_of | {"base": last_part(base) if Path(base).exists() else base, "dtype": name}
    (outputs / "merged.part" / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    write_how(outputs / "merged.part", how)
    shutil.rmtree(outputs / "merged", ignore_errors=True)
    (outputs / "merged.part").replace(outputs / "merged")
    print(f"Merged into {outputs / 'merged'}, in {name} ({base}, {kind}): {said}.")


def why_merge(outputs, dtype):
    """Why `outputs/merged` can't stand for the adapter beside it in this dtype (None: in any), in words; or None."""
    from safetensors import SafetensorError, safe_open

    merged = outputs / "merged"
    if why := not_made_of(outputs):
        return why
    if dtype and (stored := note_of(merged).get("dtype")) != dtype:
        return f"{merged} is in {stored}"
    try:  # reads the headers, and sees whether files are as long as these say
        for file in [*merged.glob("*.safetensors")] or [merged / "model.safetensors"]:
            with safe_open(file, "numpy"):
                pass
    except (OSError, SafetensorError) as error:
        return f"{merged} is damaged ({first_line(error)})"
    return None


def command_for(outputs, options):
    return f"python -m {__package__} export {shlex.quote(str(outputs))} {options}"


def parameters_of(model):
    """How many parameters a base model, stored in whatever way, or a merged one has. Nothing is loaded for that."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model)).num_parameters()


def sources(outputs):
    """What a merge starts from: the base model's name, the held-out images to check it by, the processor."""
    from transformers import AutoProcessor

    base = base_of(outputs / "adapter")
    files = [outputs / row["image"] for row in predictions_of(outputs)[:ROWS]]
    for file in files:
        if not file.is_file():
            not_finished(outputs, file)
    with told(f"The processor in {outputs / 'adapter'} is damaged", OSError, ValueError):
        return base, files, AutoProcessor.from_pretrained(outputs / "adapter")


def precisions(settings, dtype):
    """What is computed in, as in training, and what the merged weights are stored in."""
    import torch

    trained = torch.bfloat16 if settings["bf16"] else torch.float16 if settings["fp16"] else torch.float32
    stored = getattr(torch, dtype) if dtype else torch.float16 if trained == torch.float32 else trained
    return torch.float32 if torch.float32 in (trained, stored) else trained, stored


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


def agreement(texts, others):
    return sum(one == other for one, other in zip(texts, others, strict=True))


def read_unmerged(load, reader):
    """What is read with the adapter, and how much of it the base alone reads alike."""
    import torch

    model = load(0 if torch.cuda.is_available() else "cpu")
    texts = reader(model)
    with model.disable_adapter():
        return texts, agreement(texts, reader(model))


def read_merged(folder, reader):
    from transformers import AutoModelForImageTextToText

    from qwen_vl_kit.memory import free_memory

    free_memory()
    return reader(AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", device_map="auto"))


def save_merged(load, dtype, processor, part):
    """Writes the merged model and its processor to the folder `part`. Returns what its base was, in words."""
    from safetensors import SafetensorError

    model, was_in_4bit = merged_model(load, dtype)
    model.generation_config = greedy(model.generation_config)
    shutil.rmtree(part, ignore_errors=True)
    free, needed = shutil.disk_usage(part.parent).free / 1e9, model.num_parameters() * dtype.itemsize / 1e9
    try:
        model.save_pretrained(part)
        processor.save_pretrained(part)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)  # others need the disk, too
        sys.exit(f"Could not write {part}: {first_line(error)}. {needed:.2f} GB are needed, {free:.2f} GB were free.")
    return "its 4-bit weights dequantized" if was_in_4bit else "as it is"


def merged_model(load, dtype):
    """Base and adapter as one model, and whether the base was in 4 bits; on the CPU if the GPU has not enough memory.

    In 16 bits a model can be too large for the GPU that it was trained on.
    """
    import torch

    from qwen_vl_kit.memory import free_memory

    for device in (0, "cpu") if torch.cuda.is_available() else ("cpu",):
        free_memory()  # of what was loaded before, and of what failed
        try:
            model = load(device)
            was_in_4bit = getattr(model.get_base_model(), "is_loaded_in_4bit", False)
            return never_quantized(add_adapters(model, dtype)), was_in_4bit
        except torch.OutOfMemoryError:
            if device == "cpu":
                raise
            model = None


def add_adapters(model, dtype):
    """Adds the adapters of a PeftModel to its weights, and returns it without PEFT, its weights of this dtype.

    Layer by layer, 4-bit weights are expanded to 32 bits, the adapters added, and the sum is rounded, once. Expanded to
    16 bits first, as is usual, a weight lies on a grid from which a small change does not move it: the change is lost.
    """
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.base_layer = in_32_bits(layer.get_base_layer(), dtype)
            (adapter,) = layer.active_adapters
            merged = layer.base_layer.weight.data.float() + layer.get_delta_weight(adapter).float()
            if not merged.isfinite().all():
                raise FloatingPointError("the adapter has NaN or infinite weights")
            layer.base_layer.weight.data = merged.to(dtype)
    model = model.unload()
    if any(isinstance(layer, Linear4bit) for layer in model.modules()):
        model = model.dequantize(dtype=dtype)
    elif getattr(model, "is_loaded_in_4bit", False):
        model.hf_quantizer.remove_quantization_config(model)
    return model.to(dtype)


def in_32_bits(layer, dtype):
    """A linear layer whose 4-bit weights are expanded; any other is returned as it is."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    if not isinstance(layer, Linear4bit):
        return layer
    if dtype != torch.float32:
        layer.weight.quant_state.dtype = torch.float32
    linear = torch.nn.Linear(layer.in_features, layer.out_features, device="meta")
    linear.weight, linear.bias = torch.nn.Parameter(dequantize_bnb_weight(layer.weight)), layer.bias
    return linear


def never_quantized(model):
    """The same weights in a model that is built from the config: it is saved under the base's own names.

    A model that was loaded in 4 bits remembers how its weights were unpacked, and can't be saved: transformers would
    undo that, and can't (5.17, `NotImplementedError` from `Bnb4bitDeserialize.reverse_op`).
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        built = AutoModelForImageTextToText.from_config(model.config)
    built.load_state_dict(model.state_dict(), assign=True)
    built.generation_config = model.generation_config
    return built


# ---------------------------------------------------------------------------------------------------------------------
# GGUF, and the hub
# ---------------------------------------------------------------------------------------------------------------------


def to_gguf(outputs, kind):
    """Lets Unsloth turn `outputs/merged` into GGUF files, in `merged_gguf` beside it.

    Those of another adapter go when the new ones are there: lying side by side, they would be taken for one model's.
    """
    from unsloth import FastVisionModel

    merged, folder = outputs / "merged", outputs / "merged_gguf"
    of_another = not_made_of(outputs, folder.name)
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.gguf")}
    types = {kind} if of_another else {kind, *note_of(folder).get("types", [])}
    if of_another:  # from here on, files of both may lie there
        (folder / NOTE).unlink(missing_ok=True)
    try:
        model, processor = FastVisionModel.from_pretrained(str(merged), load_in_4bit=False)
        model.save_pretrained_gguf(str(merged), processor, quantization_method=kind)
    except (OSError, RuntimeError, ValueError) as error:
        if out_of_memory(error):
            raise
        sys.exit(
            f"Unsloth could not make a GGUF file: {first_line(error)}. It needs llama.cpp, which it downloads or "
            f"builds (network, git, cmake, a compiler), or finds where UNSLOTH_LLAMA_CPP_PATH says. {merged} is whole."
        )
    for file, written in before.items():
        if of_another and file.is_file() and file.stat().st_mtime_ns == written:
            print(f"Deleting {file}: it was not made of this adapter.")
            file.unlink()
    if not folder.is_dir():  # on Kaggle, Unsloth takes a larger disk if this one is too small, and says where
        return
    note = json.dumps(note_of(merged) | {"types": sorted(types)}, indent=2)
    (folder / NOTE).write_text(f"{note}\n", encoding="utf-8")
    print(f"The GGUF files are in {folder}.")


def push(outputs, metrics, name):
    """Uploads the adapter, its processor and its model card, and nothing else, to the repository `name`."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from qwen_vl_kit import hub

    contents = shared(outputs, metrics)

    def commit():  # with operations of its own: the library says not to use them twice
        files = [CommitOperationAdd(file, content) for file, content in contents.items()]
        return HfApi().create_commit(name, files, commit_message="LoRA adapters for LaTeX OCR")

    with told(f"Could not push to {name}", OSError, ValueError):
        print(f"Pushed to {hub.patiently(name, commit, cached=False).repo_url}")


def push_or_why_not(outputs, metrics, name, private):
    """Pushes; if that fails, returns a sentence that says why, and what to type to push again."""
    try:
        push(outputs, metrics, make_repository(name, private))
    except SystemExit as error:
        again = f"--push_to_hub --hub_model_id {shlex.quote(name)}" + " --hub_private_repo" * bool(private)
        return f"{error.code} The adapter is safe in {outputs / 'adapter'}. To push it: {command_for(outputs, again)}"


def shared(outputs, metrics):
    """What is uploaded, {name: file or content}. Of paths on this machine, it names the last part alone."""
    local, base = local_names(outputs, metrics), adapter_of(outputs)["base_model_name_or_path"]
    paths = {*local.values(), *(metrics["settings"][setting] for setting in local)}
    if "model_name_or_path" in local or not HUB_NAME.fullmatch(base):
        paths.add(base)
    paths |= {spell(path) for path in paths for spell in (os.path.normpath, os.path.abspath, os.path.realpath)}
    paths = {path for path in paths if len(PureWindowsPath(path).parts) > 1}  # no other names a folder
    contents = {}
    for file in sorted((outputs / "adapter").iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in SHARED):
            contents[file.name] = file
            if file.name == "README.md":
                contents[file.name] = card_without(paths, outputs, file)
            elif file.suffix == ".json" and file.name not in VOCABULARY:
                fields = parsed(file, text_of(outputs, file))
                if (clean := without(paths, fields)) != fields:
                    contents[file.name] = json.dumps(clean, indent=2, ensure_ascii=False).encode()
    return contents


def without(paths, value):
    """The same fields, at any depth; in their texts absolute paths, and these `paths`, are cut to their last part."""
    if isinstance(value, dict):
        return {key: without(paths, field) for key, field in value.items()}
    if isinstance(value, list):
        return [without(paths, field) for field in value]
    if not isinstance(value, str):
        return value
    if value in paths or re.fullmatch(r"(~|[A-Za-z]:)?[/\\]+[^/\\\n]+[/\\][^\n]*", value):
        return last_part(value)
    known = "|".join(map(re.escape, sorted(paths, key=len, reverse=True)))
    return re.sub(rf"(?<![\w./\\])({known})[^\s\"'<>]*", lambda found: last_part(found[0]), value) if known else value


def card_without(paths, outputs, file):
    """The model card as it lies there, with what people have added; made anew if it names one of these paths."""
    import yaml

    text = text_of(outputs, file)
    try:  # in YAML a path can be escaped, or go over two lines
        fields = json.dumps(yaml.safe_load(text.split("---\n")[1]), ensure_ascii=False) if "---\n" in text else ""
    except yaml.YAMLError:
        fields = ""
    if not any(path in text or path in fields for path in paths):
        return file
    from qwen_vl_kit import report

    print("The model card named folders of this machine: a new one is pushed.")
    with told("Could not make the model card", OSError):
        metrics, predictions, run = report.of_run(outputs)
        card = report.make_card(outputs, metrics, len(predictions), run)
    return card.encode()


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments, prog):
    what = "Merges, converts to GGUF or pushes to the hub what a run has learned."
    parser = Parser(prog, what, usage="%(prog)s FOLDER [--OPTION VALUE ...]")
    parser.add_argument("outputs", metavar="FOLDER", type=Path, help="the --output_dir of a run")
    add_flag(parser, "--save_merged", "write base and adapter as one model to FOLDER/merged")
    dtypes = "how merged weights are stored (default: as trained; float16 if that was in 32 bits)"
    parser.add_argument("--dtype", choices=SHARE, help=dtypes)
    ggufs = f"write FOLDER/merged_gguf, for llama.cpp and Ollama: {', '.join(GGUF_TYPES)}"
    parser.add_argument("--save_gguf", metavar="TYPE", help=ggufs)
    add_flag(parser, "--push_to_hub", "upload the adapter, its processor and its model card")
    parser.add_argument("--hub_model_id", metavar="OWNER/NAME", help="where to")
    add_flag(parser, "--hub_private_repo", "make that repository a private one")
    wanted = parser.parse_args(arguments)
    if not (wanted.save_merged or wanted.save_gguf or wanted.push_to_hub):
        parser.error("nothing to do: add --save_merged, --save_gguf q8_0 or --push_to_hub (see --help)")
    return wanted


def out_of_memory(error):
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error).lower())


def main(arguments, prog):
    wanted = parse(arguments, prog)
    for library in ("torchao", "bitsandbytes", "transformers.integrations"):  # they warn of what does not matter here
        logging.getLogger(library).setLevel(logging.ERROR)
    outputs, metrics = wanted.outputs, metrics_of(wanted.outputs)
    adapter_of(outputs)
    check(**vars(wanted))
    unpushed = None
    if wanted.push_to_hub:  # first, because it is soon done; what else is asked for needs no hub
        unpushed = push_or_why_not(outputs, metrics, wanted.hub_model_id, wanted.hub_private_repo)
    try:
        if wanted.save_merged or wanted.save_gguf:
            merge_and_convert(outputs, metrics, wanted)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        sys.exit("Not enough memory: a merge takes 2 bytes per parameter (7B: 17 GB) of GPU memory or RAM. Free some.")
    except FloatingPointError as error:
        sys.exit(f"Not merged: {first_line(error)}.")
    finally:
        if unpushed:
            print(unpushed, file=sys.stderr)
    if unpushed:
        sys.exit(1)


def merge_and_convert(outputs, metrics, wanted):
    """Makes `merged` of the adapter, if it is not, and the GGUF files of that."""
    dtype = str(precisions(metrics["settings"], wanted.dtype)[1]).removeprefix("torch.")
    merged = outputs / "merged"
    why = why_merge(outputs, dtype if wanted.save_merged else wanted.dtype)
    if why or wanted.save_gguf:
        parameters = parameters_of(base_of(outputs / "adapter") if why else merged)
        check_room(outputs, parameters, dtype, save_merged=bool(why), save_gguf=wanted.save_gguf)
    if why and merged.is_dir():
        print(f"{why}: merging anew.", flush=True)
    if why:
        merge(outputs, metrics, wanted.dtype)
    elif wanted.save_merged:
        print(f"{merged} was already made of this adapter, in {dtype}. To make it anew all the same, delete it.")
    if wanted.save_gguf:
        to_gguf(outputs, wanted.save_gguf)
