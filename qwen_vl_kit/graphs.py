"""CUDA graphs of training: on a fast GPU, a step waits for thousands of launches; a graph is launched once.

Wraps `load_model`, so that the model reads with graphs, too (`graph_reading`). `training` has its trainer attach those
of training: the layers of text and the blocks of the image encoder are two stacks, each recorded once for every size of
its input, forward and backward, and replayed from then on. Texts and images are padded to few sizes. What depends on
the data in Python (positions, where images go in the text, the loss) stays outside. Before the first step, loss and
gradients are compared with those of the model as it is.
"""

import sys
from contextlib import contextmanager

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

from qwen_vl_kit import graph_reading, kernels, run
from qwen_vl_kit.memory import TooLarge, free_memory, is_shortage
from qwen_vl_kit.sentences import fail, first_line

# Lengths are rounded up to a multiple of the first number, above the second of the last. A long run takes half of that:
# more sizes to record, and less padding to compute.
TOKENS, PATCHES = (64, 512, 128), (64, 512, 256)
LONG = 3000  # samples of a run
MOST = 32  # sizes that a stack keeps recorded
NOTHING_RANDOM = {"preserve_rng_state": False}  # asking for that state would end a recording
FEWEST_STEPS = 10  # in shorter runs, recording takes longer than it saves
LEAST_MEMORY = 20e9  # of the GPU: 22 GiB held the graphs of the 7B's default step; with less, smaller micro-batches
# How far loss and gradients may be from those of the model as it is, as a share. Rounding alone makes 0.01% and 5% in
# bf16 (7B, random weights, H200); a mask or a position that is wrong makes far more.
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.01, 0.1), torch.float16: (0.01, 0.1)}


def rounded(length, steps, long):
    """`length` rounded up to one of few sizes; `steps` is TOKENS or PATCHES, `long` whether the run is."""
    fine, limit, coarse = steps
    multiple = (fine if length <= limit else coarse) // (2 if long else 1)
    return -(-length // multiple) * multiple


class GraphsTooLarge(TooLarge):
    """The layout fits into memory, and its graphs don't."""


def unusable(model, options):
    """Why no graphs can be recorded for this run, as a part of a sentence, or None."""
    if not torch.cuda.is_available():
        return "they need an NVIDIA GPU"
    if options.world_size > 1:
        return "several processes train together"
    if options.lora_dropout:
        return "dropout draws new numbers in each step"
    if not any(type(part).__name__ in STACKS for part in model.modules()):
        return f"{model.config.model_type} is not an architecture that they are made for"
    return None


def load_model(step, options, *arguments, **more):
    model = step(options, *arguments, **more)
    if torch.cuda.is_available() and run.extra.cuda_graphs != "false":
        graph_reading.install(model)
    return model


def wanted(model, options, choice):
    """Whether a run is to use graphs; `choice` is --cuda_graphs. Ends the run if it can't do what that asks for."""
    why = unusable(model, options)
    if choice == "true" and why:
        fail(f"--cuda_graphs true can't be done: {why}. Leave it out.")
    if why and choice == "auto" and torch.cuda.is_available():
        print(f"Without CUDA graphs: {why}")
    if why or choice != "auto":
        return choice == "true"
    return options.max_steps >= FEWEST_STEPS and torch.cuda.mem_get_info()[1] > LEAST_MEMORY


# ---------------------------------------------------------------------------------------------------------------------
# Stacks: layers whose shapes depend on nothing in the data
# ---------------------------------------------------------------------------------------------------------------------


class Text(nn.Module):
    """The decoder layers of a text model. Texts are padded on the right, so attention need not know the padding."""

    def __init__(self, model):
        super().__init__()
        self.layers = model.layers

    def layer(self, layer, hidden, cos, sin):
        # Not layer(...), which would recompute by itself.
        return nn.Module.__call__(
            layer, hidden, attention_mask=None, position_embeddings=(cos, sin), past_key_values=None, use_cache=False
        )


class Vision(nn.Module):
    """The blocks of an image encoder: hidden states (images * patches, width), padded, and which patches are real."""

    def __init__(self, model):
        super().__init__()
        self.layers = model.blocks

    def rotate(self, query, key, cos, sin):
        """Rotates queries and keys, (patches, heads, size), in 32 bits, as the model does."""
        if not (query.is_cuda and sys.modules.get("unsloth")):
            return qwen2_vl.apply_rotary_pos_emb_vision(query, key, cos, sin)
        parts = kernels.rotate(query[None].transpose(1, 2), key[None].transpose(1, 2), cos, sin)
        return (part.transpose(1, 2)[0] for part in parts)

    def layer(self, block, hidden, cos, sin, real):
        """`real` is (images, 1, 1, patches): attention of all images in one call."""
        attention, images, patches = block.attn, real.shape[0], real.shape[-1]
        parts = attention.qkv(block.norm1(hidden)).view(images * patches, 3, attention.num_heads, -1)
        query, key, value = parts[:, 0], parts[:, 1], parts[:, 2]
        query, key = self.rotate(query, key, cos, sin)
        heads = (part.view(images, patches, attention.num_heads, -1).transpose(1, 2) for part in (query, key, value))
        seen = functional.scaled_dot_product_attention(*heads, attn_mask=real, scale=attention.scaling)
        hidden = hidden + attention.proj(seen.transpose(1, 2).reshape(hidden.shape))
        return hidden + block.mlp(block.norm2(hidden))


def in_4_bits(model):
    """The layers below adapters whose weights Unsloth's kernels would dequantize at each use."""
    if not sys.modules.get("unsloth"):
        return []
    layers = [layer.base_layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    return [layer for layer in layers if isinstance(layer, Linear4bit)]


def room_to_dequantize(model):
    """Whether the frozen weights fit into memory in 16 bits, twice, beside what a step has taken at most."""
    size = sum(2 * layer.in_features * layer.out_features for layer in in_4_bits(model))
    if not size:
        return False
    free, _ = torch.cuda.mem_get_info()
    return free - (torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()) > 2 * size


class Weights:
    """The weights of a stack to compute with, in `dtype`, and the gradients of those that train.

    Autocast would make and drop a copy of each adapter, by a launch of its own, wherever one is used. With
    `dequantized`, the frozen weights are kept in 16 bits as well, with the same numbers: a tenth of a step.
    """

    def __init__(self, stack, dtype, dequantized):
        self.owners = [
            (module, name, parameter)
            for module in stack.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        ]
        self.all = [parameter for _, _, parameter in self.owners]
        self.gradients = [torch.zeros_like(parameter) for parameter in self.all]
        self.copies = [nn.Parameter(parameter.detach().to(dtype)) for parameter in self.all]
        self.found = [torch.empty_like(parameter) for parameter in self.all]  # gradients, as wide as the weights
        self.frozen = []
        for layer in in_4_bits(stack) if dequantized else ():
            self.owners.append((layer, "weight", layer.weight))
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
            self.frozen.append(nn.Parameter(weight, requires_grad=False))

    def copy(self):
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.all)

    @contextmanager
    def swapped(self):
        """Within it, the modules have the copies."""
        for (module, name, _), copy in zip(self.owners, self.copies + self.frozen, strict=True):
            module._parameters[name] = copy
        try:
            yield
        finally:
            for module, name, parameter in self.owners:
                module._parameters[name] = parameter

    def add(self, gradients):
        """Adds gradients of the copies to those of the weights."""
        torch._foreach_copy_(self.found, gradients)
        torch._foreach_add_(self.gradients, self.found)

    @contextmanager
    def collected(self):
        """Has what is added meanwhile end up in the weights' `.grad`, beside what is there."""
        pairs = [*zip(self.all, self.gradients, strict=True)]
        ours = all(parameter.grad is gradient for parameter, gradient in pairs)
        if not ours:
            torch._foreach_zero_(self.gradients)
        yield
        if not ours and all(parameter.grad is None for parameter in self.all):  # a step begins
            for parameter, gradient in pairs:
                parameter.grad = gradient
        elif not ours:  # some micro-batches were not replayed
            for parameter, gradient in pairs:
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)


class Graph:
    """One stack for one size: what it computes forward and backward, on tensors that stay where they are.

    `record` turns a function into one that repeats on the GPU what it did; on a CPU, for tests, it is the function.
    """

    def __init__(self, stack, inputs, recompute, weights, record):
        self.stack, self.recompute, self.weights = stack, recompute, weights
        self.inputs = [tensor.detach().clone() for tensor in inputs]
        self.inputs[0].requires_grad_(inputs[0].requires_grad)
        self.output = self.input_gradient = None
        self.replay_forward = record(self.forward)
        self.output_gradient = torch.empty_like(self.output)
        self.replay_backward = record(self.backward)

    def forward(self):
        hidden, *others = self.inputs
        self.weights.copy()
        for layer in self.stack.layers:
            if self.recompute:
                hidden = checkpoint(self.layer, layer, hidden, *others, use_reentrant=False, **NOTHING_RANDOM)
            else:
                hidden = self.layer(layer, hidden, *others)
        self.output = hidden

    def layer(self, *inputs):
        with self.weights.swapped():
            return self.stack.layer(*inputs)

    def backward(self):
        first = self.inputs[:1] if self.inputs[0].requires_grad else []
        found = torch.autograd.grad(self.output, first + self.weights.copies, self.output_gradient)
        self.input_gradient = found[0] if first else None
        self.output = self.output.detach()
        self.weights.add([*found[len(first) :]])


class Replay(torch.autograd.Function):
    """A graph as a part of autograd's. `anchor` requires a gradient, so that the output does; it gets none."""

    @staticmethod
    def forward(context, anchor, hidden, graph, others):
        for kept, now in zip(graph.inputs, (hidden, *others), strict=True):
            kept.data.copy_(now)
        graph.replay_forward()
        context.graph = graph
        return graph.output.detach()

    @staticmethod
    def backward(context, gradient):
        graph = context.graph
        graph.output_gradient.copy_(gradient)
        with graph.weights.collected():
            graph.replay_backward()
        return None, graph.input_gradient, None, None


class Recorder:
    """Records what functions launch. Those of one recorder share their memory: they are replayed one after another."""

    def __init__(self, dtype):
        self.dtype, self.pool, self.stream = dtype, torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, function):
        graph = torch.cuda.CUDAGraph()
        how = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        # Weights that autocast has cast, and keeps, would be those of the step that was recorded.
        casting = {"enabled": self.dtype != torch.float32, "cache_enabled": False}
        with torch.enable_grad(), torch.autocast("cuda", dtype=self.dtype, **casting), torch.cuda.graph(graph, **how):
            function()
        return graph.replay


class Stack:
    """A stack and its graphs: {size: graph}. `sizes` counts how often each size was met; `long` is as in `rounded`."""

    def __init__(self, stack, recompute, weights, record, long=False):
        self.stack, self.recompute, self.weights, self.record, self.long = stack, recompute, weights, record, long
        self.graphs, self.sizes, self.left_out, self.failure = {}, {}, set(), None
        self.pointers = [parameter.data_ptr() for parameter in self.weights.all]
        self.anchor = torch.zeros((), device=next(stack.parameters()).device, requires_grad=True)

    def __call__(self, *inputs):
        """What the layers make of `inputs`, or None if they have to be called as they are."""
        size = tuple(inputs[-1].shape)
        self.sizes[size] = self.sizes.get(size, 0) + 1
        if size not in self.graphs and size not in self.left_out:
            self.add(size, inputs)
        if size in self.left_out:
            return None
        hidden, *others = inputs
        return Replay.apply(self.anchor, hidden, self.graphs[size], others)

    def add(self, size, inputs):
        """Records a graph. A size for which that fails, mostly for lack of memory, is left to the layers."""
        if len(self.graphs) == MOST:
            del self.graphs[min(self.graphs, key=self.sizes.get)]
        try:
            self.graphs[size] = Graph(self.stack, inputs, self.recompute, self.weights, self.record)
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of recording has an error of its own
            self.failure = None if is_shortage(error) or is_shortage(cause) else first_line(cause)
            self.left_out.add(size)
        if size in self.left_out:  # memory is released only here, outside the except block
            free_memory()

    def moved(self):
        """Whether weights lie elsewhere than they did when graphs were recorded."""
        return self.pointers != [parameter.data_ptr() for parameter in self.weights.all]


# ---------------------------------------------------------------------------------------------------------------------
# In the model
# ---------------------------------------------------------------------------------------------------------------------


def through_text(model, stack, forward, inputs_embeds=None, attention_mask=None, position_ids=None, **others):
    """What `Qwen2VLTextModel.forward` returns, its layers replayed; `forward` is that method."""
    given = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids, **others}
    plain = inputs_embeds is not None and position_ids is not None and position_ids.ndim == 3
    plain = plain and not others.get("past_key_values")
    if not (plain and model.training and torch.is_grad_enabled()):
        return forward(**given)
    if attention_mask is not None and not attention_mask[:, 0].all():  # padded on the left
        return forward(**given)
    length = inputs_embeds.shape[1]
    more = rounded(length, TOKENS, stack.long) - length
    hidden = functional.pad(inputs_embeds, (0, 0, 0, more))
    positions = functional.pad(position_ids[-3:], (0, more))  # before these, there may be a row of the text's own
    hidden = stack(hidden, *model.rotary_emb(hidden, positions))
    if hidden is None:
        return forward(**given)
    return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden[:, :length]))


def through_vision(model, stack, forward, hidden_states, grid_thw, **others):
    """What `Qwen2VisionTransformerPretrainedModel.forward` returns, its blocks replayed; `forward` is that method."""
    if not (model.training and torch.is_grad_enabled()):
        return forward(hidden_states, grid_thw, **others)
    lengths = grid_thw.prod(dim=-1)
    images, patches = len(lengths), rounded(int(lengths.max()), PATCHES, stack.long)
    real = torch.arange(patches, device=lengths.device) < lengths[:, None]
    places = real.flatten().nonzero().flatten()
    hidden = model.patch_embed(hidden_states)
    positions = qwen2_vl.get_vision_position_ids(grid_thw, model.spatial_merge_size, kwargs=dict(others))

    def padded(tensor):
        return tensor.new_zeros(images * patches, tensor.shape[-1]).index_copy(0, places, tensor)

    cos, sin = model.rotary_pos_emb(hidden, positions)
    hidden = stack(padded(hidden), padded(cos), padded(sin), real[:, None, None])
    if hidden is None:
        return forward(hidden_states, grid_thw, **others)
    hidden = hidden[places]
    return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=model.merger(hidden))


STACKS = {
    "Qwen2VLTextModel": (Text, through_text),
    "Qwen2_5_VLTextModel": (Text, through_text),
    "Qwen2VisionTransformerPretrainedModel": (Vision, through_vision),
}


class Graphs:
    """The graphs of a model, in its place between `attach` and `release`."""

    def __init__(self, model, dtype, recompute, recorder=Recorder, long=False):
        self.model, self.dtype, self.recompute, self.recorder, self.long = model, dtype, recompute, recorder, long
        self.dequantized, self.stacks, self.replaced = False, [], []

    def attach(self):
        for part in [part for part in self.model.modules() if type(part).__name__ in STACKS]:
            stack, through = STACKS[type(part).__name__]
            stack = stack(part)
            weights = Weights(stack, self.dtype, self.dequantized)
            self.stacks.append(Stack(stack, self.recompute, weights, self.recorder(self.dtype), self.long))
            self.replaced.append((part, vars(part).get("forward")))  # Unsloth's, if it has put one there
            part.forward = bound(through, part, self.stacks[-1], part.forward)

    def release(self):
        """Has the model compute as it did, and frees the memory."""
        for part, forward in self.replaced:
            del part.forward
            if forward:
                part.forward = forward
        if torch.cuda.is_available():  # a graph's memory may only go when it has run
            torch.cuda.synchronize()
        self.stacks, self.replaced = [], []
        free_memory()

    def recorded(self):
        """How many sizes are recorded, of all stacks."""
        return sum(len(stack.graphs) for stack in self.stacks)

    def follow(self):
        """Records anew if weights have moved, as loading can do."""
        if any(stack.moved() for stack in self.stacks):
            self.release()
            self.attach()


def bound(through, part, stack, forward):
    """The method that takes the place of `forward`."""

    def replacement(*arguments, **options):
        return through(part, stack, forward, *arguments, **options)

    return replacement


def difference(loss, gradients, other_loss, other_gradients):
    """How far a loss and gradients are from others, as shares of those."""
    apart, size = (
        float(torch.stack(torch._foreach_norm(part)).norm())
        for part in (torch._foreach_sub(gradients, other_gradients), other_gradients)
    )
    return abs(loss - other_loss) / abs(other_loss), apart / size


def check(graphs, compute, batch, same):
    """Attaches graphs if they agree with the model as it is. Returns how far they are apart, or None if they don't.

    `compute(batch)` does a forward and a backward pass, and returns the loss. `same` has the samples of `batch` in
    another order, and so the same loss: recorded with those, a graph that keeps something of them is found out.
    Raises GraphsTooLarge.
    """
    parameters = [parameter for parameter in graphs.model.parameters() if parameter.requires_grad]

    def gone_through(inputs):
        graphs.model.zero_grad(set_to_none=True)
        loss = compute(inputs)
        return loss, [parameter.grad.clone() for parameter in parameters]

    def tried(dequantized):
        """How far they are apart; None if the graphs can't be recorded."""
        graphs.dequantized = dequantized
        try:
            graphs.attach()
            gone_through(same)
            found = difference(*gone_through(batch), *expected)
            return None if any(stack.left_out for stack in graphs.stacks) else found
        except RuntimeError as error:
            if not is_shortage(error):
                raise

    expected = gone_through(batch)
    free_memory()
    for dequantized in [True] * room_to_dequantize(graphs.model) + [False]:
        if found := tried(dequantized):
            break
        failures = [stack.failure for stack in graphs.stacks if stack.failure]
        graphs.release()
    if not found and not failures:
        raise GraphsTooLarge("the graphs of the longest samples don't fit into memory")
    if not found:
        print(f"Without CUDA graphs: they can't be recorded here ({failures[0]})")
        return None
    if all(share <= limit for share, limit in zip(found, TOLERANCE[graphs.dtype], strict=True)):  # NaN is not
        return found
    graphs.release()
    print(
        f"Without CUDA graphs: with them, the loss is {found[0]:.2%} and the gradients are {found[1]:.2%} away from "
        "those without"
    )
    return None
