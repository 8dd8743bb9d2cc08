"""Generating with a cache that stays where it is reads as `generate` does. Here without graphs, which need a GPU."""

import pytest
import torch
import zoo
from conftest import ROOT
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    LogitsProcessor,
    TextStreamer,
)

from qwen_vl_kit import graph_reading, loading
from qwen_vl_kit.graph_reading import install
from qwen_vl_kit.memory import TooLarge, if_it_fits
from qwen_vl_kit.reader import Reader

LIMIT = 24
CHANCE = {"do_sample": True, "temperature": 1.5, "min_p": 0.1}


def reader_of(name, adapters=False, **how):
    model = AutoModelForImageTextToText.from_pretrained(name, **how)
    model.generation_config = loading.greedy(model.generation_config)
    if adapters:  # that change what is read, and leave it like LaTeX
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=1, target_modules=r".*(_proj|qkv|fc\d)"))
        for layer, weight in model.named_parameters():
            if "lora_B" in layer:
                torch.nn.init.normal_(weight, std=0.1)
    return Reader(None, model, loading.load_processor(name), loading.INSTRUCTION, LIMIT, 16)


@pytest.fixture(scope="module")
def reads():
    return reader_of(ROOT / "demo/model", adapters=True)


@pytest.fixture(scope="module")
def pictures():
    """The demo's held-out set."""
    return load_dataset(str(ROOT / "demo/data"), split="test")["image"][:100]


@pytest.fixture
def generator(reads):
    """What decodes for the model from here on, until the test ends."""
    usual = reads.model.generate
    yield install(reads.model)
    reads.model.generate = usual


@pytest.fixture
def moves(monkeypatch):
    """(rows, length) of each step that another one continues, or nothing if none does."""
    moves, moved = [], graph_reading.Step.moved

    def watched(self, used, length, rows):
        step = moved(self, used, length, rows)
        moves.append((len(step.token), length))
        return step

    monkeypatch.setattr(graph_reading.Step, "moved", watched)
    return moves


def generated(reads, pictures, **how):
    how = {"max_new_tokens": LIMIT, "do_sample": False} | how
    return reads.model.generate(**reads.inputs(pictures), **how)


def with_ends(reads, monkeypatch, *words):
    """Has these words, too, end a reading."""
    ends = [*reads.model.generation_config.eos_token_id, *reads.processor.tokenizer.convert_tokens_to_ids(words)]
    monkeypatch.setattr(reads.model.generation_config, "eos_token_id", ends)


# ---------------------------------------------------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------------------------------------------------


def test_all_readings_are_those_of_generate(reads, pictures, request):
    usual = reads.read(pictures)
    assert len({reading.text for reading in usual}) > len(usual) / 2, "readings of images, not of nothing"
    generator = request.getfixturevalue("generator")
    now = reads.read(pictures)
    assert generator.why_not is None and generator.difference < 1e-5
    assert [(reading.text, reading.cut) for reading in now] == [(reading.text, reading.cut) for reading in usual]
    for one, other in zip(now, usual, strict=True):
        assert one.certainty == pytest.approx(other.certainty, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_tokens_are_those_of_generate(rows, reads, pictures, request):
    usual = generated(reads, pictures[-rows:])
    generator = request.getfixturevalue("generator")
    now = generated(reads, pictures[-rows:])
    assert torch.equal(now, usual) and now.dtype == usual.dtype and generator.why_not is None


def test_rows_that_have_ended_are_left_out(reads, pictures, monkeypatch, moves, request):
    with_ends(reads, monkeypatch, "}", "_", "^", "+")
    usual = generated(reads, pictures[:32])
    watched = reads.read_batch(pictures[:32])
    generator = request.getfixturevalue("generator")
    monkeypatch.setattr(graph_reading, "CHECK_EVERY", 2)
    monkeypatch.setattr(graph_reading, "WORTH", 1)
    assert torch.equal(generated(reads, pictures[:32]), usual) and generator.why_not is None
    sizes = [rows for rows, _ in moves]
    assert len(sizes) > 1 and sizes == sorted(sizes, reverse=True) and sizes[0] <= 16
    for one, other in zip(reads.read_batch(pictures[:32]), watched, strict=True):
        assert one[:2] == other[:2] and one.certainty == pytest.approx(other.certainty, abs=1e-4)


@pytest.mark.parametrize("how", [{}, {"repetition_penalty": 1.2}])
def test_the_cache_grows_as_tokens_come(how, reads, pictures, monkeypatch, moves, request):
    with_ends(reads, monkeypatch, "}")
    usual = generated(reads, pictures[:6], **how)
    generator = request.getfixturevalue("generator")
    monkeypatch.setattr(graph_reading, "room", lambda used, *_: used + 4)
    assert torch.equal(generated(reads, pictures[:6], **how), usual) and not generator.why_not
    assert len(moves) > 1 and {rows for rows, _ in moves} == {6}


def test_without_a_token_that_ends(reads, pictures, monkeypatch, request):
    monkeypatch.setattr(reads.model.generation_config, "eos_token_id", None)
    usual = generated(reads, pictures[:2], max_new_tokens=70)
    generator = request.getfixturevalue("generator")
    assert torch.equal(generated(reads, pictures[:2], max_new_tokens=70), usual) and not generator.why_not


def test_how_long_a_cache_is():
    """As long as the limit asks for, but little longer than needed, and twice as long each time."""
    assert graph_reading.room(100, 1, 24) == 128 and graph_reading.room(100, 1, 128) == 256
    assert graph_reading.room(100, 1, 4096) == 256 and graph_reading.room(256, 157, 4096) == 448


def test_a_long_limit_does_not_take_a_long_cache(reads, pictures, monkeypatch, generator):
    lengths, made = [], graph_reading.Layer.__init__

    def watched(self, keys, values, length, place):
        lengths.append(length)
        made(self, keys, values, length, place)

    monkeypatch.setattr(graph_reading.Layer, "__init__", watched)
    tokens = generated(reads, pictures[:4], max_new_tokens=4096)
    assert max(lengths) < tokens.shape[1] + 192


@pytest.mark.parametrize("how", [{}, {"min_new_tokens": 3}, {"repetition_penalty": 1.3}, CHANCE, CHANCE | {"top_k": 5}])
def test_other_ways_to_choose_tokens(how, reads, pictures, request):
    class Never(LogitsProcessor):
        """Changes scores in place, and remembers them."""

        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores):
            scores[:, 20] = -torch.inf
            self.seen.append(scores)
            return scores

    def now():
        torch.manual_seed(0)
        never = Never()
        return generated(reads, pictures[:5], logits_processor=[never], **how), never.seen

    usual, seen = now()
    generator = request.getfixturevalue("generator")
    tokens, same = now()
    assert torch.equal(tokens, usual) and generator.why_not is None
    assert len(seen) == len(same) and all(torch.allclose(*pair, atol=1e-4) for pair in zip(seen, same, strict=True))


def test_the_stream(reads, pictures, capsys, request):
    def streamed():
        torch.manual_seed(1)
        tokenizer = reads.processor.tokenizer
        generated(reads, pictures[:1], **CHANCE, streamer=TextStreamer(tokenizer, skip_prompt=True))
        return capsys.readouterr().out, [*reads.stream(pictures[1])], [*reads.stream(pictures[2], stopped=lambda: True)]

    out, pieces, stopped = streamed()
    generator = request.getfixturevalue("generator")
    same_out, same_pieces, same_stopped = streamed()
    assert out == same_out and len(out) > 3 and generator.why_not is None and generator.difference is not None
    assert len(stopped) == len(same_stopped) == 1
    for one, other in zip(pieces, same_pieces, strict=True):
        assert one.text == other.text and one.ends == other.ends
        assert one.probability == pytest.approx(other.probability, abs=1e-4)


def test_what_a_streamer_raises_is_raised(reads, pictures, generator):
    class Broken(TextStreamer):
        def put(self, value):
            if value.numel() == 1:
                raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        generated(reads, pictures[:1], streamer=Broken(reads.processor.tokenizer))
    assert generator.why_not is None


# ---------------------------------------------------------------------------------------------------------------------
# The model meanwhile
# ---------------------------------------------------------------------------------------------------------------------


def test_adapters_change_between_readings(reads, pictures, generator):
    usual = type(reads.model).generate.__get__(reads.model)

    def both():
        inputs = reads.inputs(pictures[:8])
        now = reads.model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
        assert torch.equal(now, usual(**inputs, max_new_tokens=LIMIT, do_sample=False))
        return now

    adapters = [(name, weight) for name, weight in reads.model.named_parameters() if "lora_B" in name]
    kept, before = [weight.data for _, weight in adapters], both()
    with reads.model.disable_adapter():
        assert not torch.equal(both(), before)
    for _, weight in adapters:
        weight.data = torch.randn_like(weight) * 0.2
    assert not torch.equal(both(), before)
    reads.model.merge_adapter()
    both()
    reads.model.unmerge_adapter()
    for (_, weight), data in zip(adapters, kept, strict=True):
        weight.data = data
    assert torch.equal(both(), before) and generator.why_not is None


def test_nothing_of_the_model_stays_changed(reads, pictures, generator):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    layers = [layer for layer in reads.model.modules() if hasattr(layer, "lora_A")]
    own = layers[0].forward
    layers[0].forward = fused = lambda x: own(x)  # as `models.fuse` has it
    generated(reads, pictures[:2])
    assert layers[0].forward is fused and not [layer for layer in layers[1:] if "forward" in vars(layer)]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
    del layers[0].forward


def test_a_model_in_training_is_left_alone(reads, pictures, generator):
    reads.model.train()
    generated(reads, pictures[:2])
    reads.model.eval()
    assert generator.difference is None


def test_weights_in_4_bits(pictures):
    """bitsandbytes' layers below the adapters, as most runs have them."""
    nf4 = BitsAndBytesConfig(**loading.NF4, bnb_4bit_compute_dtype=torch.float32)
    reads = reader_of(ROOT / "demo/model", adapters=True, quantization_config=nf4, dtype=torch.float32)
    for layer in reads.model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    usual = generated(reads, pictures[:4])
    generator = install(reads.model)
    assert torch.equal(generated(reads, pictures[:4]), usual) and generator.why_not is None


def test_16_bits_pass_the_check(pictures):
    reads = reader_of(ROOT / "demo/model", adapters=True, dtype=torch.bfloat16)
    generator = install(reads.model)
    with torch.autocast("cpu", torch.bfloat16):
        generated(reads, pictures[:4])
    assert generator.why_not is None and 0 < generator.difference < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# What it is not for
# ---------------------------------------------------------------------------------------------------------------------


def wrong_place(self, usual=graph_reading.Step.logits):
    self.position.add_(1)
    return usual(self)


def broken(self):
    raise ValueError("no such kernel\nat all")


@pytest.mark.parametrize(("logits", "why"), [(wrong_place, "differ by"), (broken, "no such kernel")])
def test_never_faster_and_wrong(logits, why, reads, pictures, monkeypatch, capsys, request):
    usual = generated(reads, pictures[:3])
    generator = request.getfixturevalue("generator")
    monkeypatch.setattr(graph_reading.Step, "logits", logits)
    assert torch.equal(generated(reads, pictures[:3]), usual)
    assert why in generator.why_not
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1
    assert torch.equal(generated(reads, pictures[:3]), usual) and not capsys.readouterr().err


def test_running_out_of_memory_is_for_the_caller(reads, pictures, monkeypatch, generator):
    sizes, usual = [], graph_reading.Step.logits

    def logits(self):
        sizes.append(len(self.token))
        if len(self.token) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(self)

    monkeypatch.setattr(graph_reading.Step, "logits", logits)
    assert if_it_fits(lambda: generated(reads, pictures[:3]), divisible=True) is None
    assert generator.why_not is None and sizes[-1] == 3
    assert if_it_fits(lambda: generated(reads, pictures[:2]), divisible=True) is not None
    # In the check, too, which then is still to be made.
    generator.difference = None
    monkeypatch.setattr(graph_reading.Step, "logits", lambda self: (_ for _ in ()).throw(TooLarge("much")))
    with pytest.raises(TooLarge):
        generated(reads, pictures[:2])
    assert generator.why_not is None and generator.difference is None


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 2},
        {"return_dict_in_generate": True, "output_logits": True},
        {"use_cache": False, "max_new_tokens": 3},
        {"generation_config": GenerationConfig(max_new_tokens=3)},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_all_else_is_generate_s(how, reads, pictures, request):
    usual = generated(reads, pictures[:2], **how)
    generator = request.getfixturevalue("generator")
    now = generated(reads, pictures[:2], **how)
    usual, now = (tokens if isinstance(tokens, torch.Tensor) else tokens.sequences for tokens in (usual, now))
    assert torch.equal(usual, now) and generator.difference is None and generator.why_not is None


SAME = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "glm_ocr", "llava_onevision"]
OTHERS = {"gemma3": "some layers keep", "qwen3_5": "some layers keep", "mllama": "hands on more"}


@pytest.mark.parametrize("name", [*SAME, *OTHERS])
def test_architectures(name, pictures, tmp_path, capsys):
    zoo.make(name, tmp_path)
    reads = reader_of(tmp_path, dtype=torch.float32)
    usual = generated(reads, pictures[:6], max_new_tokens=12)
    generator = install(reads.model)
    assert torch.equal(generated(reads, pictures[:6], max_new_tokens=12), usual)
    assert OTHERS[name] in generator.why_not if name in OTHERS else generator.difference < 1e-5
    assert (generator.why_not or "") in capsys.readouterr().err
