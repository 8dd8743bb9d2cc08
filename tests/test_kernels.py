"""The room `kernels` with a stand-in for Unsloth, and what else a GPU is kept busy by: no GPU is needed."""

import copy
import subprocess
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

from qwen_vl_kit import feeding, kernels


class Rotation:
    """Rotates (1, tokens, heads, size) in its place."""

    @staticmethod
    def apply(part, cos, sin):
        return part * cos[:, None] + qwen2_vl.rotate_half(part) * sin[:, None]


def usual_norm(part, x):
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + part.variance_epsilon)
    return part.weight * x


def usual_mlp(part, x, inplace):
    return part.down_proj(torch.nn.functional.silu(part.gate_proj(x)) * part.up_proj(x))


@pytest.fixture
def unsloth(monkeypatch):
    """Stands in for the modules of Unsloth whose kernels are used; they compute what the model does."""
    found = SimpleNamespace(norm=usual_norm, mlp=usual_mlp, rotation=Rotation, used=set())

    def through(name):
        def function(*arguments, **options):
            found.used.add(name)
            return getattr(found, name)(*arguments, **options)

        return function

    modules = {name: ModuleType(name) for name in ("unsloth", "unsloth.kernels")}
    modules["unsloth.kernels"].fast_rms_layernorm = through("norm")
    modules["unsloth.kernels"].apply_lora_mlp_swiglu = through("mlp")
    for name in ("fast_lora", "utils", "rope_embedding"):
        modules[f"unsloth.kernels.{name}"] = ModuleType(name)
    lora = type("LoRA_W", (), {"apply": staticmethod(lambda x, w, q, a, b, s: x @ w.T + s * (x @ a.T @ b.T))})
    modules["unsloth.kernels.fast_lora"].LoRA_W = lora
    modules["unsloth.kernels.utils"].get_lora_parameters_bias = lambda layer: (
        layer.base_layer.weight, None, layer.lora_A["default"].weight, layer.lora_B["default"].weight,
        layer.scaling["default"], layer.base_layer.bias,
    )  # fmt: skip
    modules["unsloth.kernels.rope_embedding"].Fast_RoPE_Embedding = SimpleNamespace(
        apply=lambda *arguments: (found.used.add("rotation"), found.rotation.apply(*arguments))[1]
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture(scope="module")
def original():
    base = AutoModelForImageTextToText.from_pretrained("demo/model", dtype=torch.float32)
    linear = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|attn\.proj|fc1|fc2)"
    model = get_peft_model(base, LoraConfig(r=4, target_modules=linear, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


def logits(model):
    ids = torch.arange(20, 40)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_kernels_take_the_place_of_what_computes_the_same(model, unsloth):
    expected = logits(model)
    restore = kernels.install(model, torch.float32)
    assert unsloth.used == {"norm", "mlp", "rotation"}
    assert all(parameter.grad is None for parameter in model.parameters())
    unsloth.used.clear()
    changed = logits(model)
    assert unsloth.used == {"norm", "mlp", "rotation"}
    assert torch.allclose(changed, expected, atol=1e-4)
    unsloth.used.clear()
    with torch.no_grad():  # one token after another, its weights are better left in 4 bits
        logits(model)
    assert unsloth.used == {"norm", "rotation"}
    restore()
    unsloth.used.clear()
    assert torch.equal(logits(model), expected)
    assert not unsloth.used
    assert not any("forward" in vars(part) for part in model.modules())


def failing(*arguments, **options):
    raise ValueError("ptxas fatal\nmore")


@pytest.mark.parametrize("wrong", ["norm", "mlp", "rotation", "failing"])
def test_a_kernel_that_computes_something_else_is_not_used(model, unsloth, capsys, wrong):
    expected = logits(model)
    if wrong == "norm":  # as Gemma's
        unsloth.norm = lambda part, x: usual_norm(part, x) / part.weight * (1 + part.weight)
    elif wrong == "mlp":  # right, with a gradient that is not
        unsloth.mlp = lambda part, x, inplace: usual_mlp(part, x.detach(), inplace) + 0 * x
    elif wrong == "failing":
        unsloth.norm = failing
    else:
        unsloth.rotation = type("Other", (), {"apply": staticmethod(lambda part, cos, sin: part * cos[:, None])})
    restore = kernels.install(model, torch.float32)
    unsloth.used.clear()
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert unsloth.used == {"norm", "mlp", "rotation"} - {"norm" if wrong == "failing" else wrong}
    part = {"mlp": "Qwen2MLP", "rotation": "rotations"}.get(wrong, "Qwen2VLRMSNorm")
    why = "fails here (ptxas fatal)" if wrong == "failing" else "does not compute the same"
    assert capsys.readouterr().out.splitlines()[-1] == f"Without the kernel for {part}, which {why}"
    restore()


def test_the_next_batch_is_made_meanwhile():
    made, asked = [], threading.Event()

    def batches():
        for number in range(3):
            made.append((number, threading.current_thread() is threading.main_thread()))
            yield {"number": number}

    got = []
    for batch in feeding.ahead(batches):
        for _ in range(100):
            if len(made) > len(got) + 1 or len(got) == 2:
                asked.set()
                break
            time.sleep(0.02)
        got.append(batch["number"])
    assert got == [0, 1, 2] and asked.is_set()
    assert made == [(0, False), (1, False), (2, False)]


def test_what_goes_wrong_in_a_batch_is_raised_where_it_is_taken():
    def batches():
        yield 1
        raise ValueError("row 7 is broken")

    with pytest.raises(ValueError, match="row 7 is broken"):
        list(feeding.ahead(batches))
    abandoned = feeding.ahead(lambda: iter(range(1, 9)))
    assert next(abandoned) == 1
    abandoned.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feeding")]


def test_unsloth_patches_one_trainer(tmp_path):
    """As Unsloth's own module does it: a function is defined, and called by another module."""
    package = tmp_path / "unsloth"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("from unsloth.models import rl\nrl.PatchFastRL()\n")
    (package / "models/__init__.py").write_text("")
    (package / "models/rl.py").write_text(
        "def _patch_trl_rl_trainers(name): print('patched', name)\n"
        "def patch_trl_rl_trainers():\n    for name in ('dpo_trainer', 'sft_trainer'): _patch_trl_rl_trainers(name)\n"
        "def PatchFastRL(): patch_trl_rl_trainers()\n"
    )
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{{}}import unsloth"
    for prepare, patched in (
        ("from qwen_vl_kit import environment; environment.prepare()\n", ["sft_trainer"]),
        ("sys.modules['IPython'] = sys\nfrom qwen_vl_kit import environment; environment.prepare()\n", None),
        ("", ["dpo_trainer", "sft_trainer"]),
    ):
        ended = subprocess.run([sys.executable, "-c", program.format(prepare)], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.split()[1::2] == (patched or ["dpo_trainer", "sft_trainer"])
