"""On a CPU: a step of a small model is many small operations, and some of them can be left out.

`models` and `reader` have a model use this. Weights in 4 bits are dequantized once, not at each use; what adapters add
is neither copied nor multiplied by 1. The results are the same, bit for bit.
"""

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch.nn import functional

MOST = 1e9  # bytes of dequantized weights: in larger models, dequantizing is little beside computing


class Product(torch.autograd.Function):
    """A linear layer with a frozen weight, its gradient computed as bitsandbytes computes it."""

    @staticmethod
    def forward(context, x, weight, bias):
        context.weight = weight
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(context, gradient):
        return torch.matmul(gradient, context.weight), None, None


def dequantized(layer):
    """A forward method for a layer in 4 bits that keeps its weight in the type that it computes in."""
    usual, packed = layer.forward, layer.weight
    weight = dequantize_4bit(packed.data, packed.quant_state).to(layer.compute_dtype)

    def forward(x):
        merged = layer.weight is not packed
        if merged or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            return usual(x)
        return Product.apply(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))

    return forward


def adapted(layer):
    """A forward method for a layer with LoRA, used where one adapter is on."""
    usual = layer.forward

    def forward(x, *arguments, **options):
        name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
        plain = name in layer.lora_A and name not in layer.lora_variant
        plain = plain and not (arguments or options or layer.disable_adapters or layer.merged)
        if not plain or x.dtype != layer.lora_A[name].weight.dtype or torch.is_autocast_enabled("cpu"):
            return usual(x, *arguments, **options)
        result, scale = layer.base_layer(x), layer.scaling[name]
        found = layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x)))
        return result + (found if scale == 1 else found * scale).to(result.dtype)

    return forward


def install(model):
    """Has a model on a CPU, its weights whole in this process, compute like that."""
    in_4_bits = [layer for layer in model.modules() if isinstance(layer, Linear4bit) and layer.compute_dtype]
    size = sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in in_4_bits)
    for layer in in_4_bits if size < MOST else ():
        layer.forward = dequantized(layer)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.forward = adapted(layer)
