"""Kernels, and the quirks of backends.

Wraps `load_model`: loading is 7 s faster with Unsloth, and so is each step and each reading on a GPU.
"""

import gc
import sys

import torch
from peft.tuners.lora import LoraLayer

from qwen_vl_kit import run


def fuse(layer):
    """Has a layer with LoRA computed by Unsloth's kernel for text models: a few launches instead of a dozen."""
    from unsloth.kernels.fast_lora import LoRA_W
    from unsloth.kernels.utils import get_lora_parameters_bias

    def forward(x):
        weight, quantization, a, b, scale, bias = get_lora_parameters_bias(layer)
        y = LoRA_W.apply(x[None] if x.dim() == 2 else x, weight, quantization, a, b, scale).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    layer.forward = forward


def load_model(step, options, *arguments, **more):
    # Unsloth collects garbage 18 times as it loads a model: 7 s, if all that was imported is looked through.
    gc.freeze()
    # Where PyTorch prefers cuDNN's attention (Hopper), it plans anew for every new size of an image or a text.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = step(options, *arguments, **more)
    run.model = model
    run.notes["quantization"] = model.config.to_dict().get("quantization_config")
    if sys.modules.get("unsloth") and not options.lora_dropout:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                fuse(layer)
    return model
