"""Several processes, started by the ecosystem's launchers, and several machines: on the CPU, connected by gloo."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPT, SHORT, run
from datasets import load_dataset
from safetensors.torch import load_file

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
# A script in place of SCRIPT, which runs it with {change} made to the process of rank 1 alone.
UNEVEN = """
import os, runpy, sys, torch
from peft import PeftModelForCausalLM as Model
forward = Model.forward
taken = []

def change(self, *arguments, input_ids=None, **inputs):
    if torch.is_grad_enabled():
        taken.append(len(input_ids))
        {change}
    return forward(self, *arguments, input_ids=input_ids, **inputs)

if os.environ["RANK"] == "1":
    Model.forward = change
sys.path[0] = os.path.dirname(sys.argv[0])  # where the kit lies
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(*arguments, processes=2, launcher=TORCHRUN, script=SCRIPT.name, timeout=300):
    command = [*launcher, str(processes), script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def launch_uneven(folder, change, *arguments):
    (folder / "uneven.py").write_text(UNEVEN.replace("{change}", change).replace("sys.argv[0]", repr(str(SCRIPT))))
    return launch(*arguments, script=str(folder / "uneven.py"))


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def steps(folder, what="loss"):
    return [entry[what] for entry in metrics(folder)["train"]["log"] if "loss" in entry]


OPTIONS = (*SHORT, "--num_test_rows", 7, "--max_steps", 6, "--save_steps", 3, "--output_dir")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What a run in one process leaves."""
    folder = tmp_path_factory.mktemp("one")
    ended = run(*OPTIONS, folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What the same run in two processes leaves, and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    ended = launch(*OPTIONS, folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder, ended.stdout


def test_two_processes_learn_what_one_does(one, two):
    folder, _ = two
    assert (metrics(one)["processes"], metrics(folder)["processes"]) == (1, 2)
    assert len(steps(one)) == 6
    assert steps(folder) == pytest.approx(steps(one), rel=1e-4)
    assert steps(folder, "grad_norm") == pytest.approx(steps(one, "grad_norm"), rel=1e-4)


def test_two_processes_read_each_row_once_and_as_one_does(one, two):
    folder, _ = two
    read = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len({row["row"] for row in read}) == len(read) == 7
    assert read == [json.loads(line) for line in (one / "predictions.jsonl").read_text().splitlines()]
    for when in ("before", "after"):
        assert metrics(folder)[when] == metrics(one)[when]


def test_a_process_that_aborts_as_python_ends_has_done_its_work_by_then(tmp_path):
    """As a thread of gloo now and then makes it do; here, what is done away with last does."""
    change = 'if len(taken) == 1: sys.last = type("Last", (), {"__del__": lambda self, abort=os.abort: abort()})()'
    ended = launch_uneven(tmp_path, change, *OPTIONS, tmp_path / "outputs")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert metrics(tmp_path / "outputs")["processes"] == 2


def test_one_process_speaks(two):
    folder, printed = two
    for line in ("demo/data: 48 rows to train on", "Before training", "After training", "Report: ", "Trained in"):
        assert printed.count(line) == 1, line
    assert printed.count("model reads: ") == 2
    assert "Training 6 steps of 8 samples (4 x 1 per device, activations kept)" in printed
    assert (folder / "report.html").exists() and (folder / "adapter" / "README.md").exists()


def test_parts_of_a_step_and_the_end_of_the_data(tmp_path):
    rows = load_dataset("demo/data", split="train").select(range(28))  # 21 to train on: two steps and five rows
    rows.to_parquet(tmp_path / "rows.parquet")
    options = (*OPTIONS[:-1], "--dataset_name", tmp_path / "rows.parquet", "--num_train_epochs", 2)
    options += ("--save_strategy", "no", "--output_dir")
    ended = run(*options, tmp_path / "whole")
    assert ended.returncode == 0, ended.stderr[-3000:]
    parts = ("--per_device_train_batch_size", 2, "--gradient_checkpointing", "true")
    accelerate = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes")
    ended = launch(*options, tmp_path / "parts", *parts, launcher=accelerate)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "(2 x 2 per device, activations recomputed)" in ended.stdout
    assert len(steps(tmp_path / "whole")) == 6
    assert steps(tmp_path / "parts") == pytest.approx(steps(tmp_path / "whole"), rel=1e-4)


def test_a_killed_run_goes_on_with_another_number_of_processes(one, two, tmp_path):
    whole = load_file(one / "checkpoint-6" / "adapter_model.safetensors")
    options = (*OPTIONS, tmp_path, "--resume_from_checkpoint")
    for going_on, checkpoint in ((run, two[0] / "checkpoint-3"), (launch, one / "checkpoint-3")):
        ended = going_on(*options, checkpoint)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert steps(tmp_path)[3:] == pytest.approx(steps(one)[3:], rel=1e-4)
        resumed = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
        assert all(resumed[name].allclose(tensor, atol=1e-3) for name, tensor in whole.items())


def test_two_processes_resumed_in_the_second_epoch_take_its_rows(tmp_path):
    load_dataset("demo/data", split="train").select(range(28)).to_parquet(tmp_path / "rows.parquet")
    options = (*OPTIONS[:-1], "--dataset_name", tmp_path / "rows.parquet", "--num_train_epochs", 2, "--save_steps", 2)
    ended = launch(*options, "--output_dir", tmp_path / "whole", "--save_total_limit", 9)
    assert ended.returncode == 0, ended.stderr[-3000:]
    checkpoint = tmp_path / "whole" / "checkpoint-4"  # of three steps an epoch
    ended = launch(*options, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", checkpoint)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(steps(tmp_path / "whole")) == 6 and steps(tmp_path / "resumed") == steps(tmp_path / "whole")
    # As one process for a step, and as two again.
    one = (*options, "--output_dir", tmp_path / "one", "--save_steps", 1)
    ended = run(*one, "--resume_from_checkpoint", checkpoint)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert steps(tmp_path / "one") == pytest.approx(steps(tmp_path / "whole"), rel=1e-4)
    assert metrics(tmp_path / "one")["run"]["resumed"][0]["changed"]["processes"] == [2, 1]
    ended = launch(
        *options, "--output_dir", tmp_path / "back", "--resume_from_checkpoint", tmp_path / "one/checkpoint-5"
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert steps(tmp_path / "back") == pytest.approx(steps(tmp_path / "whole"), rel=1e-4)
    assert [part["step"] for part in metrics(tmp_path / "back")["run"]["resumed"]] == [4, 5]


def test_a_failure_in_one_ends_all(tmp_path):
    change = "if len(taken) == 3: raise ValueError('the third step fails')"
    ended = launch_uneven(tmp_path, change, *OPTIONS, tmp_path / "outputs")
    assert ended.returncode != 0
    assert ended.stderr.count("ValueError: the third step fails") == 1
    assert not (tmp_path / "outputs" / "metrics.json").exists()


def test_what_can_not_be_is_said_once(tmp_path):
    ended = launch(*OPTIONS, tmp_path, "--batch_size", 7)
    assert ended.returncode != 0
    assert ended.stderr.count("--batch_size 7 can't be split evenly over 2 processes") == 1
    ended = launch(*OPTIONS, tmp_path, "--dataset_train_split", "none")
    assert ended.returncode != 0
    assert ended.stderr.count("has no split 'none'") == 1


def test_memory_that_gives_out_in_one_process_has_all_take_the_next_split(one, tmp_path):
    change = "if len(input_ids) > 1: raise torch.OutOfMemoryError('CUDA out of memory.')"
    ended = launch_uneven(tmp_path, change, *OPTIONS, tmp_path / "outputs")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert re.findall(r"\((\d x \d) per device, activations (\w+)\)", ended.stdout) == [
        ("4 x 1", "kept"), ("2 x 2", "kept"), ("4 x 1", "recomputed"), ("2 x 2", "recomputed"), ("1 x 4", "recomputed")
    ]  # fmt: skip
    assert steps(tmp_path / "outputs") == pytest.approx(steps(one), rel=1e-4)


def test_memory_that_gives_out_later_ends_all_with_a_sentence(tmp_path):
    change = "if len(taken) == 6: raise torch.OutOfMemoryError('CUDA out of memory.')"
    ended = launch_uneven(tmp_path, change, *OPTIONS, tmp_path / "outputs")
    assert ended.returncode != 0
    assert ended.stderr.count("There is not enough GPU memory for a training step") == 1
    assert (tmp_path / "outputs" / "checkpoint-3").exists()


@pytest.fixture
def two_machines():
    """Two network namespaces with an address each: the commands to start something in them, or a skip."""
    first, second = names = [f"latex{number}-{os.getpid()}" for number in (1, 2)]
    cable = [f"cable{number}" for number in (1, 2)]
    steps = [f"netns add {first}", f"netns add {second}"]
    steps += [f"link add {cable[0]} netns {first} type veth peer name {cable[1]} netns {second}"]
    for number, (name, end) in enumerate(zip(names, cable, strict=True), 1):
        steps += [f"-n {name} addr add 10.77.0.{number}/24 dev {end}"]
        steps += [f"-n {name} link set {device} up" for device in (end, "lo")]
    try:
        for step in steps:
            made = subprocess.run(["ip", *step.split()], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespaces here: ip {step}: {made.stderr.strip()}")
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}"]
            for name, end in zip(names, cable, strict=True)
        ]
    except FileNotFoundError:
        pytest.skip("no network namespaces here: there is no program ip (Debian: apt install iproute2)")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_machines_learn_what_one_does(one, two_machines, tmp_path):
    started = []
    for rank, machine in enumerate(two_machines):
        accelerate = f"-m accelerate.commands.launch --num_machines 2 --num_processes 2 --machine_rank {rank}"
        accelerate += " --multi_gpu --main_process_ip 10.77.0.1 --main_process_port 29500"
        command = [*machine, sys.executable, *accelerate.split(), SCRIPT.name, *OPTIONS, tmp_path / str(rank)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*map(str, command)], cwd=ROOT, **pipes))
    (said, complained), (quiet, _) = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], complained[-3000:]
    assert "(4 x 1 per device, activations kept)" in said and "Training" not in quiet
    assert steps(tmp_path / "0") == pytest.approx(steps(one), rel=1e-4)
    assert metrics(tmp_path / "0")["after"] == metrics(one)["after"]
    assert not (tmp_path / "1" / "metrics.json").exists() and not (tmp_path / "1" / "adapter").exists()


# Accelerate shards models on accelerators only: this has it take the CPU for one.
SHARD_ON_CPU = """
import os, runpy, sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
begin = PartialState.__init__

def pretend(self, *arguments, **options):
    begin(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = pretend
sys.argv[0] = {script}
sys.path[0] = os.path.dirname(sys.argv[0])  # where the kit lies
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_model_in_parts_learns_the_same(one, tmp_path):
    (tmp_path / "shard.py").write_text(SHARD_ON_CPU.format(script=repr(str(SCRIPT))))
    accelerate = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "qwen_vl_kit/fsdp.yaml")
    launcher, script = (*accelerate, "--num_processes"), str(tmp_path / "shard.py")
    ended = launch(*OPTIONS, tmp_path, launcher=launcher, script=script)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert steps(tmp_path) == pytest.approx(steps(one), rel=1e-4)
    for when in ("before", "after"):
        assert all(metrics(tmp_path)[when][name] == metrics(one)[when][name] for name in ("cer", "exact_match", "cut"))
    whole, parts = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, tmp_path))
    assert set(whole) == set(parts)
    assert all(parts[name].allclose(tensor, atol=1e-3) for name, tensor in whole.items())
    # Killed, it goes on, here with activations recomputed.
    shutil.rmtree(tmp_path / "checkpoint-6")
    recomputed = ("--resume_from_checkpoint", "true", "--gradient_checkpointing", "true")
    ended = launch(*OPTIONS, tmp_path, *recomputed, launcher=launcher, script=script)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(steps(tmp_path)) == 6 and steps(tmp_path) == pytest.approx(steps(one), rel=1e-4)


def test_the_benchmark_of_it_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/distributed.py", "--steps", "3", "--output", tmp_path]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = json.loads((tmp_path / "distributed.json").read_text())
    alike = [results[which]["the same samples a step"]["losses"] for which in ("one", "all")]
    assert len(alike[0]) == 3 and alike[1] == pytest.approx(alike[0], rel=1e-4)
    assert results["all"]["reading"]["rows"] == 64
    assert (tmp_path / "distributed.md").read_text() in ended.stdout
