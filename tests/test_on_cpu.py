"""The rooms `on_cpu` and `attention`: less is launched, and every result is the same, bit for bit."""

import copy

import numpy as np
import pytest
import torch
import zoo
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from qwen_vl_kit import attention, on_cpu

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained("demo/model")


def load(quantized=True, alpha=16, dropout=0.0):
    """The demo's model with adapters that are not nothing."""
    how = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **NF4)} if quantized else {}
    base = AutoModelForImageTextToText.from_pretrained("demo/model", dtype=torch.float32, **how)
    for layer in base.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    torch.manual_seed(0)
    layers = r".*\.(qkv|proj|fc1|fc2|q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    config = LoraConfig(target_modules=layers, r=8, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(base, config).train()


def batch(processor, sizes):
    """A question with an answer for a noisy image of each size."""
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 255, (height, width, 3), np.uint8)) for width, height in sizes]
    texts = [f"<|vision_start|><|image_pad|><|vision_end|> x ^ {{ {number} }}" for number in range(len(sizes))]
    inputs = processor(text=texts, images=[[image] for image in images], padding=True, return_tensors="pt")
    return {**inputs, "labels": inputs["input_ids"]}


def computed(model, inputs):
    """Logits and all gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)  # of the dropout
    output = model(**inputs)
    output.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    return [output.logits.detach(), *gradients]


def equal(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


def counted(monkeypatch, module, name):
    """Counts the calls of a function. Returns a list that grows by one with each."""
    calls, usual = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments, **how: (calls.append(1), usual(*arguments, **how))[1])
    return calls


SIZES = {
    "alike": [(56, 28)] * 4,
    "sorted": [(28, 28), (28, 28), (56, 28), (84, 42)],
    "mixed": [(84, 42), (28, 28), (56, 28), (28, 28), (28, 56)],
    "one": [(70, 42)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("how", [{}, {"alpha": 8}, {"dropout": 0.1}, {"quantized": False}], ids=str)
def test_results_are_the_same_bit_for_bit(processor, sizes, how):
    model, inputs = load(**how), batch(processor, sizes)
    expected = computed(model, inputs)
    on_cpu.install(model)
    attention.install(model)
    assert equal(computed(model, inputs), expected)
    assert len({tensor.abs().max().item() for tensor in expected}) > 50  # and they are not all nothing


def test_weights_are_dequantized_once(processor, monkeypatch):
    model, inputs = load(), batch(processor, SIZES["mixed"])
    calls = counted(monkeypatch, torch.ops.bitsandbytes.gemm_4bit, "default")
    computed(model, inputs)
    assert len(calls) > 50
    on_cpu.install(model)
    calls.clear()
    computed(model, inputs)
    assert not calls


def test_a_large_model_stays_in_4_bits(processor, monkeypatch):
    monkeypatch.setattr(on_cpu, "MOST", 1e6)
    model, inputs = load(), batch(processor, SIZES["one"])
    on_cpu.install(model)
    calls = counted(monkeypatch, torch.ops.bitsandbytes.gemm_4bit, "default")
    computed(model, inputs)
    assert len(calls) > 50


def test_attention_is_called_for_each_size_and_block(processor, monkeypatch):
    model, inputs = load(), batch(processor, SIZES["mixed"])
    attention.install(model)
    calls = counted(monkeypatch, attention, "scaled_dot_product_attention")
    computed(model, inputs)
    assert len(calls) == 3 * len(model.get_base_model().model.visual.blocks)  # 28 x 56 has the patches of 56 x 28


@pytest.mark.parametrize("change", ["merged", "disabled", "second adapter", "bfloat16"])
def test_what_changes_afterwards_is_followed(processor, change):
    """Adapters that are merged into the weights, switched off or exchanged, and other types."""
    model, inputs = load(), batch(processor, SIZES["one"])
    other = copy.deepcopy(model)
    on_cpu.install(model)
    attention.install(model)
    untouched = model(**inputs).logits
    assert torch.equal(other(**inputs).logits, untouched)
    for one in (model, other):
        if change == "merged":
            one.merge_adapter()
        elif change == "disabled":
            one.base_model.disable_adapter_layers()
        elif change == "second adapter":
            torch.manual_seed(5)
            one.add_adapter("second", one.peft_config["default"])
            one.set_adapter("second")
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "bfloat16"):
        now, expected = model(**inputs).logits, other(**inputs).logits
    assert torch.equal(now, expected) and not torch.equal(now.float(), untouched)


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_image_encoders_of_other_architectures(architecture, tmp_path):
    """Their features, and the gradients of all their weights."""
    zoo.make(architecture, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    images = [Image.effect_noise(size, 100).convert("RGB") for size in [(140, 56), (56, 56), (56, 140), (112, 84)]]
    inputs = processor.image_processor(images=images, return_tensors="pt")
    results = []
    for change in (lambda model: None, attention.install):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
        change(model)
        encoder = model.model.visual
        seen = encoder(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        seen = torch.cat([*seen]) if isinstance(seen, (tuple, list)) else seen
        seen.square().sum().backward()
        results.append([seen.detach(), *(weights.grad for weights in encoder.parameters() if weights.grad is not None)])
    assert equal(*results)
    assert encoder.config._attn_implementation == attention.NAME and len(results[0]) > 10
