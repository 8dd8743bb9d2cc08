"""What leaves a run's folder: merges that are of its adapter, pushes that name no folder of the machine it ran on.

Whether merged weights read as the adapter does is tried in test_use.py; here nothing has learned to read.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import types
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, run_changed
from hub import Hub
from safetensors.torch import load_file, save_file

from qwen_vl_kit import export, finished, report
from qwen_vl_kit import hub as hub_room
from qwen_vl_kit import run as this_run

MODEL, DATA = "acme//modell", "Zürich GmbH//geheime Daten/rows.parquet"  # as typed; `acme/modell` could be on the hub


@pytest.fixture(scope="module")
def hub():
    hub = Hub("hf_secret")
    hub.full = True  # when the run ends
    yield hub
    hub.server.shutdown()


@pytest.fixture(scope="module")
def pushed(tiny, hub, tmp_path_factory):
    """A run whose folders all have names that nobody else has to know; its push, which fails; and the same once more.

    In the second one, a file of the processor names folders in fields of its own.
    """
    home = tmp_path_factory.mktemp("jürgen")
    place = home / "Kunden & Co" / "läufe"
    model, data = place / MODEL, place / DATA
    model.parent.mkdir(parents=True)
    data.parent.mkdir(parents=True)
    shutil.copytree(tiny[1], model)
    shutil.copy(tiny[3], data)
    (home / ".cache").mkdir()
    there = os.environ | {"HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.token}
    options = [*tiny, "--model_name_or_path", MODEL, "--dataset_name", f"{place}//{DATA}", "--max_steps", "2"]
    options += ["--output_dir", "erster lauf", "--push_to_hub", "true", "--hub_model_id", "somebody/latex"]

    def started(command, cwd):
        return subprocess.run(command, cwd=cwd, env=there, capture_output=True, text=True, timeout=300)

    failed = started([sys.executable, str(SCRIPT), *options], place)
    outputs = place / "erster lauf"
    assert outputs.is_dir(), failed.stderr[-3000:]
    shutil.copytree(outputs, home / "as it was")
    fields = {"name_or_path": f"{model}", "deep": [{"of": f"made of {data}, by hand"}, {"cache": f"{home}//x//vocab"}]}
    changed(outputs / "adapter/tokenizer_config.json", **fields)
    hub.full = False
    there["PYTHONPATH"] = str(ROOT)
    again = failed.stderr.strip().splitlines()[-1].partition("To push it: python ")[2]
    ended = started(["sh", "-c", f"{sys.executable} {again}"], place)
    return types.SimpleNamespace(
        home=home, place=place, model=model, data=data, outputs=home / "as it was", failed=failed, ended=ended
    )


def changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def named(files, folders):
    """Which of these folders the files, {name: bytes}, name: as it is, or escaped as JSON does it."""
    found = []
    for name, content in files.items():
        text = content.decode("utf-8", "replace")
        if name.endswith(".json"):
            text += json.dumps(json.loads(content), ensure_ascii=False)
        found += [(name, folder) for folder in folders if folder in text or json.dumps(folder)[1:-1] in text]
    return found


def test_a_push_that_fails_at_the_end_says_what_to_type(pushed):
    assert pushed.failed.returncode == 1 and "Traceback" not in pushed.failed.stderr, pushed.failed.stderr[-3000:]
    said = pushed.failed.stderr.strip().splitlines()[-1]
    assert (
        said.startswith("Could not push to somebody/latex: ") and "The adapter is safe in erster lauf/adapter." in said
    )
    assert pushed.ended.returncode == 0 and "Pushed to" in pushed.ended.stdout, pushed.ended.stderr[-3000:]


def test_no_folder_of_this_machine_is_uploaded(pushed, hub):
    files = hub.files["somebody/latex"]
    assert {"README.md", "adapter_config.json", "tokenizer_config.json", "tokenizer.json"} <= files.keys()
    folders = {*pushed.model.parent.parts, *pushed.data.parent.parts, *pushed.outputs.parts, "erster lauf"} - {"/"}
    assert {"acme", "Zürich GmbH", "geheime Daten", "Kunden & Co", "läufe"} <= folders
    assert not named(files, folders)
    config = json.loads(files["tokenizer_config.json"])
    deep = [{"of": "made of rows.parquet, by hand"}, {"cache": "vocab"}]
    assert config["name_or_path"] == "modell" and config["deep"] == deep
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "modell"
    assert "# modell for LaTeX OCR" in files["README.md"].decode() and b"base_model:" not in files["README.md"]
    for name in ("adapter_model.safetensors", "tokenizer.json", "processor_config.json"):
        assert files[name] == (pushed.outputs / "adapter" / name).read_bytes(), name


def test_a_name_on_the_hub_stays_whole(pushed, tmp_path):
    outputs = shutil.copytree(pushed.outputs, tmp_path / "outputs")
    hub_names(outputs, "unsloth/Qwen2-VL-2B-Instruct", "unsloth/LaTeX_OCR", local={})
    report.make(outputs)
    contents = export.shared(outputs, finished.metrics_of(outputs))
    card = contents["README.md"].read_text()
    assert "datasets: unsloth/LaTeX_OCR" in card and "base_model: unsloth/Qwen2-VL-2B-Instruct" in card
    assert all(isinstance(content, Path) for content in contents.values()), "nothing to hide, and yet it is another"


def hub_names(outputs, model, data, local=None):
    """Has a run's folder name this base and this data set; without `local`, it is as older versions wrote it."""
    metrics = json.loads((outputs / "metrics.json").read_text())
    metrics["settings"] |= {"model_name_or_path": model, "dataset_name": data}
    metrics.pop("local")
    metrics |= {} if local is None else {"local": local}
    (outputs / "metrics.json").write_text(json.dumps(metrics))
    changed(outputs / "adapter/adapter_config.json", base_model_name_or_path=model)


OLDER = {  # what was typed as model and data set, and what the adapter names
    "non-ASCII": ("/srv/Zoë/kunde/model", "/srv/Zoë/zahlen", None),
    "slashes": ("/srv//kunde//model", "/srv//kunde///zahlen", "/srv/kunde/model"),
    "relative": ("firma/kunde/model", "firma/kunde/zahlen", None),
    "as on the hub": ("kunde/model", "kunde/zahlen", "/srv/kunde/model"),
    "upwards": ("../kunde/model", "../kunde/zahlen", "/srv/kunde/model"),
    "Windows": (r"C:\firma\kunde\model", r"C:\firma\kunde\zahlen", None),
}


@pytest.mark.parametrize("case", OLDER)
def test_nor_for_runs_of_before(case, pushed, tmp_path):
    model, data, base = OLDER[case]
    outputs = shutil.copytree(pushed.outputs, tmp_path / "outputs")
    hub_names(outputs, model, data)
    changed(outputs / "adapter/adapter_config.json", base_model_name_or_path=base or model)
    card = outputs / "adapter/README.md"
    card.write_text(f"---\nlibrary_name: peft\nbase_model: {json.dumps(model)}\n---\nOn {data} by {base}.\n")
    contents = export.shared(outputs, finished.metrics_of(outputs))
    contents = {name: c.read_bytes() if isinstance(c, Path) else c for name, c in contents.items()}
    assert not named(contents, ["srv", "Zoë", "kunde", "firma", "C:"])
    assert json.loads(contents["adapter_config.json"])["base_model_name_or_path"] == "model"
    assert b"# model for LaTeX OCR" in contents["README.md"] and b"fine-tuned on zahlen" in contents["README.md"]


def test_what_people_add_to_the_card_is_pushed(pushed, tmp_path):
    outputs = shutil.copytree(pushed.outputs, tmp_path / "outputs")
    with (outputs / "adapter/README.md").open("a") as card:
        card.write("\nThanks to all who wrote formulas by hand.\n")
    content = export.shared(outputs, finished.metrics_of(outputs))["README.md"]
    assert content == outputs / "adapter/README.md"


# ---------------------------------------------------------------------------------------------------------------------
# A hub that can't be pushed to
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asking(hub, monkeypatch):
    """This process asks the stand-in, with a token that may write."""
    from huggingface_hub import constants

    for name, value in (("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", hub.token)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_room.datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_room, "online", True)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.files |= {"somebody/there": {}, "somebody/closed": {}}
    hub.private.add("somebody/closed")
    return monkeypatch


def refusal(name="somebody/there", private=False):
    with pytest.raises(SystemExit) as ended:
        export.make_repository(name, private)
    return ended.value.code


def test_a_token_that_may_only_read_is_refused_where_the_repository_is_there(asking, hub):
    """`create_repo(exist_ok=True)` lets it pass."""
    asking.setenv("HF_TOKEN", hub.reader)
    assert refusal().startswith("This token may not write to somebody/there.")
    assert refusal("somebody/else").startswith("This token may not write to somebody/else.")
    assert "somebody/else" not in hub.files


def test_each_reason_not_to_push_is_told_as_what_it_is(asking, hub, tmp_path):
    from huggingface_hub import constants

    assert "does not accept the name" in refusal("a//b")
    asking.setenv("HF_TOKEN", "hf_wrong")
    assert refusal().startswith("The hub does not know this token.")
    asking.setenv("HF_TOKEN", "")
    asking.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert refusal().startswith("You are not logged in")
    asking.setenv("HF_TOKEN", hub.token)
    asking.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refusal().startswith("The hub (http://127.0.0.1:9) can't be reached: ")
    asking.setattr(hub_room, "online", False)
    assert "HF_HUB_OFFLINE is set" in refusal()


def test_a_private_push_does_not_go_to_a_public_repository(asking, hub):
    """`create_repo` ignores `private` where there is one."""
    assert "somebody/there is public" in refusal(private=True)
    assert export.make_repository("somebody/closed", True) == "somebody/closed"
    assert export.make_repository("new", True) == "somebody/new" and "somebody/new" in hub.private
    assert export.make_repository("somebody/there", False) == "somebody/there"


def test_the_trainer_does_not_push_the_whole_folder(asking, tmp_path):
    from transformers import TrainingArguments

    options = TrainingArguments(str(tmp_path), push_to_hub=True, hub_model_id="somebody/there", use_cpu=True)
    extra = types.SimpleNamespace(save_merged=False, save_gguf=None)
    with pytest.raises(SystemExit, match="--hub_strategy every_save has the trainer upload all of"):
        export.prepare(options, extra)
    options.hub_strategy = type(options.hub_strategy)("end")
    wanted = {"push_to_hub": True, "hub_model_id": "somebody/there"}
    assert export.prepare(options, extra) == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Merges of this adapter, and of others
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def outputs(pushed, tmp_path, monkeypatch):
    """A finished run whose merges pass their check: what is tried here is which of them are made."""
    outputs = shutil.copytree(pushed.outputs, tmp_path / "outputs")
    monkeypatch.setattr(export, "read_unmerged", lambda load, reader: (["x"] * 2, 0))
    monkeypatch.setattr(export, "read_merged", lambda folder, reader: ["x"] * 2)
    return outputs


def merge(outputs, *options):
    export.main([str(outputs), *(options or ["--save_merged"])], "export")


def another_adapter(outputs):
    """As a later run leaves it, but older than the merge, as one that was copied or put back is."""
    file = outputs / "adapter/adapter_model.safetensors"
    save_file({name: weight + 0.01 for name, weight in load_file(file).items()}, file)
    os.utime(file, (0, 0))


def test_a_merge_says_what_it_was_made_of(outputs, capsys, monkeypatch):
    assert "there is no" in finished.not_made_of(outputs)
    merge(outputs)
    note = json.loads((outputs / "merged/made_of.json").read_text())
    assert (note["base"], note["dtype"]) == ("modell", "float16")
    assert finished.not_made_of(outputs) is None
    (outputs / "adapter/adapter_model.safetensors").touch()  # newer than the merge, and the same
    monkeypatch.setattr(export, "merge", None)
    merge(outputs)
    assert "was already made of this adapter, in float16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_adapter, "was made of another adapter (another adapter_model.safetensors): merging anew."),
        (lambda run: changed(run / "adapter/adapter_config.json", lora_alpha=1), "(another adapter_config.json)"),
        (
            lambda run: (run / "merged/made_of.json").unlink(),
            "does not say which adapter it was made of: merging",
        ),
        (lambda run: os.truncate(run / "merged/model.safetensors", 999), "is damaged ("),
    ],
)
def test_what_is_not_this_adapter_s_merge_is_made_anew(change, words, outputs, capsys):
    merge(outputs)
    change(outputs)
    merge(outputs)
    assert words in capsys.readouterr().out
    assert finished.not_made_of(outputs) is None and export.why_merge(outputs, "float16") is None


def test_another_dtype_is_another_merge(outputs, capsys):
    merge(outputs)
    merge(outputs, "--save_merged", "--dtype", "bfloat16")
    assert "merged is in float16: merging anew." in capsys.readouterr().out
    assert {w.dtype for w in load_file(outputs / "merged/model.safetensors").values()} == {torch.bfloat16}
    assert export.why_merge(outputs, None) is None


def test_an_adapter_that_is_replaced_meanwhile_is_not_merged(outputs, monkeypatch):
    save = export.save_merged
    monkeypatch.setattr(export, "save_merged", lambda *a: (another_adapter(outputs), save(*a))[1])
    with pytest.raises(SystemExit, match="Not merged: another run has replaced"):
        merge(outputs)
    assert not [*outputs.glob("merged*")]


@pytest.fixture
def unsloth(monkeypatch):
    """What stands in for Unsloth and its GPU: it writes one file of the type that it is asked for, beside `merged`."""

    class Model:
        def from_pretrained(name, **_):
            Model.weights = (Path(name) / "model.safetensors").read_bytes()
            return Model, None

        def save_pretrained_gguf(folder, processor, quantization_method):
            Path(f"{folder}_gguf").mkdir(exist_ok=True)
            (Path(f"{folder}_gguf") / f"{quantization_method}.gguf").write_bytes(Model.weights)

    monkeypatch.setitem(sys.modules, "unsloth", types.SimpleNamespace(FastVisionModel=Model))
    monkeypatch.setattr(export, "check_gguf", lambda kind: None)


def test_gguf_files_are_made_of_this_adapter(outputs, unsloth, capsys):
    merge(outputs, "--save_gguf", "q8_0")
    merge(outputs, "--save_gguf", "f16")
    made = {file.name for file in (outputs / "merged_gguf").iterdir()}
    assert made == {"q8_0.gguf", "f16.gguf", "made_of.json"}
    assert finished.not_made_of(outputs, "merged_gguf") is None
    old = (outputs / "merged_gguf/f16.gguf").read_bytes()
    another_adapter(outputs)
    assert finished.not_made_of(outputs, "merged_gguf")
    merge(outputs, "--save_gguf", "f16")
    assert "merged was made of another adapter" in capsys.readouterr().out
    assert (outputs / "merged_gguf/f16.gguf").read_bytes() != old, "an earlier run's merge"
    assert not (outputs / "merged_gguf/q8_0.gguf").exists(), "an earlier run's"
    assert finished.not_made_of(outputs, "merged_gguf") is None


def test_a_run_says_what_lies_there_of_an_earlier_one(outputs, unsloth, capsys, monkeypatch):
    merge(outputs, "--save_gguf", "f16")
    capsys.readouterr()

    def end_of_run():
        export.save(lambda *_: None, outputs, [], {})
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(this_run, "exports", {})
    assert not end_of_run(), "all is of this adapter"
    another_adapter(outputs)
    merged, gguf = end_of_run()
    assert merged.startswith(f"{outputs / 'merged'} was made of another adapter")
    assert merged.endswith(f"python -m qwen_vl_kit export {outputs} --save_merged")
    assert gguf.endswith(f"python -m qwen_vl_kit export {outputs} --save_gguf f16")
    assert len([*export.outdated(outputs, save_merged=True)]) == 1 and not [*export.outdated(outputs, save_gguf="f16")]


# ---------------------------------------------------------------------------------------------------------------------
# A disk that is too small
# ---------------------------------------------------------------------------------------------------------------------


def test_a_disk_too_small_is_said_before_anything_is_loaded(outputs, monkeypatch):
    merge(outputs)
    parameters = export.parameters_of(outputs / "merged")
    assert parameters == sum(weight.numel() for weight in load_file(outputs / "merged/model.safetensors").values())
    assert parameters == export.parameters_of(export.base_of(outputs / "adapter"))
    monkeypatch.setattr(export, "merge", None)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 3.9 * parameters))
    with pytest.raises(SystemExit, match="disk space in .* for the merged model: .* GB are needed, .* GB are free"):
        merge(outputs, "--save_merged", "--dtype", "float32")
    (outputs / "merged.part").mkdir()
    (outputs / "merged.part/left").write_bytes(b"x" * int(0.2 * parameters))  # is deleted first
    export.check_room(outputs, parameters, "float32", save_merged=True)
    with pytest.raises(SystemExit, match="the merged model and GGUF files"):
        export.check_room(outputs, parameters, save_merged=True, save_gguf="q4_k_m")


def test_a_run_says_so_when_it_knows_the_model(tiny, tmp_path):
    big = "from peft import PeftModel; PeftModel.get_nb_trainable_parameters = lambda self: (1, 10**15)"
    ended = run_changed(big, *tiny, "--output_dir", tmp_path, "--save_merged", "true")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert "for the merged model: 2000000.00 GB are needed" in ended.stderr.strip().splitlines()[-1]
    assert "Before" not in ended.stdout and not (tmp_path / "adapter").exists()


def test_a_disk_that_fills_up_leaves_no_half_of_a_merge(outputs, monkeypatch):
    from transformers import PreTrainedModel

    def full(self, folder):
        Path(folder).mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(SystemExit, match="No space left on device. .* GB are needed, .* GB were free"):
        merge(outputs)
    assert not [*outputs.glob("merged*")]
