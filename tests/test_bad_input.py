"""Bad input ends in one sentence that says what to do, with a non-zero exit, no traceback, and nothing overwritten."""

import json

import pyarrow.parquet
import pytest
from conftest import SHORT, run
from datasets import Dataset, Image, load_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with faulty data sets."""
    folder = tmp_path_factory.mktemp("data")
    rows = load_dataset("demo/data", split="train").select(range(10))
    rows.to_parquet(folder / "ten.parquet")
    rows.rename_columns({"image": "picture", "text": "latex"}).to_parquet(folder / "columns.parquet")
    pyarrow.parquet.write_table(rows.data.table.slice(0, 0), folder / "empty.parquet")
    broken = {"image": [{"bytes": b"no image", "path": None}] * 20, "text": ["x"] * 20}
    Dataset.from_dict(broken).cast_column("image", Image()).to_parquet(folder / "broken.parquet")
    (folder / "numbers.csv").write_text("image,text\n" + "1,x\n" * 20)
    (folder / "notes.txt").write_text("x")
    (folder / "half.yaml").write_text("max_steps: 2.5\n")
    (folder / "unknown.yaml").write_text("lora_rank: 8\n")
    (folder / "list.yaml").write_text("- 8\n")
    (folder / "model").mkdir()
    return folder


CASES = {
    "no GPU for the 7B recipe": ([], ["GPU", "--config demo/config.yaml"]),
    "an unknown option": (["--lora_rank", "8"], ["--lora_rank; did you mean --lora_r?", "--help"]),
    "an option that others call so": (["--epochs", "8"], ["--epochs; did you mean --num_train_epochs?"]),
    "an ill-typed option": (["--max_steps", "many"], ["--max_steps", "many"]),
    "an ill-typed line of a config file": (["--config", "DATA/half.yaml"], ["--max_steps", "2.5"]),
    "an unknown line of a config file": (["--config", "DATA/unknown.yaml"], ["lora_rank; did you mean --lora_r?"]),
    "a config file that is a list": (["--config", "DATA/list.yaml"], ["list.yaml"]),
    "a config file that is missing": (["--config", "DATA/none.yaml"], ["none.yaml"]),
    "no config file": (["--config"], ["--config"]),
    "a data set that is not there": ([*SHORT, "--dataset_name", "./none"], ["./none", "no such file or folder"]),
    "a data set that the hub can't give": ([*SHORT, "--dataset_name", "nobody/nothing"], ["nobody/nothing", "network"]),
    "a file of a wrong type": ([*SHORT, "--dataset_name", "DATA/notes.txt"], ["notes.txt", ".parquet"]),
    "a missing column": ([*SHORT, "--dataset_name", "DATA/columns.parquet"], ["--image_column", "picture"]),
    "a column of no images": ([*SHORT, "--dataset_name", "DATA/numbers.csv"], ["'image'", "--image_column"]),
    "a missing split": (
        [*SHORT, "--dataset_train_split", "training"],
        ["'training'", "--dataset_train_split", "train"],
    ),
    "an empty data set": ([*SHORT, "--dataset_name", "DATA/empty.parquet"], ["empty.parquet", "no rows"]),
    "no row that can be used": ([*SHORT, "--dataset_name", "DATA/broken.parquet"], ["not an image", "0 to hold out"]),
    "too few held-out rows": ([*SHORT, "--num_test_rows", "9999"], ["rows: 200 to hold out", "--num_test_rows"]),
    "too few rows to hold some out": (
        [*SHORT, "--dataset_name", "DATA/ten.parquet", "--num_test_rows", "10"],
        ["too few rows: 10 to hold out", "--num_test_rows"],
    ),
    "a model that is not there": ([*SHORT, "--model_name_or_path", "./none"], ["./none", "no such file or folder"]),
    "a model that the hub can't give": (
        [*SHORT, "--model_name_or_path", "nobody/nothing"],
        ["nobody/nothing", "network"],
    ),
    "a folder without a model": ([*SHORT, "--model_name_or_path", "DATA/model"], ["DATA/model", "config.json"]),
    "no steps": ([*SHORT, "--max_steps", "-1"], ["--max_steps", "--num_train_epochs"]),
    "a negative number of epochs": ([*SHORT, "--num_train_epochs", "-1"], ["--num_train_epochs"]),
    "an empty batch": ([*SHORT, "--batch_size", "0"], ["--batch_size", "at least 1"]),
    "no image to read at once": ([*SHORT, "--test_batch_size", "0"], ["--test_batch_size must be at least 1"]),
    "a batch that can't be split so": (
        [*SHORT, "--per_device_train_batch_size", "3"],
        ["--batch_size 8 can't be split", "--per_device_train_batch_size 3"],
    ),
    "no held-out rows": ([*SHORT, "--num_test_rows", "0"], ["--num_test_rows", "at least 1"]),
    "no checkpoint to resume from": ([*SHORT, "--resume_from_checkpoint", "DATA/checkpoint-5"], ["no checkpoint DATA"]),
    "an unknown option with a secret": (
        ["--token", "hf_secret"],
        ["option --token; did you mean --hub_token? (see --help"],
    ),
    "a folder that can't be made": ([*SHORT, "--output_dir", "DATA/notes.txt/out"], ["notes.txt", "--output_dir"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_sentence(case, data, tmp_path):
    arguments, expected = CASES[case]
    arguments = [argument.replace("DATA", str(data)) for argument in arguments]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "metrics.json").write_text(json.dumps("of an earlier run"))
    if arguments != ["--config"] and "--output_dir" not in arguments:
        arguments += ["--output_dir", str(tmp_path)]
    ended = run(*arguments)
    assert ended.returncode not in (0, None)
    assert "Traceback" not in ended.stderr, ended.stderr[-3000:]
    said = ended.stdout + ended.stderr.strip().splitlines()[-1]
    for words in expected:
        assert words.replace("DATA", str(data)) in said
    assert len(ended.stderr.strip().splitlines()[-1]) < 600
    assert json.loads((tmp_path / "metrics.json").read_text()) == "of an earlier run"
    assert not any((tmp_path / "adapter").iterdir())
