"""Interruptions and faults, on purpose: processes really killed, a disk really full. What was learned stays."""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import ROOT, SCRIPT, Zygote, execute, run, run_changed
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import AutoProcessor
from transformers.trainer_utils import get_last_checkpoint

from qwen_vl_kit.checkpoints import record_of, seal

STEPS = 40


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The output folder of a run that nothing happened to, with the checkpoints of all its steps."""
    folder = tmp_path_factory.mktemp("whole")
    ended = run(*tiny, "--save_total_limit", 1000, "--output_dir", folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def slow_disk(place):
    """A place for Python to find what makes writing and deleting take long enough to be interrupted."""
    (place / "sitecustomize.py").write_text(
        "import os, time\n"
        "sync, unlink = os.fsync, os.unlink\n"
        "os.fsync = lambda file: (time.sleep(0.01), sync(file))[1]\n"
        "os.unlink = lambda *names, **where: (time.sleep(0.005), unlink(*names, **where))[1]\n"
    )
    return str(place)


@contextmanager
def started(options, folder, slow=True, launcher=()):
    """The script as a process that is running, what it says going to `folder`.log."""
    environment = os.environ | ({"PYTHONPATH": slow_disk(Path(options[1]).parent)} if slow else {})
    command = [sys.executable, *launcher, SCRIPT.name, *map(str, options), "--output_dir", str(folder)]
    with open(f"{folder}.log", "ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition, process=None, seconds=120):
    """Looks a thousand times a second whether `condition()` holds. False: the process has ended before."""
    until = time.monotonic() + seconds
    while not condition():
        if process and process.poll() is not None:
            return condition()
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.001)
    return True


def said(folder):
    return Path(f"{folder}.log").read_text(errors="replace")


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def state(checkpoint):
    """All that training goes on from, out of a checkpoint's files."""
    parts = {name: torch.load(checkpoint / name, weights_only=True) for name in ("optimizer.pt", "scheduler.pt")}
    with torch.serialization.safe_globals([*numpy_globals()]):
        parts["random"] = torch.load(checkpoint / "rng_state.pth", weights_only=True)
    parts["adapter"] = load_file(checkpoint / "adapter_model.safetensors")
    trainer = json.loads((checkpoint / "trainer_state.json").read_text())
    parts["log"] = trainer["log_history"]
    return parts


def numpy_globals():
    import numpy as np

    core = np._core.multiarray
    return core._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))


def same(one, other):
    """Whether two nested states are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    return bool((one == other).all()) if hasattr(one, "all") else one == other


def assert_ended_alike(folder, whole):
    """The run in `folder` has ended as the undisturbed one: state, adapter, readings, losses."""
    last = f"checkpoint-{STEPS}"
    assert same(state(folder / last), state(whole / last))
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not (folder / ".part").exists()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_while_another_tries_to_enter(tiny, whole, tmp_path):
    seed = int(os.environ.get("KILLS_SEED", random.randrange(10**6)))
    print("seed of the kills:", seed)
    chance, folder, part, kills = random.Random(seed), tmp_path / "out", tmp_path / "out" / ".part", []
    environment = os.environ | {"PYTHONPATH": f"{slow_disk(tmp_path)}:{ROOT / 'tests'}"}
    Path(f"{folder}.log").touch()
    options = [*tiny, "--resume_from_checkpoint", "true", "--output_dir", folder]
    # The other one would go on to rows that don't exist, where it found the folder free for a moment.
    intruder, turned_away = [*options, "--dataset_name", "none.parquet"], 0

    def being_written():
        """The files in `part`, if this process has made it."""
        with suppress(FileNotFoundError):
            if part.stat().st_ctime > start:
                return [name for _, _, names in os.walk(part) for name in names]
        return []

    def holder():
        """Who has the folder, as the runs write it down."""
        with suppress(FileNotFoundError):
            return (folder / ".holder.json").read_text()
        return ""

    with Zygote(environment) as one, Zygote(environment) as other:
        while True:
            before, start = steps(folder), time.time()
            process = one.start(options, f"{folder}.log", f"{folder}.log")
            kind = chance.choice(["any", "writing", "deleting"]) if len(kills) < 20 else None
            delay, wanted, said_before, training = (
                chance.uniform(0, 1),
                chance.randrange(2, 11),
                len(said(folder)),
                None,
            )
            enters, tried = start + chance.uniform(0, 2), False
            log = tmp_path / f"other{len(kills)}"
            while kind:
                files = being_written()
                if not training and "Training " in said(folder)[said_before:]:
                    training = time.time()
                if not tried and time.time() > enters and f'"pid": {process},' in holder():
                    other.start(intruder, log, log)
                    tried = True
                if (
                    (
                        kind == "any"
                        and time.time() > (start + 5 * delay if delay < 0.2 else (training or start + 60) + delay)
                    )
                    or (kind == "writing" and len(files) >= wanted)
                    or (kind == "deleting" and steps(folder)[:1] > before[:1] and 0 < len(files) < wanted)
                    or not Path(f"/proc/{process}").exists()
                ):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                    kills.append((kind, len(being_written())))
                    break
                time.sleep(0.0005)
            code = one.wait()
            if tried:
                assert other.wait() in (1, 2), log.read_text()[-3000:]
                reason = log.read_text().strip().splitlines()[-1]
                assert "is using" in reason or "none.parquet" in reason, reason
                turned_away += "is using" in reason
            for step in steps(folder):  # each is as it was in the run that was not killed
                assert same(state(folder / f"checkpoint-{step}"), state(whole / f"checkpoint-{step}")), (seed, kills)
            assert max(before, default=0) <= max(steps(folder), default=0), (seed, kills)
            if code == 0:
                break
            assert code == -signal.SIGKILL, said(folder)[-3000:]
    print(kills, turned_away)
    assert len(kills) >= 20 and sum(left > 0 for _, left in kills) >= 5, "too few kills while something was written"
    assert turned_away >= 5, "the other one hardly ever met a run"
    assert_ended_alike(folder, whole)


@pytest.mark.parametrize("seconds", [0, 3, 12])
def test_a_second_run_is_told_who_has_the_folder_and_touches_nothing(seconds, tiny, tmp_path):
    folder = tmp_path / "out"
    endless = [*tiny, "--max_steps", "100000", "--save_steps", "1000"]
    with started(endless, folder, slow=False) as first:
        assert wait_for(lambda: (folder / ".holder.json").exists(), first)
        time.sleep(seconds)
        before = digests(folder)
        ended = run(*tiny, "--output_dir", folder)
        assert ended.returncode == 2 and "Traceback" not in ended.stderr
        assert re.search(rf"a run \(process {first.pid} on \S+, since [\d: -]+\) is using {folder}: ", ended.stderr)
        assert {*digests(folder)} >= {*before} and first.poll() is None
    # Killed, it leaves the folder to the next.
    ended = run(*tiny, "--max_steps", 2, "--output_dir", folder)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_the_run_goes_on_from_it(number, tiny, whole, tmp_path):
    folder = tmp_path / "out"
    options = [*tiny, "--save_steps", "1000"]
    with started(options, folder) as process:
        assert wait_for(lambda: re.search(r"\b[3-9]/40", said(folder)), process)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    stopped = re.search(
        rf"Stopped after step (\d+)\. {folder}/checkpoint-\1 is complete.*--resume_from_c", said(folder)
    )
    assert "Traceback" not in said(folder) and steps(folder) == [int(stopped[1])]
    assert 3 <= steps(folder)[0] < STEPS
    ended = run(*options, "--output_dir", folder, "--resume_from_checkpoint", "true")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_ended_alike(folder, whole)


def test_a_signal_to_a_launcher_stops_all_processes_after_the_same_step(tiny, tmp_path):
    folder = tmp_path / "out"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    # Too many steps to be through before the launcher has passed the signal on.
    with started([*tiny, "--save_steps", "1000", "--max_steps", "1000"], folder, launcher=torchrun) as process:
        assert wait_for(lambda: re.search(r"\b([3-9]|[1-9]\d+)/1000", said(folder)), process)
        process.terminate()
        process.wait(60)
    assert re.search(rf"Stopped after step {steps(folder)[-1]}\. ", said(folder))
    assert {path.name for path in (folder / f"checkpoint-{steps(folder)[-1]}").glob("rng_state_*.pth")} == {
        "rng_state_0.pth", "rng_state_1.pth",
    }  # fmt: skip


def test_a_second_signal_ends_it_at_once(tiny, tmp_path):
    folder = tmp_path / "out"
    with started(tiny, folder) as process:
        assert wait_for(lambda: steps(folder), process)
        assert wait_for(lambda: list((folder / ".part").glob("checkpoint-*")), process)
        process.send_signal(signal.SIGINT)
        assert wait_for(lambda: "Interrupt again" in said(folder), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == -signal.SIGINT
    assert "Traceback" not in said(folder) and "Stopped" not in said(folder)


def digests(folder):
    fleeting = ("skipped.jsonl", ".lock", ".holder.json")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in fleeting]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in files}


def test_runs_do_not_overwrite_one_another(tiny, whole, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    adapter, other = digests(folder / "adapter"), [*tiny, "--seed", "1", "--max_steps", "6"]
    with started(other, folder) as process:  # over a finished run, killed
        assert wait_for(lambda: 2 in steps(folder) and max(steps(folder)) < 6, process)
        process.kill()
    assert digests(folder / "adapter") == adapter, "the finished run's, as long as this one has not finished"
    assert json.loads((folder / "metrics.json").read_text())["settings"]["seed"] == 3407
    assert max(steps(folder)) < 6, "what there is to go on from is this run's"

    subprocess.run(
        [sys.executable, "-m", "qwen_vl_kit", "report", folder], cwd=ROOT, check=True
    )  # writes to the finished run's results
    before = digests(folder)
    ended = run(*other, "--output_dir", folder)  # over the unfinished one
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    reason = ended.stderr.splitlines()[-1]
    assert "not finished" in reason and "--resume_from_checkpoint true" in reason and "--output_dir" in reason
    assert digests(folder) == before

    ended = run(*other, "--output_dir", folder, "--resume_from_checkpoint", "true")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert digests(folder / "adapter").keys() == adapter.keys() and digests(folder / "adapter") != adapter
    assert json.loads((folder / "metrics.json").read_text())["settings"]["seed"] == 1
    # All is done, so this ends at once, and leaves everything as it is.
    before = digests(folder)
    ended = run(*other, "--output_dir", folder, "--resume_from_checkpoint", "true")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "has already finished, after 6 steps" in ended.stdout
    assert digests(folder) == before
    assert not (folder / "README.md").exists(), "TRL's own card"


def test_a_checkpoint_saved_again_and_the_best_one_stay_whole(tiny, tmp_path, monkeypatch):
    options = ("--max_steps", 4, "--eval_strategy", "steps", "--eval_steps", 1, "--save_total_limit", 1)
    names = execute(*tiny, *options, "--output_dir", tmp_path)
    trainer = names["trainer"]
    best = trainer.state.best_global_step
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert steps(tmp_path) == sorted({best, 4} | ({3} if best == 4 else set()))
    for step in steps(tmp_path):
        saved = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert saved["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{saved['best_global_step']}")
    before = state(tmp_path / "checkpoint-4")
    # A checkpoint has the options in it, and pickle has to find their class.
    monkeypatch.setattr(sys.modules["__main__"], "Options", names["Options"], raising=False)
    trainer.save_now()  # as after running out of memory
    assert same(state(tmp_path / "checkpoint-4")["optimizer.pt"], before["optimizer.pt"])
    assert not (tmp_path / ".part").exists()


# From the twelfth step on (in an epoch that is not the first), one row has a loss or a gradient that is NaN.
SPOILED = """
import torch
from peft import PeftModelForCausalLM as Model

forward, answer, taken = Model.forward, {answer}, []

def spoil(self, *arguments, **inputs):
    taken.append(torch.is_grad_enabled())
    rows = [[token for token in row if token != -100] for row in inputs.get("labels", torch.tensor([])).tolist()]
    if sum(taken) > 12 and answer in rows:
        if {what!r} == "loss":
            inputs["pixel_values"] = inputs["pixel_values"] * float("inf")
        else:
            adapter = next(parameter for parameter in self.parameters() if parameter.requires_grad)
            adapter.register_hook(lambda gradient: gradient * float("nan"))
    return forward(self, *arguments, **inputs)

Model.forward = spoil
"""


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_ends_the_run_with_its_rows(what, tiny, tmp_path):
    spoiled, tokenizer = 17, AutoProcessor.from_pretrained(tiny[1]).tokenizer
    text = load_dataset("parquet", data_files=tiny[3], split="train")["text"][spoiled]
    answer = tokenizer(text.strip() + "<|im_end|>", add_special_tokens=False).input_ids
    ended = run_changed(SPOILED.format(answer=answer, what=what), *tiny, "--output_dir", tmp_path)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    message = ended.stderr.strip().splitlines()[-1]
    rows = json.loads(re.search(r"Look at its training rows, (\[.*?\])", message)[1])
    step = int(re.search(rf"The {what} of step (\d+) is (?:nan|inf)", message)[1])
    assert spoiled in rows and len(rows) == 4 and step > 12
    assert steps(tmp_path)[-1] == step - 1 and f"checkpoint-{step - 1} is complete" in message
    adapter = load_file(tmp_path / f"checkpoint-{step - 1}" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())


@contextmanager
def disk(folder, options):
    """A small file system of its own at `folder`; skips the test where none can be mounted."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


INTERRUPTED = """
import sys
from pathlib import Path
from qwen_vl_kit import checkpoints
outputs, how, replace = Path(sys.argv[1]), sys.argv[2], Path.replace

def fail(self, target):  # the second of the two renames
    if self.name == "adapter":
        raise OSError(5, "Input/output error") if how == "fault" else KeyboardInterrupt
    return replace(self, target)

Path.replace = fail
with checkpoints.saving(outputs, "the results") as part:
    (part / "adapter").mkdir()
    (part / "adapter" / "adapter_model.safetensors").write_text("new")
"""


@pytest.mark.parametrize("how", ["fault", "kill"])
def test_what_is_to_be_replaced_is_not_lost_between_two_renames(how, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("old")

    def python(code, *arguments):
        return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)

    ended = python(INTERRUPTED, str(tmp_path), how)
    assert ended.returncode != 0
    if how == "fault":
        assert ended.stderr.splitlines()[-1].startswith("Could not save the results")
    else:  # the next run puts it back
        assert not (tmp_path / "adapter").exists()
        check = "from qwen_vl_kit import checkpoints as c; import sys; c.put_back(c.Path(sys.argv[1]))"
        checked = python(check, str(tmp_path))
        assert checked.returncode == 0, checked.stderr[-3000:]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_text() == "old"


def test_a_disk_that_fills_up_leaves_what_was_saved(tiny, whole, tmp_path):
    folder = tmp_path / "out"
    with disk(folder, "size=130m"):
        with started(tiny, folder) as process:
            assert wait_for(lambda: 2 in steps(folder), process)
            with open(folder / "filler", "wb") as filler, suppress(OSError):
                while True:
                    filler.write(bytes(1 << 16))
                    filler.flush()
            assert process.wait(60) == 1
        assert "Traceback" not in said(folder), said(folder)[-3000:]
        reason = said(folder).splitlines()[-1]
        assert re.match(r"Could not save checkpoint-\d+, with 0.00 GB free", reason), reason
        last = get_last_checkpoint(folder)
        assert f"{last} is complete" in reason and "Make room" in reason and "--resume_from_checkpoint true" in reason
        for step in steps(folder):
            assert same(state(folder / f"checkpoint-{step}"), state(whole / f"checkpoint-{step}"))
        assert not (folder / ".part").exists()
        (folder / "filler").unlink()
        ended = run(*tiny, "--output_dir", folder, "--resume_from_checkpoint", "true")
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert_ended_alike(folder, whole)


@pytest.mark.parametrize("options", ["size=200m,ro", "size=50m"])
def test_a_disk_that_will_not_do_is_found_before_the_model_is_loaded(options, tiny, tmp_path):
    folder = tmp_path / "out"
    with disk(folder, options):
        ended = run(*tiny, "--output_dir", folder)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "--output_dir" in ended.stderr.splitlines()[-1] and str(folder) in ended.stderr.splitlines()[-1]
    assert "parameters train" not in ended.stdout


@pytest.mark.slow
def test_memory_stays_flat(tiny, tmp_path):
    folder, sizes, page = tmp_path / "out", {}, os.sysconf("SC_PAGE_SIZE")
    with started([*tiny, "--max_steps", "2000", "--save_steps", "100"], folder, slow=False) as process:
        at = 0
        while process.poll() is None and at < 1990:
            at = max(map(int, re.findall(r"\b(\d+)/2000", said(folder))), default=0)
            if at:
                sizes[at] = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page
            time.sleep(0.05)
    early = median(size for step, size in sizes.items() if 200 <= step <= 500)
    late = median(size for step, size in sizes.items() if step >= 1700)
    print(f"{early / 1e6:.1f} MB in steps 200 to 500, {late / 1e6:.1f} MB from 1,700 on: {late / early - 1:+.2%}")
    assert at >= 1990 and late < 1.02 * early


class Touch:
    """What, unpickled, makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def test_no_pickle_is_loaded(tiny, whole, tmp_path):
    checkpoint, good = tmp_path / "checkpoint-39", whole / "checkpoint-39"
    shutil.copytree(good, checkpoint)
    bad = pickle.dumps(Touch(str(tmp_path / "pwned")), protocol=2)
    for name in ("training_args.bin", "adapter_model.bin", "model.pkl"):  # not needed
        (checkpoint / name).write_bytes(bad)
    for name in ("optimizer.pt", "rng_state.pth", "none"):
        (checkpoint / name).write_bytes(bad)
        seal(checkpoint, record_of(checkpoint))  # whoever can write a pickle can write its digest, too
        ended = run(*tiny, "--output_dir", tmp_path, "--resume_from_checkpoint", "true")
        if name == "none":
            assert ended.returncode == 0, ended.stderr[-3000:]
            assert_ended_alike(tmp_path, whole)
        else:
            assert ended.returncode == 1 and "Weights only load failed" in ended.stderr
            shutil.copy(good / name, checkpoint)
        assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("part", ["config", "processor_config"])
def test_a_model_s_own_code_does_not_run(part, tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny[1], model)
    (model / "own.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Own: pass\n")
    config = json.loads((model / f"{part}.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own", "AutoProcessor": "own.Own"}
    if part == "config":
        config["model_type"] = "own"
    else:
        config["processor_class"] = "Own"
    (model / f"{part}.json").write_text(json.dumps(config))
    ended = run(*tiny, "--max_steps", 2, "--model_name_or_path", model, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "pwned").exists()
    if part == "config":  # nothing can stand in for it
        assert ended.returncode == 1 and "Traceback" not in ended.stderr
        assert "Could not load the model" in ended.stderr.splitlines()[-1]


def test_a_token_is_written_nowhere(tiny, tmp_path):
    folder = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_of_the_environment")
        ended = run(*tiny, "--max_steps", 2, "--hub_token", "hf_of_an_option", "--output_dir", folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files) and (folder / "report.html").exists()
    for text in [ended.stdout.encode(), ended.stderr.encode(), *(path.read_bytes() for path in files)]:
        assert b"hf_of_" not in text
