"""The room `graphs`, on a CPU: everything but the recording itself, in whose place layers are simply called again."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwen_vl_kit import graphs
from qwen_vl_kit.memory import TooLarge


class Again:
    """Stands for a recorder: "replaying" calls the function. Going backward is only recorded, as on a GPU."""

    def __init__(self, dtype):
        self.made = 0

    def __call__(self, function):
        def replay():
            with torch.enable_grad():
                function()

        if function.__name__ == "forward":
            self.made += 1
            replay()
        return replay


PROCESSOR = AutoProcessor.from_pretrained("demo/model")
ROWS = load_dataset("demo/data", split="train")


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_pretrained("demo/model", dtype=torch.float32)
    linear = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|attn\.proj|fc1|fc2)"
    model = get_peft_model(base, LoraConfig(r=4, target_modules=linear, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # else the gradients of all lora_A are 0
            parameter.data.normal_(std=0.02)
    return model.train()


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


def batch_of(numbers, padding_side="right"):
    """A batch as the script's `collate` makes it; the loss is on all real tokens."""
    rows = ROWS.select(numbers)
    chat = [{"role": "user", "content": [{"type": "text", "text": "Read."}, {"type": "image"}]}]
    prompt = PROCESSOR.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    images = [[image.convert("RGB")] for image in rows["image"]]
    texts = [prompt + text + "<|im_end|>" for text in rows["text"]]
    batch = PROCESSOR(text=texts, images=images, padding=True, padding_side=padding_side, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].where(batch["attention_mask"] == 1, -100)}


def gradients_of(model):
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def compute(model):
    def loss_of(batch):
        loss = model(**batch).loss
        loss.backward()
        return float(loss.detach())

    return loss_of


def attached(model, recompute=False):
    found = graphs.Graphs(model, torch.float32, recompute, recorder=Again)
    found.attach()
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_padded_stacks_compute_what_the_model_does(model, recompute):
    several = [batch_of(numbers) for numbers in (range(4), range(4, 8), [9])]
    expected = []
    for batch in several:
        model.zero_grad()
        expected.append((compute(model)(batch), gradients_of(model)))
    used = attached(model, recompute)
    for batch, (loss, gradients) in zip(several, expected, strict=True):
        model.zero_grad()
        apart = graphs.difference(compute(model)(batch), gradients_of(model), loss, gradients)
        assert max(apart) < 1e-5, apart
    assert used.recorded() == sum(len(stack.sizes) for stack in used.stacks) >= 4
    assert len(used.stacks) == 2


def test_weights_are_computed_with_in_16_bits(model):
    """Copies of them, made anew in each replay; the gradients are those of the weights."""
    batch = batch_of(range(4))
    expected = compute(model)(batch), gradients_of(model)
    used = graphs.Graphs(model, torch.bfloat16, False, recorder=Again)
    used.attach()
    for factor in (1.0, 1.5, 1.0):
        for parameter in used.stacks[0].weights.all:
            parameter.data.mul_(factor)
        model.zero_grad()
        apart = graphs.difference(compute(model)(batch), gradients_of(model), *expected)
        assert 1e-6 < max(apart) < 0.02 if factor == 1.0 else max(apart) > 0.02, apart
        for parameter in used.stacks[0].weights.all:
            parameter.data.div_(factor)
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in used.stacks[0].weights.all)


def test_gradients_of_micro_batches_add_up(model):
    """Replayed and not, in any order, and none of an earlier step stays."""
    first, second, third = (batch_of(numbers) for numbers in (range(4), range(4, 8), range(8, 12)))
    loss_of = compute(model)
    for batch in (first, second, third):
        loss_of(batch)
    expected = gradients_of(model)
    used = attached(model)
    for left_out in (None, 0, 1, 2):
        model.zero_grad()
        for number, batch in enumerate((first, second, third)):
            if number == left_out:
                used.release()
            loss_of(batch)
            if number == left_out:
                used.attach()
        apart = graphs.difference(1.0, gradients_of(model), 1.0, expected)[1]
        assert apart < 1e-5, (left_out, apart)


def test_what_is_no_training_step_goes_through_the_model_as_it_is(model):
    used, batch = attached(model), batch_of(range(3))
    with torch.no_grad():
        model(**batch)
    model.eval()
    model(**batch)
    model.train()
    assert not used.recorded()
    left = batch_of(range(6), padding_side="left")  # attention would have to know of its padding
    text = next(stack for stack in used.stacks if isinstance(stack.stack, graphs.Text))
    model(**left)
    assert not text.graphs
    used.release()
    with torch.no_grad():
        plain = model(**batch).logits
    assert torch.isfinite(plain).all() and not used.stacks


def test_the_rarest_sizes_are_dropped(model, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    text = next(stack for stack in attached(model).stacks if isinstance(stack.stack, graphs.Text))
    head = model.config.text_config.hidden_size // model.config.text_config.num_attention_heads
    for length in (64, 64, 128, 192, 64):
        wide, narrow = (torch.randn(1, length, size) for size in (model.config.text_config.hidden_size, head))
        text(wide.requires_grad_(), narrow, narrow)
    assert {size[1] for size in text.graphs} == {64, 192}
    assert text.record.made == 3


def test_a_size_that_does_not_fit_is_left_to_the_layers(model, monkeypatch, capsys):
    batch = batch_of(range(4))
    loss = compute(model)(batch)
    gradients = gradients_of(model)
    model.zero_grad()
    used = attached(model)

    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "Graph", out_of_memory)
    assert max(graphs.difference(compute(model)(batch), gradients_of(model), loss, gradients)) < 1e-6
    assert all(stack.left_out and not stack.graphs for stack in used.stacks)
    again = graphs.Graphs(model, torch.float32, False, recorder=Again)
    used.release()
    with pytest.raises(graphs.GraphsTooLarge) as raised:
        graphs.check(again, compute(model), batch, batch)
    assert isinstance(raised.value, TooLarge) and not again.stacks

    def not_permitted(*arguments):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "Graph", not_permitted)
    assert graphs.check(again, compute(model), batch, batch) is None
    said = capsys.readouterr().out
    assert said.startswith("Without CUDA graphs: they can't be recorded here (CUDA error: operation not permitted when")
    assert not again.stacks


def test_graphs_that_compute_something_else_are_not_used(model, monkeypatch, capsys):
    batch, other = batch_of(range(4)), batch_of([3, 2, 1, 0])
    used = graphs.Graphs(model, torch.float32, False, recorder=Again)
    assert max(graphs.check(used, compute(model), batch, other)) < 1e-5
    assert used.recorded() and not capsys.readouterr().out
    used.release()
    usual = graphs.Replay.forward

    def stale(context, anchor, hidden, graph, others):
        """Keeps the rotations of the samples that it was recorded with."""
        return usual(context, anchor, hidden, graph, [*graph.inputs[1:]])

    monkeypatch.setattr(graphs.Replay, "forward", stale)
    assert graphs.check(used, compute(model), batch, other) is None
    assert "Without CUDA graphs: with them, the loss is" in capsys.readouterr().out
    assert not used.stacks
    assert not any("forward" in vars(part) for part in model.modules() if type(part).__name__ in graphs.STACKS)


def test_weights_that_have_moved_are_recorded_anew(model):
    used, batch = attached(model), batch_of(range(4))
    compute(model)(batch)
    stacks = used.stacks
    used.follow()
    assert used.stacks is stacks
    moved = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    moved.data = moved.data.clone() * 2
    model.zero_grad()
    used.follow()
    assert used.stacks is not stacks and not used.recorded()


def test_who_can_use_them(model, monkeypatch):
    options = SimpleNamespace(world_size=1, lora_dropout=0.0, max_steps=30)
    assert graphs.unusable(model, options) == "they need an NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 40e9))
    assert graphs.unusable(model, options) is None
    assert graphs.wanted(model, options, "auto") and not graphs.wanted(model, options, "false")
    few = SimpleNamespace(**{**vars(options), "max_steps": 5})
    assert not graphs.wanted(model, few, "auto") and graphs.wanted(model, few, "true")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16e9, 16e9))
    assert not graphs.wanted(model, options, "auto") and graphs.wanted(model, options, "true")
    for changed, why in (({"world_size": 2}, "processes"), ({"lora_dropout": 0.1}, "dropout")):
        other = SimpleNamespace(**{**vars(options), **changed})
        assert why in graphs.unusable(model, other)
        with pytest.raises(SystemExit, match="--cuda_graphs true can't be done"):
            graphs.wanted(model, other, "true")
        assert not graphs.wanted(model, other, "auto") and not graphs.wanted(model, other, "false")


def test_lengths_are_rounded_to_few():
    lengths = (1, 32, 33, 64, 65, 512, 513, 641)
    assert [graphs.rounded(length, graphs.TOKENS, False) for length in lengths] == [64, 64, 64, 64, 128, 512, 640, 768]
    assert [graphs.rounded(length, graphs.TOKENS, True) for length in lengths] == [32, 32, 64, 64, 96, 512, 576, 704]
