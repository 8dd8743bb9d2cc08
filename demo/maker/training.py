"""The base model's training: from nothing to one that reads print, in a given time.

Formulas from the start teach only how formulas go: the text alone lowers the loss, and the image, of which nothing can
be made yet, gets no gradient. What makes reading emerge within a few hundred steps:
- first single signs, then pieces, then whole formulas;
- a spotter, thrown away at the end: a linear layer that has to name from the image tokens which tokens are in the
  picture, in any order. It shows the vision tower the way before the language model looks at it.
"""

import copy
import math
import multiprocessing
import os
import platform
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maker import INSTRUCTION, blank, feed, formulas, wear
from maker.forward import Forward, resize, resized_to
from qwen_vl_kit.reader import Reader
from qwen_vl_kit.scores import compare


@dataclass
class Recipe:
    """How the base model is trained."""

    seconds: float = 430  # of training, starting and ending included
    seed: int = 3407
    workers: int = 15  # processes that draw
    batch_tokens: int = 110_000  # patches and tokens in a batch
    most_samples: int = 512  # in a batch
    optimizer: str = "muon"  # or adamw
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 200
    steady: float = 0.55  # share of the time with the highest learning rate
    average: float = 0.999  # of the weights, over the steps
    report_every: float = 60  # seconds
    most_bytes: int = 600_000_000  # of a pool
    compiled: bool = True
    curriculum: bool = True  # False: whole formulas from the start, for a model that reads


class Muon(torch.optim.Optimizer):
    """Momentum, its matrices made orthogonal: https://kellerjordan.github.io/posts/muon, scaled as arXiv:2502.16982.

    Matrices of one size go together, since a small one is a few launches and hardly any work.
    """

    def __init__(self, parameters, lr, weight_decay, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                grads = torch.stack([parameter.grad for parameter in parameters]).float()
                state = self.state[parameters[0]]
                if "mean" not in state:
                    state["mean"] = torch.zeros_like(grads)
                state["mean"].lerp_(grads, 1 - group["momentum"])
                update = orthogonal(grads.lerp(state["mean"], group["momentum"]))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, [*update.to(parameters[0].dtype)], alpha=-rate)


def orthogonal(x):
    """Matrices (K, rows, columns) with singular values near 1, by five steps of Newton-Schulz."""
    tall = x.shape[1] > x.shape[2]
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def shares(progress, stage):
    """What share of the samples is of which kind. `stage`: how much of the time was spent on signs alone, or None."""
    if stage is None:
        return {"sign": 1.0}
    since = progress - stage
    if since < 0.04:
        return {"sign": 0.4, "short": 0.6}
    if since < 0.10:
        return {"sign": 0.2, "short": 0.3, "middle": 0.5}
    if since < 0.18:
        return {"sign": 0.1, "short": 0.15, "middle": 0.35, "print": 0.3, "other": 0.1}
    return {"sign": 0.02, "short": 0.04, "middle": 0.09, "print": 0.65, "other": 0.2}


def save(model, processor, folder):
    """Write the model as bfloat16, aside first: a run that is stopped leaves the last whole one."""
    aside = folder.with_name(folder.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight")  # tied to the embeddings
    model.config.dtype = torch.bfloat16
    model.save_pretrained(aside, state_dict=weights)
    processor.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def load(folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # see `make_model`; loading drops them
        setattr(model.config, name, getattr(model.config.text_config, name))
    return model, processor


class Held:
    """What is measured while training goes on: named sets of images and formulas."""

    def __init__(self, recombiner, seed, rows):
        self.sets = {}
        for kind, count in (("print", rows), ("other", rows // 2)):
            rng, found = random.Random(f"{seed}-held-{kind}"), []
            while len(found) < count:
                found += [
                    pair for pair in feed.draw(kind, count, rng, recombiner, held_out=True) if pair[1] is not None
                ]
            images = [Image.fromarray(image).convert("RGB") for _, image in found[:count]]
            self.sets[kind] = images, [latex for latex, _ in found[:count]]

    def measure(self, model, processor):
        """One line of scores, and the readings of each set."""
        reader = Reader(None, model, processor, INSTRUCTION, feed.MOST_TOKENS, 512)
        together = reader.read([image for images, _ in self.sets.values() for image in images])
        line, readings = [], {}
        for name, (images, references) in self.sets.items():
            judged = [together.pop(0)._asdict() for _ in images]
            for reading, reference in zip(judged, references, strict=True):
                compare(reference, reading)
            errors, lengths = ([reading[what] for reading in judged] for what in ("errors", "length"))
            line.append(f"{name} CER {sum(errors) / sum(lengths):.4f} exact {errors.count(0) / len(errors):.1%}")
            readings[name] = [reading["text"] for reading in judged]
        return ", ".join(line), readings


def say(began, *words):
    print(f"{time.time() - began:6.0f} s ", *words, flush=True)


def parameter_groups(model, spotter, recipe):
    """The optimizers, and all that they train."""
    matrices, embeddings, rest = [], [], [*spotter.parameters()]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed_tokens" not in name:
            matrices.append(parameter)
        elif parameter.ndim >= 2:
            embeddings.append(parameter)
        else:
            rest.append(parameter)
    fused = {"betas": (0.9, 0.98), "fused": model.device.type == "cuda"}
    decayed = embeddings if recipe.optimizer == "muon" else matrices + embeddings
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    adam_rate = min(recipe.learning_rate, 1e-3)
    optimizers = [torch.optim.AdamW(groups, lr=adam_rate, **fused)]
    if recipe.optimizer == "muon":
        optimizers.append(Muon(matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["highest"] = group["lr"]
    return optimizers, [*matrices, *embeddings, *rest]


def train(folder, texts, forbidden, recipe, shape=None, start=None, measured=()):
    """Train a model for `recipe.seconds` and write it to `folder`.

    `texts` are the formulas whose statistics it gets, none of which it sees as it is; `forbidden` are others that it
    never sees either. `start` is the folder of a model that is trained on; else it is a new one of this `shape`.
    `measured`: (name, images, formulas) to measure beside what is held out.
    """
    began = time.time()
    folder = Path(folder)
    torch.manual_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    recombiner = formulas.Recombiner(texts, forbidden)
    rng = random.Random(recipe.seed)
    if start:
        model, processor = load(start)
        size, vision, text = processor.image_processor.size, model.config.vision_config, model.config.text_config
        shape = blank.Shape(vision.patch_size, size["shortest_edge"], size["longest_edge"])
        say(began, f"goes on with {start}: {vision.depth} and {text.num_hidden_layers} layers")
    else:
        shape = shape or blank.Shape()
        examples = [" ".join(tokens) for _ in range(16_000) if (tokens := recombiner.formula(rng))]
        examples += [formulas.draw_formula(rng, (1, 3, 3, 1)) for _ in range(4_000)]
        processor = blank.make_processor(shape, examples)
        model = blank.make_model(shape, processor.tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save(model, processor, folder)

    context = multiprocessing.get_context("spawn")
    messages, stage = context.Queue(2 * recipe.workers), context.Value("d", 0.0 if recipe.curriculum else 0.5)
    tokenizer_file, stop = str(folder / "tokenizer.json"), processor.tokenizer.eos_token_id
    tokenizer_file = str(shutil.copy(tokenizer_file, folder.with_name(folder.name + ".tokenizer.json")))
    drawers = [
        context.Process(
            target=feed.work,
            args=(messages, stage, f"{recipe.seed}-{began}-{number}", texts, forbidden, tokenizer_file, stop),
            daemon=True,
        )
        for number in range(recipe.workers)
    ]
    for drawer in drawers:
        drawer.start()

    model.to(device).train()
    averaged = copy.deepcopy(model)
    spotter = torch.nn.Linear(model.config.text_config.hidden_size, model.config.text_config.vocab_size, device=device)
    torch.nn.init.constant_(spotter.bias, -5.0)  # most tokens are absent
    optimizers, everything = parameter_groups(model, spotter, recipe)
    forward = Forward(model, processor, INSTRUCTION, dtype, recipe.compiled and device == "cuda")
    held = Held(recombiner, recipe.seed, 128 if device == "cuda" else 8)
    for name, images, references in measured:
        held.sets[name] = [image.convert("RGB") for image in images], references
    say(
        began,
        f"{model.num_parameters() / 1e6:.2f} M parameters, vocabulary {len(processor.tokenizer)}, "
        f"{recipe.workers} drawers, {shape}, {recipe}",
    )

    def batch_size(height, width):
        height, width = resized_to(height, width, shape)
        patches = height * width // shape.patch_size**2
        room = recipe.batch_tokens / (1.25 * patches + len(forward.before) + len(forward.after) + 45)
        return max(min(int(room) // 8 * 8, recipe.most_samples), 8)

    progress, signs_until = 0.0, None if recipe.curriculum else -1.0
    feeding = feed.Feed(
        messages, batch_size, lambda: shares(progress, signs_until), recipe.seed, recipe.most_bytes, device == "cuda"
    )
    kernel = model.model.visual.patch_embed.proj.weight
    answer_to_white = kernel.detach().mean((1, 2, 3, 4), keepdim=True)
    trained, average = [*model.parameters()], [*averaged.parameters()]
    chance = np.random.default_rng(recipe.seed)
    running, step, seen, waited = {}, 0, 0, 0.0
    first, next_line, next_report = None, 0.0, recipe.report_every
    ending = 25 if device == "cuda" else 5
    while True:
        asked = time.time()
        kind, images, answers, lengths = feeding.get(device)
        now = time.time()
        if step <= 3:  # compiling takes its time, and is no progress
            first = now
        waited += now - asked
        end = began + recipe.seconds - ending
        progress = (now - first) / max(end - first, 1)
        if progress >= 1:
            break
        if recipe.curriculum:
            stage.value = progress
            if signs_until is None:
                knows = "sign" in running and running["sign"][0].item() < 0.5 if step % 20 == 0 and step else False
                if (knows and progress > 0.01) or progress > 0.08:
                    signs_until = progress
                    say(began, f"signs are known at step {step}")
        fall = 1 if progress < recipe.steady else (1 - progress) / (1 - recipe.steady)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * min(1, (step + 1) / recipe.warmup) * max(fall, 0.01)
        # Print as it is, mostly; all else worn, the more the longer it has been trained.
        hard = min(1.0, 0.2 + 2 * progress) if recipe.curriculum else 1.0
        images = wear.worn(images, 0.15 if kind == "print" else 0.7, hard)
        scale = 1.0 if chance.random() > 0.12 else chance.choice([0.8, 1.25, 1.5])
        size = resized_to(*(round(side * scale) for side in images.shape[1:]), shape)
        images = resize(images, size)
        hint = 0.5 * max(1 - progress / 0.5, 0) if recipe.curriculum else 0.0
        with_hint = spotter if hint else None
        try:
            loss, spotting = forward(images, answers, lengths, with_hint)
            (loss + hint * spotting).backward()
        except Exception as error:  # no compiler, or one that fails: slower, but it goes on
            if not forward.compiled or isinstance(error, torch.OutOfMemoryError):
                raise
            say(began, f"goes on without compiled layers: {type(error).__name__} {str(error)[:500]}")
            forward.uncompiled()
            for parameter in everything:
                parameter.grad = None
            continue
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for parameter in everything:
            parameter.grad = None
        with torch.no_grad():
            # All pixels of a page are white alike, so every step would add up to a large change of this one number,
            # and what tells one patch from the next would be drowned.
            kernel += answer_to_white - kernel.mean((1, 2, 3, 4), keepdim=True)
            torch._foreach_lerp_(average, trained, 1 - min(recipe.average, (1 + step) / (10 + step)))
            parts = torch.stack([loss.detach(), spotting.detach()])
            running[kind] = parts if kind not in running else running[kind].lerp(parts, 0.03)
        step += 1
        seen += len(images)
        if now - began > next_line:
            next_line = now - began + 10
            losses = "  ".join(f"{name} {both[0].item():.3f}/{both[1].item():.2f}" for name, both in running.items())
            say(
                began,
                f"{progress:.3f}  step {step}  samples {seen}  drawn {feeding.drawn}  waited {waited:.0f} s  "
                f"lr {optimizers[-1].param_groups[0]['lr']:.2e}  {losses}",
            )
        if now - began > next_report:
            next_report = now - began + recipe.report_every
            save(averaged, processor, folder)
            say(began, held.measure(averaged, processor)[0], f"(took {time.time() - now:.1f} s)")
    stage.value = -1
    feeding.close()
    for drawer in drawers:
        drawer.terminate()
    save(averaged, processor, folder)

    # What was written is what counts: read it again from the folder, as the fine-tuning script will.
    model, processor = load(folder)
    line, readings = held.measure(model.to(device), processor)
    for name, texts_read in readings.items():
        for text, reference in [*zip(texts_read, held.sets[name][1], strict=True)][:4]:
            print(f"  {name}\n  {reference}\n  {text}\n")
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    say(began, "FINAL", line)
    say(
        began,
        f"{folder}: {megabytes:.1f} MB, {step} steps, {seen} samples, {feeding.drawn} drawn, on {machine} and "
        f"{os.cpu_count()} CPU cores",
    )
    return readings
