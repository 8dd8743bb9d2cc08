"""From the adapter to use, as README and docs have it: read a folder, merge, serve, share."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHORT, kit, run
from hub import Hub
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from qwen_vl_kit import export as export_room
from qwen_vl_kit.export import add_adapters
from qwen_vl_kit.loading import base_of, how_of, load_base

# Where the code blocks are that are tried here: reading a folder, asking a server, loading by Unsloth.
PAGES = [ROOT / "README.md", ROOT / "docs" / "use.md"]


def block(words):
    """The one block of Python in PAGES with these words in it."""
    pages = "".join(page.read_text() for page in PAGES if page.exists())
    (found,) = [block for block in re.findall(r"```py(?:thon)?\n(.*?)```", pages, re.S) if words in block]
    return found


READ, ASK, UNSLOTH = (
    block(".glob(").replace("outputs/demo/held_out", "images"),
    block("OpenAI("),
    block("FastVisionModel"),
)


@pytest.fixture(scope="module")
def hub():
    hub = Hub("hf_secret")
    yield hub
    hub.server.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory, hub):
    """A folder with the `outputs/` of a short run that asked for all, on a base stored in 4 bits as the real one is.

    Its images are of another size, and its batches padded on the other side, than by the base's own processor.
    """
    place = tmp_path_factory.mktemp("place")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    nf4.bnb_4bit_compute_dtype = torch.float32
    base = AutoModelForImageTextToText.from_pretrained(
        ROOT / "demo/model", quantization_config=nf4, dtype=torch.float32, device_map={"": "cpu"}
    )
    base.save_pretrained(place / "base")
    processor = AutoProcessor.from_pretrained(ROOT / "demo/model")
    processor.tokenizer.padding_side = "right"
    processor.save_pretrained(place / "base")
    options = ["--config", "demo/config.yaml", "--max_steps", "200", "--num_test_rows", "64", "--min_pixels", "6000"]
    options += ["--model_name_or_path", place / "base", "--output_dir", place / "outputs", "--save_merged", "true"]
    options += ["--push_to_hub", "true", "--hub_model_id", "somebody/latex", "--hub_token", "hf_secret"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("HF_HUB_OFFLINE", "0")
        ended = run(*options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Merged into" in ended.stdout and "4-bit weights dequantized" in ended.stdout
    assert "hf_secret" not in ended.stdout + ended.stderr
    (place / "images").symlink_to(place / "outputs" / "held_out")
    return place


@pytest.fixture(scope="module")
def readings(place):
    """What the run read in each held-out image at its end: {file name: LaTeX}."""
    rows = map(json.loads, (place / "outputs" / "predictions.jsonl").read_text().splitlines())
    return {Path(row["image"]).name: row["after"]["text"] for row in rows}


def read_without_the_kit(place, model):
    """What the ten lines without the kit read in `images` with the model or adapter in `outputs/<model>`."""
    code = re.sub('"outputs/(demo/)?adapter"', f'"outputs/{model}"', READ)
    assert code.count(f'"outputs/{model}"') == 2
    ended = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return dict(line.split("\t") for line in ended.stdout.splitlines() if line.count("\t") == 1)


def test_ten_lines_without_the_kit_read_a_folder(place, readings):
    assert len([line for line in READ.splitlines() if line.strip()]) <= 10
    read = read_without_the_kit(place, "adapter")
    assert read.keys() == readings.keys()
    # Other batches than the run's round otherwise, which may tip one reading or two.
    assert sum(read[name] == text for name, text in readings.items()) >= 0.95 * len(readings)


def read_by_command(place, model):
    """What `read` reads in `images` with `outputs/<model>`, and what it says."""
    ended = kit("read", f"outputs/{model}", "images", cwd=place)
    assert ended.returncode == 0, ended.stderr[-3000:]
    read = dict(line.split("\t") for line in ended.stdout.splitlines())
    return {Path(file).name: text for file, text in read.items()}, ended.stderr


def test_the_command_reads_as_the_run_did(place, readings):
    """All of them to the letter: with the adapter beside the base in 4 bits, asked and prepared as in the run."""
    read, said = read_by_command(place, "adapter")
    assert read == readings and "no record" not in said
    read, said = read_by_command(place, "")  # takes the merge
    assert sum(read[name] == text for name, text in readings.items()) >= 0.95 * len(readings)
    assert "Reading with outputs/merged" in said and "no record" not in said


def test_scores_without_training_are_the_run_s(place):
    """Both: of the model, and of its base, asked and prepared as in the run."""
    ended = kit("score", "outputs", "--against", "base", cwd=place)
    assert ended.returncode == 0, ended.stderr[-3000:]
    scores = json.loads((place / "outputs/score/scores.json").read_text())
    metrics = json.loads((place / "outputs/metrics.json").read_text())
    assert all(scores[name] == metrics[name] for name in ("before", "after", "difference"))
    rows = [json.loads(line) for line in (place / "outputs/score/predictions.jsonl").read_text().splitlines()]
    record = json.loads((place / "outputs/run.json").read_text())
    assert [row["row"] for row in rows] == [row for row, _ in record["held_out"]]
    others = ("--dataset_name", ROOT / "demo/data", "--dataset_test_split", "train", "--num_test_rows", 3)
    ended = kit("score", "outputs", *others, cwd=place)
    assert "may have been trained on 3 of these rows" in ended.stdout, ended.stderr[-3000:]


def test_the_lines_for_unsloth_go_into_these_ten(place, readings, tmp_path):
    """On a CPU there is no Unsloth: what stands in for it loads the model by transformers, as Unsloth gives it back."""
    (tmp_path / "unsloth.py").write_text(
        "class FastVisionModel:\n"
        "    def from_pretrained(name, load_in_4bit):\n"
        "        from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "        return AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)\n"
        "    def for_inference(model):\n"
        "        model.eval()\n"
    )
    first, _, instead = re.sub("outputs/demo/", "outputs/", UNSLOTH).rpartition("\n\n")
    code, replaced = re.subn(r"^reader = .*pipeline\(.*$", lambda _: instead, f"{first}\n{READ}", flags=re.M)
    assert replaced == 1
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    read = dict(line.split("\t") for line in ended.stdout.splitlines() if line.count("\t") == 1)
    assert sum(read[name] == text for name, text in readings.items()) >= 0.95 * len(readings)


def test_the_model_card_s_lines_read_an_image(place):
    rows = map(json.loads, (place / "outputs" / "predictions.jsonl").read_text().splitlines())
    # One that it is sure of: beside others in a batch, sums round otherwise, which can tip a doubtful sign.
    name, text = next((Path(row["image"]).name, row["truth"]) for row in rows if row["after"]["text"] == row["truth"])
    (code,) = re.findall(r"```python\n(.*?)```", (place / "outputs/adapter/README.md").read_text(), re.S)
    code = code.replace("owner/name", "outputs/adapter").replace("formula.png", f"images/{name}")
    ended = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1] == text


@pytest.mark.parametrize("model", ["adapter", "merged"])
def test_the_benchmark_times_it(place, model):
    command = [sys.executable, "benchmarks/reading.py", place / "outputs" / model, place / "images", "--tokens", "8"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads(ended.stdout)
    assert result["images"] == 64 and all(result[f"images_per_s_at_{batch}"] > 0 for batch in (1, 16, 64))


@pytest.fixture(scope="module")
def exact(place):
    """A copy of `place`, but for the merged model, which has 32 bits: no rounding excuses a difference."""
    exact = place.with_name(f"{place.name}-exact")
    shutil.copytree(place, exact, symlinks=True)
    ended = kit("export", exact / "outputs", "--save-merged", "--dtype", "float32")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "reads 32 of 32" in ended.stdout and "in float32" in ended.stdout
    return exact


def test_a_merge_in_32_bits_reads_exactly_as_the_adapters_do(exact):
    base, merged = (load_file(at / "model.safetensors") for at in (ROOT / "demo/model", exact / "outputs/merged"))
    assert base.keys() == merged.keys(), "other names than the model's own"
    assert all(weight.dtype == torch.float32 for weight in merged.values())


def test_merged_weights_have_16_bits_and_no_trace_of_4(place):
    weights = load_file(place / "outputs" / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert "quantization_config" not in json.loads((place / "outputs" / "merged" / "config.json").read_text())
    assert not (place / "outputs" / "merged.part").exists()


def test_small_changes_survive_the_rounding_to_16_bits(place):
    """Changes of a tenth of the distance between neighbouring bfloat16 numbers, as a short training makes them."""
    metrics = json.loads((place / "outputs/metrics.json").read_text())
    base = load_base(place / "base", how_of(metrics), torch.bfloat16, "cpu")
    model = PeftModel.from_pretrained(base, place / "outputs/adapter")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    before, change = {}, {}
    for name, layer in layers.items():
        layer.base_layer.weight.quant_state.dtype = torch.float32
        before[name] = dequantize_bnb_weight(layer.base_layer.weight)
        layer.base_layer.weight.quant_state.dtype = torch.bfloat16
        wanted = before[name].square().mean().sqrt() / 2**8 / 10
        layer.lora_B["default"].weight.data *= wanted / layer.get_delta_weight("default").square().mean().sqrt()
        change[name] = layer.get_delta_weight("default").detach()
    assert len(layers) > 20
    merged = add_adapters(model, torch.bfloat16).state_dict()
    merged = {name: merged[f"{name.removeprefix('base_model.model.')}.weight"] for name in layers}
    assert all(weight.dtype == torch.bfloat16 for weight in merged.values())
    kept = sum(((merged[name].float() - before[name]) * change[name]).sum() for name in layers)
    assert kept / sum(change[name].square().sum() for name in layers) == pytest.approx(1, abs=0.1)


def test_a_merge_that_reads_otherwise_does_not_count(place, tmp_path):
    outputs = shutil.copytree(place / "outputs", tmp_path / "outputs")
    (tmp_path / "sitecustomize.py").write_text(
        "import peft.tuners.lora as lora\n"  # what is merged is the base, as some recipes ship it
        "lora.Linear4bit.get_delta_weight = lambda self, _: self.base_layer.weight.new_zeros(())\n"
    )
    before = (outputs / "merged" / "model.safetensors").read_bytes()
    (outputs / "merged" / "made_of.json").unlink()  # else it is there already, and nothing is to be done
    ended = kit("export", outputs, "--save_merged", PYTHONPATH=str(tmp_path))
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("Not merged: it reads ")
    assert (outputs / "merged" / "model.safetensors").read_bytes() == before, "the good one is lost"


def test_adapters_that_change_no_reading_prove_nothing(tmp_path):
    """Two small steps, on a base stored in 16 bits that the run itself rounds to 4."""
    ended = run(*SHORT, "--output_dir", tmp_path, "--save_merged", "true", "--learning_rate", "1e-8")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert "the base alone reads 6 of 6" in ended.stderr
    assert (tmp_path / "report.html").exists() and not [*tmp_path.glob("merged*")]


def test_the_server_reads_as_the_batches_do(exact, tmp_path):
    read = read_without_the_kit(exact, "merged")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The test's own address and image, in the README's own words.
    code = re.sub(r'open\("[^"]+"', "open(file", ASK.replace("localhost:8000", f"127.0.0.1:{port}"))
    code = code.replace("outputs/demo/merged", "outputs/merged")
    assert code.count("file") == 1 and str(port) in code
    code = code.replace("print(", "answers.append(")

    def ask(name):
        names = {"file": exact / "images" / name, "answers": []}
        exec(code, names)
        return names["answers"][0]

    command = [Path(sys.executable).with_name("transformers"), "serve", "outputs/merged", "--port", str(port)]
    log = open(tmp_path / "server.log", "w+")  # noqa: SIM115
    server = subprocess.Popen([*command, "--host", "127.0.0.1"], cwd=exact, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()[-3000:]
                time.sleep(0.3)
        with ThreadPoolExecutor(8) as eight:
            answers = dict(zip(read, eight.map(ask, read), strict=True))
    finally:
        server.terminate()
        server.wait(30)
        log.close()
    assert len(answers) == 64 and len(set(answers.values())) > 32
    different = {name: (answers[name], text) for name, text in read.items() if answers[name] != text}
    assert not different


def test_what_is_pushed(place, hub):
    files = hub.files["somebody/latex"]
    names = {file.name for file in (place / "outputs" / "adapter").iterdir()}
    assert set(files) == names, "not the adapter, its processor and its card alone"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= names
    for name in ("adapter_model.safetensors", "tokenizer.json", "processor_config.json"):
        assert files[name] == (place / "outputs" / "adapter" / name).read_bytes(), name
    cer = json.loads((place / "outputs" / "metrics.json").read_text())["after"]["cer"]
    assert f"value: {cer}" in files["README.md"].decode()
    for name, content in files.items():
        for own in (str(place), str(ROOT), str(Path.home()) + "/", "hf_secret"):
            assert own.encode() not in content, f"{own} in {name}"


def test_the_token_stays_out_of_what_a_run_writes(place):
    files = [file for file in (place / "outputs").rglob("*") if file.is_file()]
    assert any(file.name == "training_args.bin" for file in files)
    assert not [file for file in files if b"hf_secret" in file.read_bytes()]


def test_foreign_files_in_the_adapter_s_folder_are_not_pushed(place, hub, tmp_path):
    outputs = shutil.copytree(place / "outputs", tmp_path / "outputs")
    for name in ("training_args.bin", "notes.txt", "checkpoint-1/model.safetensors", "photo.png"):
        (outputs / "adapter" / name).parent.mkdir(exist_ok=True)
        (outputs / "adapter" / name).write_text("private")
    there = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    ended = kit("export", outputs, "--push_to_hub", "--hub_model_id", "somebody/again", **there)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert set(hub.files["somebody/again"]) == set(hub.files["somebody/latex"])


SENTENCES = {
    "a push without a name": (["--push_to_hub", "true"], "--hub_model_id"),
    "a push without a login": (["--push_to_hub", "true", "--hub_model_id", "somebody/other"], "hf auth login"),
    "a name that the hub can't take": (["--push_to_hub", "true", "--hub_model_id", "a//b"], "does not accept the name"),
    "an unknown kind of GGUF": (["--save_gguf", "q1"], "q8_0"),
}
if not torch.cuda.is_available():
    SENTENCES["GGUF without a GPU"] = (["--save_gguf", "q8_0"], "needs an NVIDIA GPU")


@pytest.mark.parametrize("case", SENTENCES)
def test_what_can_t_be_done_is_one_sentence(case, place, hub, tmp_path):
    arguments, words = SENTENCES[case]
    there = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_HOME": str(tmp_path)}
    ended = kit("export", place / "outputs", *arguments, **there)
    assert ended.returncode not in (0, None)
    assert "Traceback" not in ended.stderr and words in ended.stderr.strip().splitlines()[-1], ended.stderr[-3000:]
    assert "somebody/other" not in hub.files


def test_the_script_says_it_before_training(hub, tmp_path):
    arguments, words = SENTENCES["a push without a login"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HF_ENDPOINT", hub.endpoint), ("HF_HUB_OFFLINE", "0"), ("HF_HOME", str(tmp_path))):
            patch.setenv(name, value)
        patch.delenv("HF_TOKEN", raising=False)
        ended = run(*SHORT, "--output_dir", tmp_path / "outputs", *arguments)
    assert ended.returncode == 1 and not ended.stdout
    assert "Traceback" not in ended.stderr and words in ended.stderr.strip().splitlines()[-1], ended.stderr[-3000:]


def test_without_the_kit_it_is_said_before_training(tmp_path):
    shutil.copy(ROOT / "finetune_qwen_vl.py", tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    command = [sys.executable, "finetune_qwen_vl.py", *SHORT, "--save_merged", "true"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode and "--save_merged" in ended.stderr.splitlines()[-1]
    assert "rows to train on" not in ended.stdout


def changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-1000])


def of_another_rank(file):
    save_file({name: torch.cat([weight, weight]) for name, weight in load_file(file).items()}, file)


# What became of a run's folder, and the words that say so; nothing else may be said.
BROKEN = {
    "no metrics": (lambda run: (run / "metrics.json").unlink(), "no finished run in"),
    "no adapter": (lambda run: shutil.rmtree(run / "adapter"), "no finished run in"),
    "no weights": (lambda run: (run / "adapter/adapter_model.safetensors").unlink(), "no finished run in"),
    "no predictions": (lambda run: (run / "predictions.jsonl").unlink(), "no finished run in"),
    "no images": (lambda run: shutil.rmtree(run / "held_out"), "no finished run in"),
    "half an adapter": (
        lambda run: cut_short(run / "adapter/adapter_model.safetensors"),
        "adapter_model.safetensors is damaged",
    ),
    "half a configuration": (
        lambda run: (run / "adapter/adapter_config.json").write_text('{"r": 16,'),
        "adapter_config.json is damaged",
    ),
    "half a processor": (lambda run: (run / "adapter/tokenizer.json").write_text("{"), "The processor in"),
    "another adapter": (lambda run: of_another_rank(run / "adapter/adapter_model.safetensors"), "does not fit"),
    "a base that was moved": (
        lambda run: changed(run / "adapter/adapter_config.json", base_model_name_or_path="/nowhere/base"),
        "The base model /nowhere/base of this adapter was not found: put it back",
    ),
    "a base elsewhere": (
        lambda run: changed(run / "adapter/adapter_config.json", base_model_name_or_path="nowhere/base"),
        f"The base model 'nowhere/base' of this adapter was not found (no such folder in {ROOT}, nor in one above",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_error_is_told_as_what_it_is(case, place, tmp_path):
    change, words = BROKEN[case]
    outputs = shutil.copytree(place / "outputs", tmp_path / "outputs", ignore=lambda *_: ["merged"])
    change(outputs)
    ended = kit("export", outputs, "--save_merged")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    said = ended.stderr.strip().splitlines()[-1]
    assert words in said
    assert sum(other in said for other in {words for _, words in BROKEN.values()}) == 1
    assert not (outputs / "merged.part").exists()


def test_an_unexpected_error_keeps_its_traceback(place, tmp_path):
    outputs = shutil.copytree(place / "outputs", tmp_path / "outputs")
    changed(outputs / "metrics.json", settings={"instruction": "Write.", "max_new_tokens": 8})
    ended = kit("export", outputs, "--save_merged")
    assert ended.returncode == 1 and "Traceback" in ended.stderr and ended.stderr.strip().endswith("KeyError: 'bf16'")


def test_an_adapter_of_nan_is_not_merged(place):
    metrics = json.loads((place / "outputs/metrics.json").read_text())
    model = PeftModel.from_pretrained(
        load_base(place / "base", how_of(metrics), torch.float32, "cpu"), place / "outputs/adapter"
    )
    layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        add_adapters(model, torch.float16)


def test_a_base_is_found_from_where_its_run_was_started(place, tmp_path, monkeypatch):
    outputs = shutil.copytree(place / "outputs", tmp_path / "project/outputs/run", ignore=lambda *_: ["merged"])
    (tmp_path / "project/models").mkdir()
    (tmp_path / "project/models/base").symlink_to(place / "base")
    changed(outputs / "adapter/adapter_config.json", base_model_name_or_path="models/base")
    monkeypatch.chdir(tmp_path)
    assert Path(base_of(outputs / "adapter")).samefile(place / "base")
    monkeypatch.chdir(tmp_path / "project")
    assert base_of(outputs / "adapter") == "models/base"


def test_the_room_runs_from_any_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(SystemExit) as ended:
        export_room.run("nowhere", save_merged=True, save_gguf=None)
    assert ended.value.code == 1 and "There is no folder nowhere" in capfd.readouterr().err
