"""Reads images with a model: greedily, in batches of like sizes, or one token after another as they are written.

It wraps no step: the commands `read`, `score` and `page` stand on it. Asked as in training, prepared by the processor
that lies beside the model, so what it reads is what the run's own scores were taken of.
"""

import math
import os
import queue
import sys
import threading
from argparse import Namespace
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from qwen_vl_kit import attention, environment, graph_reading, hub, loading, on_cpu, pictures
from qwen_vl_kit.graph_reading import Probabilities
from qwen_vl_kit.memory import if_it_fits, is_shortage
from qwen_vl_kit.sentences import told

BATCH = {True: 64, False: 16}  # images at once, by whether there is a GPU; halved where the memory does not hold them


class Reading(NamedTuple):
    text: str
    cut: bool  # whether the length limit ended it
    certainty: float  # mean log-probability of its tokens, with the one that ends it: 0 is certain


class Piece(NamedTuple):
    """A token of a reading that is being written."""

    text: str  # what it adds to the text; empty where a letter takes several tokens, and of the token that ends it
    probability: float
    ends: bool  # whether it ends the reading


class Stop(StoppingCriteria):
    def __init__(self, stopped):
        self.stopped = stopped

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), bool(self.stopped()), device=input_ids.device)


class Queue(BaseStreamer):
    """Hands on the tokens that are generated, with their log-probabilities, and at the end None, or what went wrong."""

    def __init__(self, probabilities):
        self.items, self.probabilities, self.numbers = queue.Queue(), probabilities, count(-1)

    def put(self, value):
        number = next(self.numbers)
        if number >= 0:  # the first are those of the prompt
            self.items.put((value.flatten().tolist(), self.probabilities.steps[number].item()))

    def end(self):
        pass


def as_seen(picture):
    """An image as training would see it: RGB, transparent paper white, turned as its EXIF data says."""
    if isinstance(picture, str | os.PathLike):
        return pictures.open_image(Path(picture).read_bytes())
    return pictures.as_seen(picture)


class Reader:
    """A model that reads images of formulas.

    `source` is what it was loaded from, `instruction` what it is asked, `limit` the tokens of a reading at most.
    """

    def __init__(self, source, model, processor, instruction, limit, batch_size=None):
        self.source, self.model, self.processor = source, model.eval(), processor
        self.instruction, self.limit = instruction, limit
        self.batch_size = batch_size or BATCH[torch.cuda.is_available()]
        chat = [{"role": "user", "content": [{"type": "text", "text": instruction}, {"type": "image"}]}]
        self.prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ends = model.generation_config.eos_token_id
        self.ends = torch.tensor(ends if isinstance(ends, list) else [end for end in [ends] if end is not None])

    def inputs(self, pictures):
        inputs = self.processor(
            text=[self.prompt] * len(pictures),
            images=[[picture] for picture in pictures],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        return inputs.to(self.model.device, self.model.dtype)

    def generate(self, pictures, limit=None, **how):
        inputs = self.inputs(pictures)
        how |= {"max_new_tokens": limit or self.limit, "max_length": None, "do_sample": False, "num_beams": 1}
        tokens = self.model.generate(**inputs, **how, repetition_penalty=1.0, use_cache=True)
        return tokens[:, inputs["input_ids"].shape[1] :].cpu()

    def read_batch(self, pictures, limit=None):
        """Reads images at once. Raises what PyTorch raises if the memory does not hold them."""
        probabilities = Probabilities()
        tokens = self.generate(pictures, limit, logits_processor=[probabilities])
        is_end = torch.isin(tokens, self.ends)
        written = is_end.cumsum(dim=1) - is_end.int() == 0  # (rows, tokens): up to the first end, with it
        steps = torch.stack(probabilities.steps[: tokens.shape[1]], dim=1).float().cpu()
        certainties = (steps * written).sum(dim=1) / written.sum(dim=1)
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        ended = is_end.any(dim=1).tolist()
        return [
            Reading(text, not end, certainty)
            for text, end, certainty in zip(texts, ended, certainties.tolist(), strict=True)
        ]

    def batches(self, pictures, limit=None):
        """Reads images, RGB, those of like sizes at once. Yields {place: Reading} for each batch as it is read.

        `batch_size` is halved where the memory does not hold it, and stays so.
        """
        # The longest first: if they fit, all do.
        places = sorted(range(len(pictures)), key=lambda place: -pictures[place].width * pictures[place].height)
        while places:
            some = places[: self.batch_size]
            chosen = [pictures[place] for place in some]
            if readings := if_it_fits(lambda: self.read_batch(chosen, limit), len(some) > 1):  # noqa: B023 (called at once)
                yield dict(zip(some, readings, strict=True))
                places = places[len(some) :]
            else:
                self.batch_size = len(some) // 2

    def read(self, pictures, limit=None):
        """Reads images, files or Pillow's, as many at once as the memory holds. Returns a `Reading` for each."""
        found = {}
        for readings in self.batches([*map(as_seen, pictures)], limit):
            found |= readings
        return [found[place] for place in range(len(pictures))]

    def stream(self, picture, stopped=lambda: False):
        """Yields a `Piece` for each token as it is written. Ends early as soon as `stopped()`, or when it is closed."""
        probabilities, closed = Probabilities(), threading.Event()
        tokens, items = [], Queue(probabilities)

        def write():
            try:
                stop = Stop(lambda: closed.is_set() or stopped())
                self.generate([picture], logits_processor=[probabilities], streamer=items, stopping_criteria=[stop])
                items.items.put(None)
            except Exception as error:  # raised where the pieces are taken
                items.items.put(error)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        text = ""
        try:
            while item := items.items.get():
                if isinstance(item, Exception):
                    raise item
                tokens += item[0]
                whole = self.processor.decode(tokens, skip_special_tokens=True)
                if whole.endswith("\N{REPLACEMENT CHARACTER}"):  # a letter of several tokens
                    whole = text
                yield Piece(whole[len(text) :], math.exp(item[1]), item[0][-1] in self.ends)
                text = whole
        finally:
            closed.set()
            writer.join()


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def open_model(name, instruction=None, max_new_tokens=512, batch_size=None, load_in_4bit=None, cuda_graphs=True):
    """A `Reader` for programs, of a run's folder, an adapter, a model, or a name on the hub; options as of `read`."""
    named = {"model": name, "instruction": instruction, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return load(Namespace(**named, load_in_4bit=load_in_4bit, cuda_graphs=cuda_graphs))


def load(arguments, source=None):
    """A `Reader` of the model that `arguments`, those of `add_model`, name, or of this `loading.Source`.

    Ends the program with a sentence if it can't be loaded.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every size of an image or a text
    environment.quiet()
    source = source or loading.find(arguments.model)
    with told(
        f"The processor of {source.name} can't be loaded", Exception
    ):  # of damaged files, libraries raise anything
        processor = hub.patiently(source.model, lambda: loading.load_processor(source.model))
    if not processor.chat_template:
        again = "copy its folder again" if source.is_adapter else "choose an instruction-tuned model (...-Instruct)"
        sys.exit(f"{source.name} has no chat template: {again}.")
    try:
        load_it = load_adapter if source.is_adapter else load_whole
        model = load_it(source, arguments.load_in_4bit)
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        sys.exit(f"There is not enough GPU memory for {source.name}: close other programs on the GPU.")
    if not torch.cuda.is_available() and model.num_parameters() > 1e9:
        print("Without a GPU, a model of this size takes minutes for an image.", file=sys.stderr)
    attention.install(model)
    if not torch.cuda.is_available():
        on_cpu.install(model)
    elif getattr(arguments, "cuda_graphs", True):
        graph_reading.install(model)
    instruction = instruction_for(source, arguments.instruction)
    batch_size = getattr(arguments, "batch_size", None)
    return Reader(source, model, processor, instruction, arguments.max_new_tokens, batch_size)


def instruction_for(source, given):
    """What a model is asked: what is `given`, or else what it was trained with, or else what the script would ask."""
    if not given and not source.how:
        print(
            f"{source.name} has no record of how it was trained: asking {loading.INSTRUCTION!r} (--instruction), "
            f"{'its base ' * source.is_adapter}as it is stored (--load_in_4bit)",
            file=sys.stderr,
        )
    return given or source.how.get("instruction", loading.INSTRUCTION)


def in_4_bits(source, given):
    """Whether weights are to be in 4 bits: as `given`, or else as in training; models that are stored so always are."""
    return source.how.get("load_in_4bit", False) * source.is_adapter if given is None else given


def load_adapter(source, load_in_4bit):
    """An adapter beside its base model, loaded and computed as in training."""
    how = {"load_in_4bit": False, "quantization": None, "bf16": True, "fp16": False} | source.how
    how["load_in_4bit"] = in_4_bits(source, load_in_4bit)
    folder, dtype, device = Path(source.model), torch.float32, "cpu"
    if torch.cuda.is_available():
        device, native = 0, torch.cuda.is_bf16_supported(including_emulation=False)
        if how["bf16"] or how["fp16"]:
            dtype = torch.bfloat16 if how["bf16"] and native else torch.float16
    return loading.load_with_adapter(loading.base_of(folder), folder, how, dtype, device)


def load_whole(source, load_in_4bit):
    """A merged or a base model, as it is stored, or quantized to 4 bits as it is loaded."""
    how = {"dtype": "auto", "device_map": "auto" if torch.cuda.is_available() else {"": "cpu"}}
    if load_in_4bit and not hasattr(AutoConfig.from_pretrained(source.model), "quantization_config"):
        how |= {"quantization_config": BitsAndBytesConfig(**loading.NF4), "dtype": torch.float32}
        if torch.cuda.is_available():
            how |= {"dtype": torch.bfloat16, "device_map": {"": 0}}
    model = hub.load("model", source.model, lambda: AutoModelForImageTextToText.from_pretrained(source.model, **how))
    model.generation_config = loading.greedy(model.generation_config)
    return model
