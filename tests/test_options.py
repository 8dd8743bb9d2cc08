"""Each of TRL's options does what it says, or is refused in one sentence before anything is loaded."""

import json
import re
import shlex
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from conftest import execute, run, run_changed
from safetensors.torch import load_file
from trl import SFTConfig

from qwen_vl_kit import recipe
from qwen_vl_kit.help_text import OFTEN
from qwen_vl_kit.offered import NEEDS, REFUSED, UNSEEN, WORKS, check, check_possible
from qwen_vl_kit.options import ExtraOptions, Parser, parse
from qwen_vl_kit.results import config


def test_every_option_is_known():
    """A new version of TRL that brings options is noticed here: try them, then sort them in."""
    known = [*WORKS, *UNSEEN, *REFUSED]
    assert len(known) == len({*known}), "an option is sorted in twice"
    assert {*known} == {field.name for field in fields(SFTConfig)}
    assert {*NEEDS} <= WORKS | UNSEEN


@pytest.fixture(scope="module")
def options_class(tiny, tmp_path_factory):
    """The script's Options, from a run with the defaults."""
    options = (*tiny, "--max_steps", 1, "--save_strategy", "no")
    return execute(*options, "--output_dir", tmp_path_factory.mktemp("usual"))["Options"]


class Told(Exception):
    """A sentence that would have ended the run."""


def tell(sentence):
    raise Told(sentence)


def test_the_command_of_the_report_sets_what_a_config_file_and_a_command_line_set(options_class, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        'instruction: "What\'s $x$?"\nlr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 2}\n'
        "save_merged: true\nwarmup_steps: 0\nreport_to: [tensorboard]\nsave_strategy: no\n"
    )
    words = [
        "--config",
        str(config),
        "--max_steps",
        "7",
        "--hub_token",
        "hf_secret",
        "--dataloader_pin_memory",
        "false",
    ]
    words += ["--output_dir", str(tmp_path)]
    options, extra, parser = parse(options_class, words)
    noted = recipe.note(parser.given, parser.unset, 1)
    program, script, *again = shlex.split(noted["command"])
    assert (program, script) == ("python", "finetune_qwen_vl.py")
    assert not {"--hub_token", "--config", "--output_dir"} & {*again} and "hf_secret" not in json.dumps(noted)
    assert noted["changed"]["max_steps"] == [30, 7]
    same, same_extra, _ = parse(options_class, [*again, "--output_dir", str(tmp_path)])
    assert same.to_sanitized_dict() == options.to_sanitized_dict() and same_extra == extra


def test_the_command_of_the_report_starts_as_many_processes(options_class, monkeypatch):
    *_, parser = parse(options_class, [])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    command = "torchrun --nproc_per_node 2 finetune_qwen_vl.py"
    assert recipe.note(parser.given, parser.unset, 2) == {"changed": {}, "command": command}
    assert recipe.note(parser.given, parser.unset, 4) == {"changed": {}}, "of two machines it would not be enough"


def test_help_lists_what_is_offered(options_class):
    parser = Parser([options_class, ExtraOptions])
    listed = parser.format_all()
    for name in WORKS | UNSEEN:
        assert len(re.findall(rf"^  --{name}[ \n]", listed, re.M)) == 1, name
    for text in (listed, parser.format_help()):
        assert not [name for name in REFUSED if re.search(rf"--(no_)?{name}[ ,\n]", text)]


def test_help_fits_on_a_screen_and_a_half(options_class, monkeypatch):
    """Of 45 lines, 100 columns: each setting, each option of the kit and what people change of the trainer's."""
    monkeypatch.setenv("COLUMNS", "100")
    parser = Parser([options_class, ExtraOptions])
    lines = run("--help").stdout.splitlines()
    assert len(lines) <= 45 * 1.5 + 0.5 and max(map(len, lines)) <= 100
    listed = [line.split()[0][2:] for line in lines if line.startswith("--")]
    ours = {field.name for owner in options_class.__mro__ if owner.__name__ == "Settings" for field in fields(owner)}
    ours |= {field.name for field in fields(ExtraOptions)}
    assert {*listed} == (ours - REFUSED.keys()) | {*OFTEN, "config", "help_all"} and len(listed) == len({*listed})
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("--"):  # with a text, and with what it is if nobody sets it
            name, _, text = f"{line} {'' if after.startswith('--') else after}".partition(" ")
            usual = parser.usual.get(name[2:])
            assert len(text.split()) > 2 and (usual in (None, []) or "[" in text), name


def test_a_config_file_of_a_run_gives_the_same_options(options_class, tmp_path):
    arguments = ["--config", "demo/config.yaml", "--max-steps", "7", "--min_pixels", "900", "--bf16", "false"]
    arguments += ["--report_to", "tensorboard", "--lr_scheduler_type", "cosine_with_min_lr", "--normalize_latex"]
    arguments += ["--output_dir", str(tmp_path), "--hub_token", "hf_secret"]
    arguments += ["--lr_scheduler_kwargs", '{"min_lr": 1e-06}', "--instruction", "Was steht da? \\alpha: 'x'"]
    options, extra, parser = parse(options_class, arguments)
    text = config(recipe.note(parser.given, parser.unset, 1)["changed"])
    assert "max_steps: 7" in text and "hf_secret" not in text and "output_dir:" not in text
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    again = ["--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path)]
    same, same_extra, _ = parse(options_class, again)
    assert same.to_sanitized_dict() == options.to_sanitized_dict() and same_extra == extra


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_offered_is_refused(name, options_class):
    usual = Parser([options_class, ExtraOptions]).usual
    check(SimpleNamespace(**usual), usual, tell)
    with pytest.raises(Told, match=f"^--{name} is not offered: ") as told:
        check(SimpleNamespace(**usual | {name: "something else"}), usual, tell)
    assert len(str(told.value)) < 300 and "\n" not in str(told.value)


@pytest.mark.parametrize("name", NEEDS)
def test_what_would_have_no_effect_is_refused(name, options_class):
    usual = Parser([options_class, ExtraOptions]).usual
    other, value = NEEDS[name]
    with pytest.raises(Told, match=f"^--{name} does nothing without --{other}, such as --{other} {value}"):
        check(SimpleNamespace(**usual | {name: 2}), usual, tell)
    value = {"dataloader_num_workers": 2, "push_to_hub": True}.get(other, value)
    check(SimpleNamespace(**usual | {name: 2, other: value}), usual, tell)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--eval_strategy steps --eval_steps 2 --save_steps 1", "leave out --save_steps"),
        ("--eval_strategy epoch --eval_steps 2", "takes no --eval_steps"),
        ("--eval_strategy steps --save_strategy no --load_best_model_at_end true", "leave out --save_strategy no"),
        ("--save_strategy best", "--eval_strategy steps keeps the best"),
        ("--bf16 true", "--use_cpu true"),
        ("--bf16 true --fp16 true --use_cpu true", "At most one of fp16 and bf16"),
        ("--tf32 true", "Ampere"),
        ("--report_to nobody", "nobody is not supported"),
        ("--optim galore_adamw", "made for whole layers"),
        ("--optim schedule_free_adamw", "wrong weights"),
        ("--optim grokadamw", "install grokadamw"),
        ("--optim sgd --optim_args momentum", "momentum can't be used"),
        ("--optim sgd --optim_args momentum=0.9,speed=2", "does not use --optim_args speed=2"),
        ("--optim_args momentum=0.9", "adamw_torch_fused does not use --optim_args momentum=0.9"),
        ("--optim sgd --adam_beta1 0.8", "sgd does not use --adam_beta1"),
        ("--lr_scheduler_type cosine_with_min_lr", "min_lr"),
        ('--lr_scheduler_type linear --lr_scheduler_kwargs {"min_lr":0}', "min_lr"),
        ('--lr_scheduler_type constant --lr_scheduler_kwargs {"min_lr":0}', "does not use --lr_scheduler_kwargs"),
        ("--lr_scheduler_type constant --warmup_steps 9", "constant_with_warmup"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do some of it")
def test_what_does_not_go_together_is_refused(arguments, sentence, options_class, capsys):
    with pytest.raises((SystemExit, Told)) as told:
        check_possible(parse(options_class, arguments.split())[0], tell)
    said = str(told.value) if told.type is Told else capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in said and "\n" not in said


OPTIMIZERS = """
    adamw_torch adafactor adamw_torch_4bit adamw_torch_8bit ademamix sgd adagrad adamw_8bit ademamix_8bit lion_8bit
    lion_32bit paged_adamw_32bit paged_adamw_8bit paged_ademamix_8bit paged_lion_8bit rmsprop rmsprop_bnb_8bit
"""


@pytest.mark.parametrize("name", OPTIMIZERS.split())
def test_optimizers_that_can_be_used_are(name, options_class):
    check_possible(parse(options_class, ["--optim", name])[0], tell)


# In place of the package: installed, but without a key, and with no terminal to ask for one.
WANDB = """
from types import SimpleNamespace
run = None
setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="online"))
def login():
    raise ValueError("No API key configured")
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--loss_type", "nll", "--label_smoothing_factor", "0.1"), ["--label_smoothing_factor", "--lora_dropout"]),
        (("--chat_template_path", "template.jinja"), ["--chat_template_path", "Choose a model"]),
        (("--report_to", "dvclive"), ["--report_to dvclive", "installed"]),
        (("--report_to", "wandb"), ["No API key configured", "wandb login"]),
        (("--config", "FILE"), ["--pad_to_multiple_of", "processor pads"]),
        (("--eval_on_start", "true"), ["--eval_on_start", "--eval_strategy steps"]),
    ],
)
def test_a_refusal_is_a_sentence_and_comes_first(arguments, words, tiny, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(WANDB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "options.yaml").write_text("pad_to_multiple_of: 8\n")
    arguments = [argument.replace("FILE", str(tmp_path / "options.yaml")) for argument in arguments]
    ended = run(*tiny, "--max_steps", 1, *arguments, "--output_dir", tmp_path / "out")
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr and ended.stdout == "", "something was loaded"
    for word in words:
        assert word in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_is_set_takes_effect(tiny, tmp_path):
    """Optimizer, schedule, precision, logging and loading, as their traces in the log and in a checkpoint show."""
    at_end = """
import atexit, torch
atexit.register(lambda: print("deterministic:", torch.are_deterministic_algorithms_enabled()))
"""
    ended = run_changed(
        at_end, *tiny, "--max_steps", 4, "--save_steps", 4, "--output_dir", tmp_path,
        "--optim", "sgd", "--optim_args", "momentum=0.9", "--weight_decay", 0.1, "--max_grad_norm", 1e-9,
        "--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": 1.5}', "--warmup_steps", 2,
        "--loss_type", "dft", "--use_cpu", "true", "--bf16", "true", "--full_determinism", "true",
        "--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}',
        "--logging_steps", 3, "--logging_first_step", "true", "--disable_tqdm", "true", "--log_level", "info",
        "--include_num_input_tokens_seen", "true", "--skip_memory_metrics", "false",
        "--dataloader_num_workers", 1, "--dataloader_prefetch_factor", 3, "--dataloader_persistent_workers", "true",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "deterministic: True" in ended.stdout
    assert "'loss': " in ended.stdout, "lines in place of a bar"
    assert "Num examples = 16" in ended.stderr, "the trainer's own log"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    log = metrics["train"]["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 3]
    assert log[0]["loss"] < 1, "each token is weighted by its probability, a thousandth"
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert rates == pytest.approx([0, 1e-3])
    assert log[1]["num_input_tokens_seen"] > log[0]["num_input_tokens_seen"] > 0
    assert "train_mem_cpu_alloc_delta" in log[-1]
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"][0]
    assert (saved["momentum"], saved["weight_decay"]) == (0.9, 0.1)
    assert saved["lr"] == pytest.approx(0, abs=1e-9), "after one and a half waves"
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert 0 < sum(weights.abs().sum() for name, weights in adapter.items() if "lora_B" in name) < 1e-9


def test_held_out_losses_as_they_are_asked_for(tiny, tmp_path):
    names = execute(
        *tiny, "--max_steps", 4, "--output_dir", tmp_path, "--save_only_model", "true",
        "--eval_strategy", "steps", "--eval_steps", 1, "--eval_delay", 3, "--eval_on_start", "true",
        "--per_device_eval_batch_size", 1, "--load_best_model_at_end", "true",
        "--adam_beta1", 0.8, "--adam_beta2", 0.9, "--adam_epsilon", 1e-6, "--loss_type", "nll",
    )  # fmt: skip
    trainer = names["trainer"]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 3, 4]
    assert len(trainer.get_eval_dataloader()) == 2
    settings = trainer.optimizer.param_groups[0]
    assert (settings["betas"], settings["eps"]) == ((0.8, 0.9), 1e-6)
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert not (best / "optimizer.pt").exists()
    kept, adapter = (load_file(folder / "adapter_model.safetensors") for folder in (best, tmp_path / "adapter"))
    assert all(adapter[name].equal(weights) for name, weights in kept.items())


def test_the_last_checkpoint_is_kept_rather_than_the_best_if_asked_for(tiny, tmp_path):
    options = ("--eval_strategy", "steps", "--eval_steps", 3, "--save_steps", 2, "--load_best_model_at_end", "false")
    names = execute(*tiny, "--max_steps", 4, *options, "--output_dir", tmp_path)
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert names["trainer"].state.best_model_checkpoint is None
    assert [entry["step"] for entry in names["trainer"].state.log_history if "eval_loss" in entry] == [3, 4]
