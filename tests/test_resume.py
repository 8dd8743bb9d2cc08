"""Resuming: what would make a result untrue is refused, what may change does change, damage is noticed.

Each of these ended with exit code 0 and a fine report before.
"""

import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, execute, run
from datasets import Dataset, load_dataset
from safetensors.torch import load_file, save_file

from qwen_vl_kit import checkpoints

STEPS = ("--max_steps", 8, "--save_total_limit", 100)


@pytest.fixture(scope="module")
def eight(tiny, tmp_path_factory):
    """The folder of a run of eight steps that has finished, with the checkpoints of all its steps."""
    folder = tmp_path_factory.mktemp("eight")
    execute(*tiny, *STEPS, "--output_dir", folder)
    return folder


@pytest.fixture
def stopped(eight, tmp_path):
    """A copy of it as if it had been interrupted after step 6."""
    folder = tmp_path / "out"
    shutil.copytree(eight, folder, ignore=shutil.ignore_patterns("checkpoint-[78]", "metrics.json", "adapter", ".*"))
    return folder


def resume(tiny, folder, *options, checkpoint="true"):
    return execute(*tiny, *STEPS, "--output_dir", folder, "--resume_from_checkpoint", checkpoint, *options)


def refusal(capsys, tiny, folder, *options, **where):
    """The sentence that a run ends with, which has to leave its folder as it is."""
    before, printed = content(folder), capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        resume(tiny, folder, *options, **where)
    printed = capsys.readouterr()
    assert ended.value.code not in (0, None) and "parameters train" not in printed.out, "something was loaded"
    assert content(folder) == before
    said = ended.value.code if isinstance(ended.value.code, str) else printed.err.strip().splitlines()[-1]
    assert len(said.strip().splitlines()) == 1 and len(said) < 400
    return said


def content(folder):
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in (".lock", ".holder.json")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name != "skipped.jsonl"}


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def logged(folder, what):
    return [entry[what] for entry in metrics_of(folder)["train"]["log"] if "loss" in entry]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


# ---------------------------------------------------------------------------------------------------------------------
# What would make a result untrue
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, then, now",
    [
        ("seed", "3407", "7"), ("num_test_rows", "2", "6"), ("lora_r", "16", "8"), ("batch_size", "4", "8"),
        ("instruction", "'Write the LaTeX", "Read."), ("min_pixels", "3136", "6272"), ("lora_alpha", "16", "32"),
        ("optim", "adamw_torch_fused", "adafactor"),
    ],
)  # fmt: skip
def test_options_that_have_to_stay(option, then, now, tiny, stopped, capsys):
    said = refusal(capsys, tiny, stopped, f"--{option}", now)
    assert f"--{option} {then}" in said and f"not {now}" in said and "--output_dir" in said


def test_validation_can_not_be_switched_on(tiny, stopped, capsys):
    for options in (("--eval_strategy", "steps"), ("--num_validation_rows", 4), ("--early_stopping_patience", 2)):
        said = refusal(capsys, tiny, stopped, *options, "--eval_steps", 1)
        assert "was made without validation rows: leave out --eval_strategy" in said


def test_other_rows_another_base_and_other_images_are_noticed(tiny, stopped, tmp_path, capsys):
    rows = load_dataset("parquet", data_files=tiny[3], split="train")
    other = tmp_path / "other.parquet"

    def with_rows(changed):
        changed.to_parquet(other)
        return refusal(capsys, tiny, stopped, "--dataset_name", other)

    said = with_rows(load_dataset(str(ROOT / "demo/data"), split="test").select(range(50)))
    assert "was trained on 42 rows" in said and "not 50 rows of" in said
    assert "was trained on 42 rows" in with_rows(rows.select([1, 0, *range(2, 42)])), "the order is part of it"

    order, held_out = execute_order(tiny, stopped)
    images = list(rows.with_format(None)["image"])

    def with_image(number):
        changed = [image.copy() for image in images]
        changed[number].putpixel((0, 0), (200, 0, 0) if changed[number].mode == "RGB" else 200)
        return with_rows(Dataset.from_dict({"image": changed, "text": rows["text"][:]}, features=rows.features))

    assert "held out other images" in with_image(held_out[0])
    assert "24 samples that" in with_image(order[5])
    rows.to_parquet(other)  # the same rows in another file are the same rows
    resume(tiny, stopped, "--dataset_name", other)

    model = tmp_path / "model"
    shutil.copytree(tiny[1], model)
    resume(tiny, stopped, "--model_name_or_path", model, "--max_steps", 9)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "layers.0.mlp.down_proj" in name)
    save_file(weights | {name: weights[name] + 0.01}, model / "model.safetensors", metadata={"format": "pt"})
    said = refusal(capsys, tiny, stopped, "--model_name_or_path", model, "--max_steps", 10)
    assert "was trained from" in said


def execute_order(tiny, folder):
    """The training rows in their order and the held-out rows of the run in `folder`."""
    names = execute(*tiny, *STEPS, "--save_strategy", "no", "--output_dir", folder.with_name("order"))
    return names["order"], [*names["test_lengths"]]


def test_fewer_steps_than_were_taken_and_branches_are_refused(tiny, stopped, capsys):
    assert "has taken 6 steps" in refusal(capsys, tiny, stopped, "--max_steps", 5)
    said = refusal(capsys, tiny, stopped, checkpoint=stopped / "checkpoint-3")
    assert "checkpoint-6, later than checkpoint-3" in said and "--output_dir" in said


def test_a_checkpoint_of_something_else_is_refused(tiny, stopped, capsys):
    for name in ("run.json", "optimizer.pt"):  # of the script alone; of --save_only_model
        for folder in stopped.glob("checkpoint-*"):
            (folder / name).unlink()
        assert "is missing" in refusal(capsys, tiny, stopped)


def test_checkpoints_without_an_optimizer_are_refused(tiny, tmp_path, capsys):
    execute(*tiny, "--max_steps", 4, "--save_only_model", "true", "--output_dir", tmp_path)
    assert "--save_only_model" in refusal(capsys, tiny, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# What may change
# ---------------------------------------------------------------------------------------------------------------------


def test_a_changed_learning_rate_and_schedule_are_taken_and_told(tiny, eight, stopped, capsys):
    resume(tiny, stopped, "--learning_rate", "5e-4", "--weight_decay", "0.1", "--max_steps", 12)
    said = capsys.readouterr().out
    assert "learning_rate changed from 0.001 to 0.0005" in said and "max_steps changed from 8 to 12" in said
    rates = logged(stopped, "learning_rate")
    assert rates[:6] == logged(eight, "learning_rate")[:6]
    assert rates[6:] == pytest.approx([5e-4 * (12 - step) / 7 for step in range(6, 12)])  # after 5 steps of warm-up
    optimizer = torch.load(stopped / "checkpoint-12/optimizer.pt", weights_only=True)
    assert {group["weight_decay"] for group in optimizer["param_groups"] if group["params"]} == {0.1}
    (part,) = metrics_of(stopped)["run"]["resumed"]
    assert part["step"] == 6 and part["changed"]["learning_rate"] == [0.001, 0.0005]
    assert "after step 6 (max_steps 8, then 12; learning_rate 0.001, then 0.0005" in page(stopped).replace("\n", " ")
    assert "resumed" in (stopped / "adapter/README.md").read_text()


def page(folder):
    return (folder / "report.html").read_text().replace(", weight", "; weight").replace(", learning", "; learning")


def test_unchanged_it_ends_as_if_never_stopped_and_says_that_it_was(tiny, eight, stopped):
    resume(tiny, stopped)
    assert same(weights(stopped / "adapter"), weights(eight / "adapter"))
    assert logged(stopped, "loss") == logged(eight, "loss")
    assert logged(stopped, "num_tokens") == logged(eight, "num_tokens")
    assert metrics_of(stopped)["run"]["resumed"][0]["changed"] == {}
    assert "resumed" not in metrics_of(eight)["run"] or not metrics_of(eight)["run"]["resumed"]


def test_the_time_and_the_samples_are_those_of_all_parts(tiny, stopped):
    record = checkpoints.record_of(stopped / "checkpoint-6")
    record["seconds"] = 1000.0
    checkpoints.seal(stopped / "checkpoint-6", record)
    resume(tiny, stopped)
    train = metrics_of(stopped)["train"]
    assert 1000 < train["train_runtime"] < 1100 and train["samples"] == 32
    assert train["train_samples_per_second"] == pytest.approx(32 / train["train_runtime"])
    assert not [entry for entry in train["log"] if "train_runtime" in entry or "train_loss" in entry]


def test_three_times_more_steps_are_one_run(tiny, tmp_path):
    """With a learning rate that does not depend on how many steps are asked for: equal bit for bit, each row once."""
    options = ("--lr_scheduler_type", "constant", "--warmup_steps", 0, "--output_dir")
    names = execute(*tiny, "--max_steps", 20, *options, tmp_path / "whole")
    parts = tmp_path / "parts"
    execute(*tiny, "--max_steps", 3, *options, parts)
    for steps in (7, 12, 20):
        execute(*tiny, "--max_steps", steps, *options, parts, "--resume_from_checkpoint", "true")
    assert same(weights(parts / "adapter"), weights(tmp_path / "whole/adapter"))
    assert logged(parts, "loss") == logged(tmp_path / "whole", "loss")
    assert [part["step"] for part in metrics_of(parts)["run"]["resumed"]] == [3, 7, 12]
    assert len({*names["order"][:40]}) == 40, "each of the 40 rows once in the first epoch"


@pytest.mark.parametrize("length", [("--num_train_epochs", 1), ()])
def test_a_finished_run_stays_as_it_is(length, tiny, tmp_path, capsys):
    options = (*tiny, "--max_steps", 3, *length, "--output_dir", tmp_path)
    execute(*options)
    before = content(tmp_path)
    with pytest.raises(SystemExit) as ended:
        execute(*options, "--resume_from_checkpoint", "true")
    assert not ended.value.code and "has already finished" in capsys.readouterr().out
    assert content(tmp_path) == before


def test_whether_it_has_finished_does_not_depend_on_file_times(tiny, eight, stopped, tmp_path, capsys):
    finished = shutil.copytree(eight, tmp_path / "finished")
    for folder, at in ((finished / "adapter", 1), (stopped / "checkpoint-6", 2)):
        for file in (folder, *folder.rglob("*")):
            os.utime(file, (at, at))
    shutil.copytree(eight / "adapter", stopped / "adapter")  # of an earlier run
    with pytest.raises(SystemExit):
        execute(*tiny, *STEPS, "--output_dir", stopped)
    assert "has not finished" in capsys.readouterr().err
    execute(*tiny, *STEPS, "--seed", 1, "--output_dir", finished)
    assert metrics_of(finished)["settings"]["seed"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# The best checkpoint
# ---------------------------------------------------------------------------------------------------------------------

VALIDATED = ("--eval_strategy", "steps", "--eval_steps", 1, "--num_validation_rows", 6)


def trained_with(tiny, folder, *options):
    return execute(*tiny, "--max_steps", 6, *VALIDATED, "--output_dir", folder, *options)


@pytest.fixture
def losses(monkeypatch):
    """Sets the validation losses of the steps to come."""
    from qwen_vl_kit import training

    loop = training.Trainer.evaluation_loop

    def choose(*values):
        def evaluation_loop(self, *arguments, **options):
            output = loop(self, *arguments, **options)
            output.metrics["eval_loss"] = values[self.state.global_step - 1]
            return output

        monkeypatch.setattr(training.Trainer, "evaluation_loop", evaluation_loop)

    return choose


def test_the_best_checkpoint_is_kept_also_in_another_folder(tiny, tmp_path, losses, capsys):
    losses(5, 1, 4, 3, 2, 2)
    trained_with(tiny, tmp_path / "one")
    best = weights(tmp_path / "one/checkpoint-2")
    assert same(weights(tmp_path / "one/adapter"), best) and metrics_of(tmp_path / "one")["train"]["best_step"] == 2
    assert "2, by validation loss: the adapter is that step" in page(tmp_path / "one")
    where = tmp_path / "one" / "checkpoint-5"  # two are kept: the best and the last
    assert not where.exists() and (tmp_path / "one/checkpoint-6").exists()
    losses(5, 1, 4, 3, 2, 2, 2, 2)
    options = (*tiny, "--max_steps", 8, *VALIDATED, "--output_dir", tmp_path / "two", "--resume_from_checkpoint")
    execute(*options, tmp_path / "one/checkpoint-6")
    assert same(weights(tmp_path / "two/adapter"), best) and metrics_of(tmp_path / "two")["train"]["best_step"] == 2
    assert (tmp_path / "two/checkpoint-2").is_dir()

    shutil.rmtree(tmp_path / "one/checkpoint-2")
    capsys.readouterr()
    execute(*options[:-2], tmp_path / "three", "--resume_from_checkpoint", tmp_path / "one/checkpoint-6")
    assert "checkpoint-2, the best so far, can't be used" in capsys.readouterr().out
    assert metrics_of(tmp_path / "three")["train"]["best_step"] == 7


def test_validation_rows_are_neither_trained_on_nor_scored(tiny, tmp_path):
    names = trained_with(tiny, tmp_path, "--num_train_epochs", 1)
    trainer = names["trainer"]
    images = {
        part: {sample["image"].tobytes() for sample in rows}
        for part, rows in (
            ("train", names["train_set"]), ("test", names["test_set"]), ("validation", trainer.eval_dataset)
        )
    }  # fmt: skip
    assert [len(rows) for rows in images.values()] == [34, 2, 6]
    assert len(set.union(*images.values())) == 42, "a row is in two parts"


def test_the_validation_loss_is_a_mean_over_tokens(tiny, tmp_path):
    trainer = trained_with(tiny, tmp_path)["trainer"]
    losses = []
    for size in (1, 2, 4, 8):
        trainer.args.per_device_train_batch_size = trainer.args.per_device_eval_batch_size = size
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    batch = trainer.data_collator([*trainer.eval_dataset])
    with torch.no_grad():
        assert losses[0] == pytest.approx(trainer.model(**batch).loss.item(), rel=1e-5)


def test_early_stopping_also_over_an_interruption(tiny, tmp_path, losses, capsys):
    losses(5, 1, 4, 3, 2, 2, 2, 2)
    patient = ("--early_stopping_patience", 3)
    trained_with(tiny, tmp_path / "whole", *patient)
    assert metrics_of(tmp_path / "whole")["run"]["steps"] == 5
    losses(5, 1, 4)

    with suppress(IndexError):
        trained_with(tiny, tmp_path / "parts", *patient)  # ends at step 4, of which there is no loss
    losses(5, 1, 4, 3, 2, 2, 2, 2)
    trained_with(tiny, tmp_path / "parts", *patient, "--resume_from_checkpoint", "true")
    assert metrics_of(tmp_path / "parts")["run"]["steps"] == 5
    assert same(weights(tmp_path / "parts/adapter"), weights(tmp_path / "whole/adapter"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        trained_with(tiny, tmp_path / "parts", *patient, "--resume_from_checkpoint", "true")
    assert "has already finished, after 5 steps" in capsys.readouterr().out
    trained_with(tiny, tmp_path / "parts", "--early_stopping_patience", 4, "--resume_from_checkpoint", "true")
    assert metrics_of(tmp_path / "parts")["run"]["steps"] == 6


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def damages():
    """More than fifty ways to damage a checkpoint, {name: function of its folder}."""
    chance = random.Random(1)
    found = {}
    files = (
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json", "run.json",
        "adapter_config.json",
    )  # fmt: skip

    def change(name, how):
        def damage(folder):
            (folder / name).write_bytes(how((folder / name).read_bytes()))

        return damage

    def flip(share):
        def flipped(content):
            at = int(share * (len(content) - 1))
            return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]

        return flipped

    for name in files:
        ways = {
            "empty": lambda content: b"",
            "cut in half": lambda content: content[: len(content) // 2],
            "a byte short": lambda content: content[:-1],
            "a byte long": lambda content: content + b"\0",
            "zeros": lambda content: bytes(len(content)),
            "a bit flipped early": flip(0.1),
            "a bit flipped late": flip(0.9),
        }
        found |= {f"{name} {way}": change(name, how) for way, how in ways.items()}
        found[f"{name} gone"] = lambda folder, name=name: (folder / name).unlink()

    def exchange(folder):
        shutil.copy(folder.with_name("checkpoint-5") / "optimizer.pt", folder)

    def directory(folder):
        (folder / "optimizer.pt").unlink()
        (folder / "optimizer.pt").mkdir()

    def emptied(folder):
        shutil.rmtree(folder)
        folder.mkdir()

    return found | {"another step's": exchange, "a folder for a file": directory, "nothing in it": emptied}


def test_more_than_fifty_damages_are_noticed(stopped, capsys):
    """Each is told with its file, and the checkpoint before is taken; what that does is what the next test shows."""
    from types import SimpleNamespace

    last, kept = stopped / "checkpoint-6", stopped.with_name("kept")
    shutil.copytree(last, kept)
    options = SimpleNamespace(resume_from_checkpoint="true", output_dir=str(stopped))
    assert checkpoints.find(options, pytest.fail) == str(last)
    for name, damage in damages().items():
        damage(last)
        if name == "run.json gone":  # it could be the script's own
            with pytest.raises(pytest.fail.Exception, match="as if the script alone had written it"):
                checkpoints.find(options, pytest.fail)
        else:
            assert checkpoints.find(options, pytest.fail) == str(stopped / "checkpoint-5"), name
            assert f"{last} is damaged (" in capsys.readouterr().out
        shutil.rmtree(last)
        shutil.copytree(kept, last)
    assert len(damages()) > 50


@pytest.mark.parametrize("name", ["optimizer.pt cut in half", "run.json zeros", "nothing in it"])
def test_the_checkpoint_before_a_damaged_one_is_taken(name, tiny, eight, stopped, capsys):
    damages()[name](stopped / "checkpoint-6")
    resume(tiny, stopped)
    said = capsys.readouterr().out
    assert "checkpoint-6 is damaged (" in said and f"Resuming from {stopped}/checkpoint-5" in said
    assert same(weights(stopped / "adapter"), weights(eight / "adapter"))
    assert all(not checkpoints.damage(folder) for folder in stopped.glob("checkpoint-*"))


def test_if_all_are_damaged_or_a_damaged_one_is_named_it_is_said(tiny, stopped, capsys):
    damages()["optimizer.pt cut in half"](stopped / "checkpoint-4")
    said = refusal(capsys, tiny, stopped, checkpoint=stopped / "checkpoint-4")
    assert "can't resume from" in said and "optimizer.pt has" in said
    for folder in stopped.glob("checkpoint-[12356]"):
        damages()["rng_state.pth gone"](folder)
    said = refusal(capsys, tiny, stopped)
    assert "no usable checkpoint" in said and "rng_state.pth is missing" in said


def test_the_readme_s_line_for_the_script_s_own_checkpoints(tiny, stopped):
    """What the kit writes, a process of its own reads: the whole way, once."""
    ended = run(*tiny, *STEPS, "--output_dir", stopped, "--resume_from_checkpoint", "true")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"Resuming from {stopped}/checkpoint-6" in ended.stdout
    assert Path(stopped, "run.json").is_file()


def test_a_renamed_checkpoint_and_a_folder_can_be_named(tiny, eight, stopped):
    shutil.copytree(stopped / "checkpoint-4", stopped.with_name("mine"))
    for named in (stopped.with_name("mine"), stopped):
        folder = stopped.with_name(f"from-{named.name}")
        resume(tiny, folder, checkpoint=named)
        assert same(weights(folder / "adapter"), weights(eight / "adapter"))


def test_an_epoch_in_the_log_is_an_epoch(tiny, tmp_path):
    execute(*tiny, "--num_train_epochs", 2, "--save_strategy", "no", "--output_dir", tmp_path)
    epochs = logged(tmp_path, "epoch")
    assert len(epochs) == 20 and (epochs[0], epochs[9], epochs[-1]) == (0.1, 1, 2)


def test_a_process_that_goes_on_leaves_the_folder_to_others(tiny, tmp_path):
    """A notebook's does."""
    execute(*tiny, "--max_steps", 2, "--output_dir", tmp_path)
    ended = run(*tiny, "--max_steps", 2, "--output_dir", tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]


# ---------------------------------------------------------------------------------------------------------------------
# What an attack found
# ---------------------------------------------------------------------------------------------------------------------


def killed_after_four(tiny, folder, losses, *options):
    """A run that ends at step 5, of which there is no validation loss; step 2 is the best, of checkpoints 2 and 4."""
    losses(5, 1, 4, 3)
    with suppress(IndexError):
        trained_with(tiny, folder, *options)
    losses(5, 1, 4, 3, 3, 3)


@pytest.mark.parametrize("name", ["adapter_model.safetensors a bit flipped late", "adapter_model.safetensors gone"])
def test_a_damaged_best_checkpoint_is_not_passed_for_whole(name, tiny, tmp_path, losses, capsys):
    killed_after_four(tiny, tmp_path, losses)
    damages()[name](tmp_path / "checkpoint-2")
    trained_with(tiny, tmp_path, "--resume_from_checkpoint", "true")
    assert "checkpoint-2, the best so far, can't be used" in capsys.readouterr().out
    assert metrics_of(tmp_path)["train"]["best_step"] == 5


def test_a_best_checkpoint_that_goes_while_it_trains_is_told(tiny, tmp_path, losses, monkeypatch, capsys):
    from qwen_vl_kit import training

    losses(5, 1, 4, 3, 3, 3)
    load = training.Trainer._load_best_model
    monkeypatch.setattr(
        training.Trainer, "_load_best_model", lambda self: (shutil.rmtree(tmp_path / "checkpoint-2"), load(self))
    )
    trained_with(tiny, tmp_path)
    assert "checkpoint-2, the best, can't be used" in capsys.readouterr().out
    assert "best_step" not in metrics_of(tmp_path)["train"]
    assert same(weights(tmp_path / "adapter"), weights(tmp_path / "checkpoint-6"))


def test_early_stopping_that_had_stopped_before_a_kill(tiny, tmp_path, losses):
    losses(5, 1, 4, 3, 0.5, 0.4)
    patient = ("--early_stopping_patience", 2)
    trained_with(tiny, tmp_path / "whole", *patient)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed", ignore=shutil.ignore_patterns("adapter", "metrics.json"))
    trained_with(tiny, tmp_path / "killed", *patient, "--resume_from_checkpoint", "true")
    assert metrics_of(tmp_path / "killed")["run"]["steps"] == metrics_of(tmp_path / "whole")["run"]["steps"] == 4
    assert same(weights(tmp_path / "killed/adapter"), weights(tmp_path / "whole/adapter"))


def test_the_cell_that_trains_run_again_is_refused(tiny, tmp_path):
    names = execute(*tiny, "--max_steps", 2, "--output_dir", tmp_path)
    with pytest.raises(SystemExit, match="has trained already"):
        names["trainer"].train()
    with pytest.raises(SystemExit, match="has trained already"):
        names["make_trainer"]().train()


def test_running_out_of_memory_keeps_the_optimizer(tiny, eight, tmp_path, monkeypatch):
    """Also where checkpoints are to have none. The log's means and tokens are those of an undisturbed run."""
    from trl import SFTTrainer

    step, taken = SFTTrainer.training_step, []

    def training_step(self, *arguments, **options):
        loss = step(self, *arguments, **options)
        taken.append(loss)
        if len(taken) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    options = ("--save_only_model", "true", "--gradient_checkpointing", "false", "--lora_dropout", 0)
    execute(*tiny, *STEPS, *options, "--output_dir", tmp_path / "short")
    monkeypatch.undo()
    execute(*tiny, *STEPS, *options, "--output_dir", tmp_path / "whole")
    for what in ("learning_rate", "num_tokens"):
        assert logged(tmp_path / "short", what) == logged(tmp_path / "whole", what)
    assert logged(tmp_path / "short", "loss") == pytest.approx(logged(tmp_path / "whole", "loss"), rel=1e-4)


def test_a_log_entry_over_an_interruption_is_that_of_all_its_steps(tiny, stopped, tmp_path):
    options = (*tiny, "--max_steps", 8, "--logging_steps", 4, "--save_total_limit", 100)
    execute(*options, "--output_dir", tmp_path / "whole")
    folder = tmp_path / "parts"
    execute(*options, "--output_dir", folder, "--resume_from_checkpoint", tmp_path / "whole/checkpoint-6")
    for what in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(folder, what) == logged(tmp_path / "whole", what)


def test_a_continuation_that_was_interrupted_is_not_taken_for_the_finished_run(tiny, eight, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(eight, folder, ignore=shutil.ignore_patterns("checkpoint-8", ".*"))
    finished = (folder / "metrics.json").read_bytes()
    resume(tiny, folder, "--learning_rate", "1e-4", "--max_steps", 9)  # from step 7, to other results
    assert metrics_of(folder)["run"]["resumed"][0]["step"] == 7
    (folder / "metrics.json").write_bytes(finished)  # as if interrupted before they were written
    capsys.readouterr()
    with pytest.raises(SystemExit):
        execute(*tiny, "--max_steps", 2, "--seed", 1, "--output_dir", folder)
    assert "has not finished" in capsys.readouterr().err


def test_other_validation_images_are_noticed(tiny, tmp_path, losses, capsys):
    killed_after_four(tiny, tmp_path / "out", losses)
    rows = load_dataset("parquet", data_files=tiny[3], split="train")
    (number, _), *_ = checkpoints.record_of(tmp_path / "out/checkpoint-4")["validation"]
    images = [image.copy() for image in rows["image"]]
    images[number].putpixel((0, 0), (200, 0, 0) if images[number].mode == "RGB" else 200)
    changed = Dataset.from_dict({"image": images, "text": rows["text"][:]}, features=rows.features)
    changed.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(SystemExit, match="was validated on other images"):
        trained_with(
            tiny, tmp_path / "out", "--dataset_name", tmp_path / "x.parquet", "--resume_from_checkpoint", "true"
        )


def test_what_others_keep_in_the_folder_stays(tiny, stopped):
    for name in ("checkpoint-6-good-1", "checkpoint-best1", "part"):
        shutil.copytree(stopped / "checkpoint-3", stopped / name)
    resume(tiny, stopped, "--save_total_limit", 1)
    assert all((stopped / name / "run.json").is_file() for name in ("checkpoint-6-good-1", "checkpoint-best1", "part"))


def test_a_refused_run_leaves_the_list_of_skipped_rows(tiny, eight, tmp_path):
    folder = shutil.copytree(eight, tmp_path / "out", ignore=shutil.ignore_patterns(".*"))
    (folder / "skipped.jsonl").write_text('{"row": 5}\n')
    for options in (("--num_test_rows", 50), ("--num_test_rows", 42)):
        with pytest.raises(SystemExit):
            execute(*tiny, *STEPS, *options, "--output_dir", folder)
    assert (folder / "skipped.jsonl").read_text() == '{"row": 5}\n'


def test_a_folder_that_was_deleted_meanwhile_is_left_alone(tiny, tmp_path, monkeypatch):
    from qwen_vl_kit import training

    describe = training.Trainer.describe

    def replaced(self):
        if self.state.global_step == 2:
            shutil.rmtree(tmp_path / "out")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / ".lock").write_text("")  # another run's
            (tmp_path / "out" / "theirs").write_text("x")
            (tmp_path / "out" / ".part" / "checkpoint-2").mkdir(parents=True)
        return describe(self)

    monkeypatch.setattr(training.Trainer, "describe", replaced)
    with pytest.raises(SystemExit, match="was deleted or replaced"):
        execute(*tiny, "--max_steps", 4, "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "theirs").exists()


def test_what_is_asked_for_at_the_end_is_done_for_a_finished_run(tiny, eight, tmp_path, capfd):
    folder = shutil.copytree(eight, tmp_path / "out", ignore=shutil.ignore_patterns(".*"))
    with pytest.raises(SystemExit) as ended:
        resume(tiny, folder, "--save_merged", "true")
    printed = capfd.readouterr()
    assert "has already finished" in printed.out and "Not merged" in printed.err  # eight steps have taught too little
    assert ended.value.code == 1
