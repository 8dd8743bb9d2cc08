"""Kernels: one launch in place of a dozen, where Unsloth has one for what a model computes, and it is not used yet.

`models` has a model that Unsloth has loaded use them. Each kind is tried on random numbers first, forward and backward:
where it computes something else than the model does, that part of the model stays as it is.
"""

import sys
from functools import partial

import torch
from peft.tuners.lora import LoraLayer

from qwen_vl_kit.sentences import first_line

ROUNDING = 0.03  # how far a result may be off, as a share: both round to 16 bits, at other places


def lora(layer):
    """A layer with LoRA, by Unsloth's kernel for text models."""
    from unsloth.kernels.fast_lora import LoRA_W
    from unsloth.kernels.utils import get_lora_parameters_bias

    def forward(x):
        weight, quantization, a, b, scale, bias = get_lora_parameters_bias(layer)
        y = LoRA_W.apply(x[None] if x.dim() == 2 else x, weight, quantization, a, b, scale).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    return forward


def mlp(part):
    """An MLP whose three layers have LoRA; its largest tensor is computed again rather than kept. For training."""
    from unsloth.kernels import apply_lora_mlp_swiglu

    usual = part.forward
    return lambda x: apply_lora_mlp_swiglu(part, x, inplace=False) if torch.is_grad_enabled() else usual(x)


def norm(part):
    from unsloth.kernels import fast_rms_layernorm

    return partial(fast_rms_layernorm, part)


def rotate(query, key, cos, sin, unsqueeze_dim=1):
    """Rotates queries and keys, (rows, heads, tokens, size), by angles of (rows, tokens, size)."""
    from unsloth.kernels.rope_embedding import Fast_RoPE_Embedding

    def rotated(part):
        part = part.transpose(1, 2)  # as the layer before has written it: it can be rotated in its place
        flat = part.reshape(1, -1, *part.shape[2:])
        angles = (angle.reshape(-1, angle.shape[-1]) for angle in (cos, sin))
        return Fast_RoPE_Embedding.apply(flat, *angles).view(part.shape).transpose(1, 2)

    return rotated(query), rotated(key)


def is_mlp(part):
    layers = [getattr(part, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(isinstance(layer, LoraLayer) for layer in layers) and "SiLU" in type(part.act_fn).__name__


def is_norm(part):
    return type(part).__name__.endswith("RMSNorm") and hasattr(part, "variance_epsilon")


def difference(new, usual, inputs):
    """Why a function can't take the place of another, or None: its outputs and gradients are the same but for rounding.

    Both are given `inputs`, and the gradients are those of them.
    """
    results = []
    try:
        for function in (new, usual):
            given = [tensor.detach().clone().requires_grad_() for tensor in inputs]
            outputs = function(*(tensor * 1 for tensor in given))  # a kernel can write into what it gets
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.manual_seed(0)
            torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
            results.append([*outputs, *(tensor.grad for tensor in given)])
    except Exception as error:  # of compilers and drivers that it was not tried with, anything
        return f"which fails here ({first_line(error)})"
    pairs = [(one.detach().float(), other.detach().float()) for one, other in zip(*results, strict=True)]
    alike = all(float((one - other).norm() / other.norm()) < ROUNDING for one, other in pairs)
    return None if alike else "which does not compute the same"


def install(model, dtype):
    """Has the parts of a model use the kernels. Returns a function that has them be as they were."""
    changed, device = [], next(model.parameters()).device

    def change(parts, kernel, width):
        """Gives `parts`, all of one class, a forward of `kernel`, if that does the same on random numbers."""
        numbers = torch.randn(2, 16, width, device=device, dtype=dtype)
        if why := difference(kernel(parts[0]), parts[0].forward, [numbers]):
            print(f"Without the kernel for {type(parts[0]).__name__}, {why}")
            return
        for part in parts:
            changed.append((part, vars(part).get("forward")))
            part.forward = kernel(part)

    with torch.random.fork_rng(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for layer in [part for part in model.modules() if isinstance(part, LoraLayer)]:
            changed.append((layer, vars(layer).get("forward")))
            layer.forward = lora(layer)
        for parts in by_class(model, is_mlp):
            change(parts, mlp, parts[0].gate_proj.in_features)
        for parts in by_class(model, is_norm):
            change(parts, norm, len(parts[0].weight))
        modules = {type(part).__module__ for part in model.modules() if type(part).__name__ in ROTATED}
        rotations = [module for module in map(sys.modules.get, modules) if rotates_alike(module, device, dtype)]
    model.zero_grad(set_to_none=True)
    usual = [module.apply_rotary_pos_emb for module in rotations]
    for module in rotations:
        module.apply_rotary_pos_emb = rotate

    def restore():
        for part, forward in reversed(changed):
            del part.forward
            if forward:
                part.forward = forward
        for module, function in zip(rotations, usual, strict=True):
            module.apply_rotary_pos_emb = function

    return restore


def by_class(model, belongs):
    """Lists of those parts of a model that `belongs` takes, each of one class and size."""
    found = {}
    for part in filter(belongs, model.modules()):
        found.setdefault((type(part), next(part.parameters()).shape), []).append(part)
    return found.values()


def rotates_alike(module, device, dtype):
    """Whether attention of this module rotates as the kernel does."""
    angles = torch.randn(2, 8, 64, device=device).repeat(1, 1, 2)
    how = {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
    inputs = [torch.randn(2, 8, heads, 128, device=device, dtype=dtype) for heads in (8, 4)]

    def through(function):
        return lambda query, key: function(query.transpose(1, 2), key.transpose(1, 2), **how)

    why = difference(through(rotate), through(module.apply_rotary_pos_emb), inputs)
    if why:
        print(f"Without the kernel for rotations, {why}")
    return not why


ROTATED = ("Qwen2VLAttention", "Qwen2_5_VLAttention")  # their angles are (rows, tokens, size), the halves alike
