"""Every architecture that people ask for goes through the script: tiny random models of each, made by `zoo`."""

import json
import re
from collections import defaultdict

import pytest
import torch
import zoo
from conftest import ROOT, execute, run
from datasets import load_dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qwen_vl_kit.models import KINDS, has_areas, kind_of

# What can't be done, and the words that say so at the start.
REFUSED = {
    "kimi_k25": "opens a thought",
    "minicpmv4_6": "images of several sizes",
    "deepseek_ocr2": "PEFT does not find its adapters again",
    "got_ocr2": "can't be asked a question that shows an image",
}
# transformers 5.17 counts HunYuan's images through the batch: the third is read a little otherwise than alone.
BY_NUMBER = "hunyuan_vl"
OPTIONS = ("--max_steps", 2, "--batch_size", 4, "--num_test_rows", 4, "--max_new_tokens", 8, "--load_in_4bit", "false")
OPTIONS += ("--learning_rate", 1e-2, "--warmup_steps", 0, "--save_strategy", "no", "--dataset_name", "demo/data")


@pytest.fixture(scope="module", params=[name for name in zoo.ARCHITECTURES if name not in REFUSED])
def ran(request, tmp_path_factory):
    """The names that the script leaves after two steps with a model of one architecture, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    zoo.make(request.param, folder / "model")
    options = ("--model_name_or_path", folder / "model", *OPTIONS, "--output_dir", folder / "run")
    return execute(*options), folder


def in_docs():
    """{architecture: (whether --min_pixels is for it, what is said of it)} of the table in docs/models.md."""
    rows = re.findall(r"^\|.*\| `(\w+)` \| (yes)? ?\|(.*)\|$", (ROOT / "docs/models.md").read_text(), re.M)
    return {name: (bool(areas), what) for name, areas, what in rows}


def test_the_table_of_the_docs_is_what_is_tried():
    assert {*in_docs()} == {*zoo.ARCHITECTURES}
    assert {name for name, (_, what) in in_docs().items() if "refused" in what} == {*REFUSED}


def test_what_the_docs_say_of_it(ran, request):
    names, _ = ran
    areas, what = in_docs()[request.node.callspec.params["ran"]]
    assert areas == has_areas(names["processor"].image_processor)
    assert ("told not to think" in what) == ("<think>" in names["prompt"])


def test_each_kind_of_layer_learns(ran):
    names, folder = ran
    weights, moved = load_file(folder / "run/adapter/adapter_model.safetensors"), defaultdict(list)
    for name, tensor in weights.items():
        if "lora_B" in name:  # zeros at first
            moved[kind_of(name)].append(bool(tensor.any()))
    assert {*moved} == {*KINDS}, "adapters in each part"
    assert all(any(layers) for layers in moved.values())
    still = [name for name, tensor in weights.items() if "lora_B" in name and not tensor.any()]
    assert len(still) * 2 < len(weights) / 2, still
    adapted = " ".join(weights)
    assert not [part for part in ("merger", "projector", "lm_head", "audio", "connector") if part in adapted]


def test_labels_are_the_answer_and_its_end(ran):
    names, _ = ran
    tokenizer = names["processor"].tokenizer
    samples = [names["train_set"][number] for number in range(4)]
    batch = names["collate"](samples)
    for sample, ids, labels in zip(samples, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        learned = [label for label in labels if label != -100]
        first = labels.index(learned[0])
        assert ids[first : first + len(learned)] == learned and learned[-1] in end_tokens(names)
        assert tokenizer.decode(learned) == sample["answer"]
        before = tokenizer.decode(ids[:first])
        assert before.rstrip().endswith(names["prompt"].rstrip()[-8:]), "it begins where the generation prompt ends"


def end_tokens(names):
    ends = names["model"].generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def test_a_batch_reads_as_one_by_one(ran):
    names, _ = ran
    texts = [reading["text"] for reading in names["readings_after"]]
    assert [reading["text"] for reading in names["read"](names["test_set"], 1)] == texts
    model, images = names["model"].eval(), [names["test_set"][number]["image"] for number in range(4)]
    with torch.no_grad():
        together = model(**names["encode"](images, "left")).logits[:, -1]
        apart = torch.cat([model(**names["encode"]([image], "left")).logits[:, -1] for image in images])
    if model.config.model_type == BY_NUMBER:
        assert (together - apart).abs().max() > 1e-3, "no longer: take it out, here and in docs/models.md"
    else:
        torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)
    assert (together[0] - together[1]).abs().max() > 1e-3, "it looks at the images"


def test_the_adapter_reads_the_same_in_plain_peft_and_merged(ran):
    names, folder = ran
    inputs = names["encode"]([names["test_set"][number]["image"] for number in range(4)], "left")
    how = {"max_new_tokens": 8, "do_sample": False}
    wanted = names["model"].eval().generate(**inputs, **how)
    base = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    base.generation_config = names["model"].generation_config
    model = PeftModel.from_pretrained(base, folder / "run/adapter").eval()
    assert model.generate(**inputs, **how).equal(wanted)
    with torch.no_grad():
        adapted = model(**inputs).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, adapted, rtol=1e-3, atol=1e-3)
    assert merged.generate(**inputs, **how).equal(wanted)


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_done_is_said_at_the_start(name, tmp_path):
    zoo.make(name, tmp_path / "model")
    ended = run("--model_name_or_path", tmp_path / "model", *OPTIONS, "--output_dir", tmp_path / "run")
    said = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode and REFUSED[name] in said and "Traceback" not in ended.stderr
    assert "Training" not in ended.stdout and not (tmp_path / "run/adapter").exists()


def test_sizes_of_images_are_set_or_said(tmp_path):
    """Some models have a least and a largest area; with others, nothing is ignored in silence."""
    zoo.make("gemma3", tmp_path / "gemma3")
    options = ("--model_name_or_path", tmp_path / "gemma3", *OPTIONS, "--output_dir", tmp_path / "run")
    ended = run(*options, "--min_pixels", 9000)
    assert ended.returncode and "leave out --min_pixels" in ended.stderr.strip().splitlines()[-1]
    ended = run(*options)
    assert ended.returncode == 0 and "sizes images in its own way" in ended.stdout
    zoo.make("qwen3_vl", tmp_path / "qwen3_vl")
    few, many = (
        execute(
            *OPTIONS,
            "--model_name_or_path",
            tmp_path / "qwen3_vl",
            "--output_dir",
            tmp_path / str(area),
            "--min_pixels",
            area,
        )["collate"]  # fmt: skip
        for area in (4096, 12000)
    )
    sample = load_dataset("demo/data", split="test")[0]
    sample = {"image": sample["image"].convert("RGB"), "answer": "x"}
    assert many([sample])["input_ids"].shape[1] > few([sample])["input_ids"].shape[1]


def test_the_layers_of_qwen2_vl_are_those_of_the_published_recipe(tmp_path):
    zoo.make("qwen2_vl", tmp_path / "model")
    names = execute(*OPTIONS, "--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "run")
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    endings = {pattern.rpartition("N.")[2] for pattern in config["target_modules"].replace(r"\d+", "N").split("|")}
    language = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert endings == language | {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert names["model"].get_nb_trainable_parameters()[0] > 0
