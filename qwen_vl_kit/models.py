"""The quirks of backends and architectures.

Wraps `load_processor` and `load_model`: loading is 7 s faster with Unsloth, and each step and each reading is faster. A
model that would not learn where an answer begins or ends is refused.
"""

import gc
import sys
from collections import Counter

import torch
from peft.tuners.lora import LoraLayer
from PIL import Image

from qwen_vl_kit import attention, kernels, on_cpu, run
from qwen_vl_kit.parallel import sharded
from qwen_vl_kit.sentences import fail, first_line

# Processors of models that fail in the middle, as of transformers 5.17, and why.
BROKEN = {
    "MiniCPMV4_6Processor": "transformers can't read images of several sizes at once with it",
    "DeepseekOcr2Processor": "PEFT does not find its adapters again when it is loaded",
}
KINDS = [(part, what) for part in ("vision", "language") for what in ("attention", "MLP")]


def rendered(processor, answer=None):
    """A question and, if given, its answer, as the chat template writes them."""
    chat = [{"role": "user", "content": [{"type": "text", "text": "QUESTION"}, {"type": "image"}]}]
    if answer:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return processor.apply_chat_template(chat, add_generation_prompt=not answer, tokenize=False)


def kind_of(name):
    """Which of KINDS the layer of this name is: all vision parts have "vis" in their names, all attention has "att"."""
    return "vision" if "vis" in name else "language", "attention" if "att" in name else "MLP"


def load_processor(step, options):
    processor = step(options)
    name = options.model_name_or_path
    if not processor.chat_template:
        return processor  # `hub` says so
    if not has_areas(processor.image_processor):
        if options.max_pixels or options.min_pixels not in (None, type(options).min_pixels):
            fail(f"{name} sizes images in its own way: leave out --min_pixels and --max_pixels.")
        print(f"{name} sizes images in its own way; --min_pixels is for models like Qwen2-VL")
    if why := BROKEN.get(type(processor).__name__):
        fail(f"{name} can't be trained: {why}. Choose another model.")
    prompt = rendered(processor)
    try:  # as the script asks
        image, how = Image.new("RGB", (160, 40), "white"), {"padding": True, "return_tensors": "pt"}
        processor(text=[prompt], images=[[image]], padding_side="left", add_special_tokens=False, **how)
    except Exception as error:  # of processors made for something else, anything
        fail(f"{name} can't be asked a question that shows an image: {first_line(error)}. Choose another model.")
    if prompt.count("<think>") > prompt.count("</think>"):
        fail(
            f"{name} opens a thought (<think>) before each answer, which the LaTeX would be part of: choose a model "
            "that answers directly (...-Instruct)."
        )
    if "<think>" in prompt:
        print(f"{name} can think first: here its template says that it has not, and the answer follows")
    return processor


def has_areas(image_processor):
    """Whether its `size` is the least and the largest area, in pixels, as with Qwen's; others mean edges by these."""
    size = image_processor.size or {}
    return "shortest_edge" in size and "longest_edge" in size and hasattr(image_processor, "merge_size")


def must_end(model, options):
    """Ends the run if answers would be trained to end with something that does not end a reading."""
    tokenizer = run.processor.tokenizer
    end = rendered(run.processor, "ANSWER").rpartition("ANSWER")[2].strip() or tokenizer.eos_token
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    if not {*tokenizer(end or "", add_special_tokens=False).input_ids} & {*stops}:
        fail(
            f"{options.model_name_or_path} ends its turns with {end!r}, where generating does not stop: add its token "
            "to eos_token_id in the model's generation_config.json."
        )


def load_model(step, options, dtype, *arguments, **more):
    # Unsloth collects garbage 18 times as it loads a model: 7 s, if all that was imported is looked through.
    gc.freeze()
    # Where PyTorch prefers cuDNN's attention (Hopper), it plans anew for every new size of an image or a text.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = step(options, dtype, *arguments, **more)
    must_end(model, options)
    run.model, run.trained = model, False
    run.notes["quantization"] = model.config.to_dict().get("quantization_config")
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    kinds = Counter(map(kind_of, adapted))
    vision = kinds["vision", "attention"] + kinds["vision", "MLP"]
    run.notes["adapted_layers"] = {"vision": vision, "language": len(adapted) - vision}
    print("Adapters on " + ", ".join(f"{kinds[kind] or 'no'} {kind[0]} {kind[1]}" for kind in KINDS) + " layers")
    attention.install(model)
    if model.device.type == "cpu" and not sharded:
        on_cpu.install(model)
    if sys.modules.get("unsloth") and not options.lora_dropout:
        run.usual_kernels = kernels.install(model, dtype)
    return model
