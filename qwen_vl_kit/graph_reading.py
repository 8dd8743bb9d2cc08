"""Generating with a cache that stays where it is, where a token's step is a CUDA graph: recorded once, then replayed.

It wraps no step: `install` has a model's `generate` do so, for `graphs` in a run and for `reader` after it. One token
of a 7B is thousands of launches, which take the host many times as long as they take the GPU.

Everything but the loop over tokens stays `generate`'s own: it prepares positions, masks, processors and criteria, and
hands them to `Generator.decode`. A graph lives within one call: weights move between calls (adapters train, and change
their type once), and recording takes no longer than one token without a graph. Before the first graph of a model is
relied on, its logits are compared with those of the model as it is; where they differ, or anything fails but for want
of memory, `generate` stays as it was, which a sentence says.
"""

import sys
import threading
from contextlib import contextmanager
from functools import partial, wraps

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.generation import EosTokenCriteria, LogitsProcessor, MaxLengthCriteria
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen_vl_kit.memory import is_shortage
from qwen_vl_kit.sentences import first_line

# What a call may ask for, beside the tensors that a processor makes.
ASKED = {"max_new_tokens", "max_length", "do_sample", "temperature", "min_p", "num_beams", "repetition_penalty"}
ASKED |= {"use_cache", "streamer", "logits_processor", "stopping_criteria"}
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
SPECIAL = ("return_dict_in_generate", "prefill_chunk_size", "is_assistant")  # options that our loop does not know
OWN = {"inputs_embeds", "position_ids"}  # tensors that no processor makes, and that would be taken for the prompt's
CHECK_EVERY = 8  # tokens from one look at which rows have ended to the next: to look is to wait for the GPU
WORTH = 32  # tokens still to come, for which it pays to record a step of fewer rows
ROOM = 128  # tokens that the cache has room for at first: the empty part costs memory, and time in every step
COMPARED = 3  # steps of the check
# How far logits may be from those without a graph, as a share of their spread: other kernels round otherwise. In bf16,
# a 7B of random weights was 4 to 5% off; the demo is 14 to 26% off if it sees padding, 90% if positions are one off.
ROUNDING = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


class Unfit(Exception):
    """Why a model or a call can't be generated so."""


class Probabilities(LogitsProcessor):
    """Changes nothing, and keeps log-probabilities of the likeliest tokens, those that greedy decoding takes.

    It is known here, so that they are computed in the graph.
    """

    def __init__(self):
        self.steps = []  # a tensor (rows) for each token

    def __call__(self, input_ids, scores):
        self.steps.append(log_probability(scores))
        return scores


def log_probability(scores):
    return scores.amax(dim=-1) - scores.logsumexp(dim=-1)


def install(model):
    """Has `model.generate` decode so, wherever it can. Returns the `Generator`."""
    generator, usual = Generator(), model.generate

    @wraps(usual)
    def generate(*arguments, **how):
        extra = {name for name in how if name not in ASKED}
        plain = all(isinstance(how[name], torch.Tensor) for name in extra) and not extra & OWN
        plain &= how.get("num_beams", 1) == 1 and model.generation_config.get_generation_mode() in MODES
        if arguments or generator.why_not or not plain or in_parts(model):
            return usual(*arguments, **how)
        return usual(**how, custom_generate=partial(generator.decode, streamer=how.get("streamer")))

    model.generate = generate
    return generator


def in_parts(model):
    """Whether processes, or GPUs, hold a part of the model each."""
    return (
        is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model) or len({*map(device_of, model.parameters())}) > 1
    )


def device_of(tensor):
    return tensor.device


# ---------------------------------------------------------------------------------------------------------------------
# A token's step
# ---------------------------------------------------------------------------------------------------------------------


class Layer(StaticLayer):
    """Keys and values of a layer, and where the next ones go: `place`, which all layers share."""

    def __init__(self, keys, values, length, place):
        super().__init__(length)
        self.lazy_initialization(keys, values)
        self.keys[:, :, : keys.shape[2]] = keys
        self.values[:, :, : keys.shape[2]] = values
        self.cumulative_length = place

    def update(self, keys, values, *_, **__):
        self.keys.index_copy_(2, self.cumulative_length, keys)
        self.values.index_copy_(2, self.cumulative_length, values)
        return self.keys, self.values


class Step:
    """What a token's step of some rows reads and writes: tensors that stay where they are.

    `layers` yields the keys and values so far of each layer, (rows, heads, tokens, size), `mask` is 0 for those of them
    that count and else -inf, (rows, 1, 1, tokens), `token` comes next, (rows), at `position`, (..., rows, 1), and there
    is room for `length` tokens.
    """

    def __init__(self, model, layers, mask, position, token, length):
        self.model, self.length = model, length
        self.mask = mask.new_full((*mask.shape[:-1], length), -torch.inf)
        self.mask[..., : mask.shape[-1]] = mask
        self.token, self.position = token[:, None].clone(), position.clone()
        self.place = torch.full((1,), mask.shape[-1], device=mask.device)
        self.cache = Cache(layers=[Layer(keys, values, length, self.place) for keys, values in layers])

    def logits(self):
        """The logits after `token`, whose place the next one can take then. Nothing here waits for the GPU."""
        self.mask.index_fill_(3, self.place, 0)
        inputs = {"input_ids": self.token, "attention_mask": self.mask, "position_ids": self.position}
        outputs = self.model(**inputs, past_key_values=self.cache, use_cache=True, return_dict=True)
        self.position.add_(1)
        self.place.add_(1)
        return outputs.logits[:, -1].float()

    def moved(self, used, length, rows):
        """The same with room for `length` tokens, of `rows` alone. This one's cache, of `used` tokens, is gone then."""
        layers = ((keys[rows, :, :used], values[rows, :, :used]) for keys, values in emptied(self.cache))
        position = self.position[..., rows, :]
        return Step(self.model, layers, self.mask[rows, ..., :used], position, self.token[rows, 0], length)


class Prompt:
    """What is known when the prompt has been read: `logits`, and what a `Step` continues from.

    Raises `Unfit` if the model would have to continue from more than that.
    """

    def __init__(self, model, input_ids, inputs):
        self.model, self.config = model, model.config.get_text_config(decoder=True)
        if not {"attention_mask", "position_ids"} <= inputs.keys():
            raise Unfit("the model takes no positions")
        if type(model)._update_model_kwargs_for_generation is not GenerationMixin._update_model_kwargs_for_generation:
            raise Unfit("the model hands on more than keys and values")
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise Unfit(f"attention is {self.config._attn_implementation}")
        self.cache = DynamicCache(config=self.config)
        if any(type(layer) is not DynamicLayer for layer in self.cache.layers):
            raise Unfit("some layers keep something else than all keys and values")
        now = inputs | {"past_key_values": self.cache}
        logits = model(**model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **now)).logits[:, -1]
        if any(layer.get_seq_length() != input_ids.shape[1] for layer in self.cache.layers):
            raise Unfit("some layers keep keys and values of something else than the prompt")
        self.logits, self.dtype = logits.float(), logits.dtype
        padding = inputs["attention_mask"][:, None, None] == 0
        self.mask = torch.zeros(padding.shape, dtype=logits.dtype, device=logits.device)
        self.mask.masked_fill_(padding, -torch.inf)
        self.positions = inputs["position_ids"].expand(*inputs["position_ids"].shape[:-2], *input_ids.shape)

    def step(self, token, length, layers, rows=slice(None)):
        """A `Step` of `rows`, for which `token` comes next. `layers` are their keys and values."""
        return Step(self.model, layers, self.mask[rows], self.positions[..., rows, -1:] + 1, token, length)


def emptied(cache):
    """Keys and values of each layer, which are gone from the cache then: all of them twice could be too much."""
    while cache.layers:
        layer = cache.layers.pop(0)
        yield layer.keys, layer.values


def room(used, written, limit):
    """For how many tokens to have room, where `used` are kept and `written` of `limit` tokens are known."""
    return -(-(used + min(max(ROOM, written), limit - written)) // 64) * 64


# ---------------------------------------------------------------------------------------------------------------------
# Less for the GPU to do
# ---------------------------------------------------------------------------------------------------------------------


def attend(module, query, key, value, attention_mask, scaling=None, **how):
    """Attention of one token: the heads that share keys go as so many tokens, for the keys to be read in place.

    transformers' own makes a copy of all keys and values for each of those heads: at 64 rows half of a step's time.
    """
    (rows, heads, tokens, size), shared = query.shape, key.shape[1]
    if tokens != 1 or heads == shared or how.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **how)
    query = query.reshape(rows, shared, heads // shared, size)
    answers = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return answers.reshape(rows, 1, heads, size), None


def adapted(layer, dtype):
    """A layer with LoRA as a function with few launches, its adapters in `dtype`; None if it is a special one.

    The weights are left to their own layer: of few rows, bitsandbytes' takes the product in 4 bits, where Unsloth's
    kernel for training turns all weights into 16 bits for each token.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    special = layer.merged or layer.lora_variant or any(layer.lora_bias.values()) or len(names) > 1
    if special or not isinstance(layer.base_layer, torch.nn.Linear):
        return None
    if layer.disable_adapters or not names:
        return layer.base_layer
    base, usual, scale = layer.base_layer, layer.forward, layer.scaling[names[0]]
    a, b = (part[names[0]].weight.detach().to(dtype).t() for part in (layer.lora_A, layer.lora_B))

    def forward(x):
        if x.dtype != dtype:
            return usual(x)
        y = base(x)
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ a, b, alpha=scale)
        return y

    return forward


@contextmanager
def fewer_launches(model, dtype):
    """Within it, the model computes the same for single tokens with less work, and nothing that a graph can't hold."""
    usual = []  # the layers whose forward is changed, and what they have of their own
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and (forward := adapted(layer, dtype)):
            usual.append((layer, vars(layer).get("forward")))
            layer.forward = forward
    attention, ALL_ATTENTION_FUNCTIONS["sdpa"] = ALL_ATTENTION_FUNCTIONS["sdpa"], attend
    device = model.device.type
    how = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
    try:
        with torch.autocast(device, **how, cache_enabled=False):  # what it keeps would lie in a graph's memory
            yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
        for layer, forward in usual:
            del layer.forward
            if forward:
                layer.forward = forward


# ---------------------------------------------------------------------------------------------------------------------
# The loop over tokens
# ---------------------------------------------------------------------------------------------------------------------


class Tokens:
    """The tokens of all rows, and which of the rows that are still computed have ended."""

    def __init__(self, rows, limit, ends, pad, watched):
        device = pad.device
        self.written, self.ends, self.pad = pad.repeat(rows, limit), ends, pad
        self.logs = torch.zeros(rows, limit, device=device) if watched else None  # their log-probabilities
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.rows, self.ended = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)

    def take(self, logits):
        """The likeliest token of each row, which is written down. Nothing here waits for the GPU."""
        new = torch.where(self.ended, self.pad, logits.argmax(dim=-1))
        if self.logs is not None:
            self.logs[self.rows, self.count] = log_probability(logits)
        self.written[self.rows, self.count] = new
        self.ended.logical_or_((new[:, None] == self.ends).any(dim=1))
        self.count.add_(1)
        return new

    def until_all_ended(self, count):
        """How many of the first `count` tokens there are until all rows have ended."""
        ended = (self.written[:, :count, None] == self.ends).any(dim=2).cummax(dim=1).values
        return min(count, 1 + int((~ended).sum(dim=1).max()))


class Generator:
    """Decodes for a model. `why_not` says why it does not any more, if so; `difference` what its check has found."""

    def __init__(self):
        self.why_not = self.difference = self.stream = None
        self.warm = set()  # (thread, rows) of steps that have run

    def decode(self, model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, **inputs):
        """What `generate` calls in place of its own loop, with all that it has prepared."""
        how = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria, "streamer": streamer}
        how |= {"generation_config": generation_config}
        try:
            if model.training or not inputs["use_cache"] or any(getattr(generation_config, name) for name in SPECIAL):
                prompt = None
            else:
                prompt = Prompt(model, input_ids, inputs)
                if self.difference is None:
                    self.compare(prompt, input_ids, inputs)
        except Exception as error:
            if is_shortage(error):
                raise
            self.give_up(error)
        if self.why_not or not prompt:
            # As `generate` calls it in transformers 5.17.
            return model._sample(input_ids, **how, synced_gpus=False, **inputs)
        simple = {*map(type, stopping_criteria)} <= {MaxLengthCriteria, EosTokenCriteria} and streamer is None
        simple &= {*map(type, logits_processor)} <= {Probabilities} and not generation_config.do_sample
        with fewer_launches(model, prompt.dtype):
            tokens = (self.greedily if simple else self.one_by_one)(prompt, input_ids, **how)
        if tokens.is_cuda:  # a graph's memory may only go when it has run
            torch.cuda.current_stream().synchronize()
        return tokens

    def compare(self, prompt, input_ids, inputs):
        """Compares the logits of the next tokens of two rows with those of the model as it is. Raises `Unfit`."""
        some, model = slice(0, 2), prompt.model
        layers = [(layer.keys[some], layer.values[some]) for layer in prompt.cache.layers]
        cache = DynamicCache(config=prompt.config)
        for number, (keys, values) in enumerate(layers):
            cache.update(keys, values, number)
        inputs = {name: value[some] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        inputs["position_ids"] = prompt.positions[..., some, :]
        outputs, tokens, expected = CausalLMOutputWithPast(past_key_values=cache), input_ids[some], []
        first = token = prompt.logits[some].argmax(dim=-1)
        for _ in range(COMPARED):
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            inputs = model._update_model_kwargs_for_generation(outputs, inputs)
            outputs = model(**model.prepare_inputs_for_generation(tokens, next_sequence_length=1, **inputs))
            expected.append(outputs.logits[:, -1].float())
            token = expected[-1].argmax(dim=-1)
        step = prompt.step(first, room(input_ids.shape[1], 0, COMPARED), layers, some)
        run, differences = self.runner(step.logits, step), []
        with fewer_launches(model, prompt.dtype):
            for logits in expected:
                differences.append((run() - logits).square().mean(dim=-1).sqrt() / logits.std(dim=-1))
                step.token.copy_(logits.argmax(dim=-1, keepdim=True))
        difference = torch.cat(differences).max().item()
        if not difference <= ROUNDING.get(prompt.dtype, 0):  # nor if it is NaN
            raise Unfit(f"its logits differ by {difference:.1%} of their spread")
        self.difference = difference

    def give_up(self, error):
        self.why_not = str(error) if isinstance(error, Unfit) else f"{type(error).__name__}: {first_line(error)}"
        print(f"Generating without CUDA graphs: {self.why_not}", file=sys.stderr)

    def runner(self, call, step):
        """A function that does as `call`, which uses only tensors that stay where they are: on a GPU, as a graph.

        Before one is recorded, a step of so many rows has run: libraries make ready what they can't while recording.
        """
        if not step.token.is_cuda:
            return call
        self.stream = self.stream or torch.cuda.Stream()
        graph = result = None  # each has memory of its own: with a pool for all of a call, PyTorch 2.11 failed
        key = (threading.get_ident(), len(step.token))

        def run():
            nonlocal graph, result
            if graph is None and key in self.warm and not self.why_not:
                try:
                    graph, result = self.record(call)
                except Exception as error:
                    if is_shortage(error) or is_shortage(error.__context__):  # the end of recording has its own error
                        raise
                    self.give_up(error)
            if graph is None:
                with self.aside():
                    result = call()
                self.warm.add(key)
            else:
                graph.replay()
            return result

        return run

    @contextmanager
    def aside(self):
        """Within it, launches go to a stream of our own: none is recorded from PyTorch's, and both need workspaces."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, call):
        free, total = torch.cuda.mem_get_info()
        if free < total / 8:  # PyTorch can't release what it keeps while it records
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with self.aside():
            graph.capture_begin(capture_error_mode="thread_local")  # other threads, of the page, do as they like
            try:
                result = call()
            finally:
                graph.capture_end()
        return graph, result

    def greedily(self, prompt, input_ids, logits_processor, stopping_criteria, generation_config, **_):
        """The likeliest token each, taken within the graph. Rows that have ended are left out before long."""
        given, limit = input_ids.shape[1], generation_config.max_length - input_ids.shape[1]
        ends = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
        ends = torch.cat(ends or [input_ids.new_zeros(0)]).to(input_ids.device)
        pad = generation_config._pad_token_tensor if len(ends) else input_ids.new_zeros(())  # else it is of no use
        tokens = Tokens(len(input_ids), limit, ends, pad, bool(logits_processor))
        token, count, step = tokens.take(prompt.logits), 1, None
        while count < limit:
            few = False
            if count % CHECK_EVERY == 1:
                left = (~tokens.ended).nonzero()[:, 0]
                if not len(left):
                    break
                few = step and len(left) <= len(step.token) / 2 and limit - count >= WORTH
            used = given + count - 1
            if step is None:
                step, run = prompt.step(token, room(used, count, limit), emptied(prompt.cache)), None
            elif few or used == step.length:
                rows = left if few else slice(None)
                step, run = step.moved(used, room(used, count, limit), rows), None
                tokens.rows, tokens.ended = tokens.rows[rows], tokens.ended[rows]
            run = run or self.runner(lambda step=step: step.token.copy_(tokens.take(step.logits())[:, None]), step)
            run()
            count += 1
        count = tokens.until_all_ended(count)
        for processor in logits_processor:
            processor.steps += tokens.logs[:, :count].unbind(dim=1)
        return torch.cat([input_ids, tokens.written[:, :count]], dim=1)

    def one_by_one(self, prompt, input_ids, logits_processor, stopping_criteria, generation_config, streamer):
        """Tokens that processors and chance lead to, streamed: the graph ends with the logits, all else is as usual."""
        tokens, logits, limit = input_ids, prompt.logits, generation_config.max_length - input_ids.shape[1]
        going, step = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device), None
        fills = any(isinstance(criterion, EosTokenCriteria) for criterion in stopping_criteria)
        while True:
            scores = logits_processor(tokens, logits.clone())
            if generation_config.do_sample:
                new = torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
            else:
                new = scores.argmax(dim=-1)
            if fills:
                new = torch.where(going, new, generation_config._pad_token_tensor)
            used, tokens = tokens.shape[1], torch.cat([tokens, new[:, None]], dim=1)
            going &= ~stopping_criteria(tokens, None)
            if streamer:
                streamer.put(new.cpu())
            if not going.any():
                break
            length = room(used, used + 1 - input_ids.shape[1], limit)
            if step is None:
                step, run = prompt.step(new, length, emptied(prompt.cache)), None
            elif used == step.length:
                step, run = step.moved(used, length, slice(None)), None
            run = run or self.runner(step.logits, step)
            step.token.copy_(new[:, None])
            logits = run()
        if streamer:
            streamer.end()
        return tokens
