"""The hub slow, busy, cut off half-way, or closed; and not asked at all for what is cached."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run
from shaky_hub import ShakyHub


@pytest.fixture(scope="module")
def hub(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny[1], root / "models" / "somebody" / "model")
    shutil.copytree(ROOT / "demo/data", root / "datasets" / "somebody" / "rows")
    hub = ShakyHub(root)
    yield hub
    hub.server.shutdown()


def run_from(hub, tiny, home, folder, fault):
    """A short run that loads model and data from `hub` into the cache in `home`."""
    hub.asked.clear()
    hub.fault = fault
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN_PATH": "none"}
    environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return run(
            *tiny, "--model_name_or_path", "somebody/model", "--dataset_name", "somebody/rows", "--max_steps", 2,
            "--output_dir", folder,
        )  # fmt: skip


@pytest.fixture(scope="module")
def home(hub, tiny, tmp_path_factory):
    """A cache, filled by a hub that did all that hubs do: each download was cut off or hung, and it was busy."""
    home = tmp_path_factory.mktemp("home")

    def fault(path, times):
        if times == 1 and path.endswith((".safetensors", "train-00000-of-00001.parquet")):
            return "cut"
        if times == 1 and path.endswith("tokenizer.json"):
            return "hang"
        if times == 1 and path == "/api/datasets/somebody/rows":
            return 429
        return None

    ended = run_from(hub, tiny, home, home / "out", fault)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "429 Too Many Requests" in ended.stdout and "Trying again in 5 s" in ended.stdout
    assert not [path for path in hub.asked if "telemetry" in path]
    return home


def test_with_everything_cached_no_network_is_touched(hub, tiny, home, tmp_path):
    ended = run_from(hub, tiny, home, tmp_path, lambda *_: "hang")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not hub.asked
    assert "Warning" not in ended.stderr


def test_what_the_cache_lacks_is_asked_for(hub, tiny, home, tmp_path):
    shutil.copytree(home / "hub", tmp_path / "hub", symlinks=True)
    weights = next((tmp_path / "hub").glob("models--*/snapshots/*/model.safetensors"))
    Path(os.path.realpath(weights)).unlink()
    ended = run_from(hub, tiny, tmp_path, tmp_path / "out", lambda *_: None)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert [path for path in hub.asked if path.startswith("GET") and "model.safetensors" in path]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda path, _: 401 if "model" in path else None, "gated"),
        (lambda path, _: 401 if "datasets" in path else None, "gated"),
        (lambda path, _: "cut" if path.endswith(".safetensors") else None, "closed connection"),
        (lambda path, _: 404, "not a valid model identifier"),
    ],
)
def test_what_the_hub_will_not_give_ends_in_one_sentence(fault, reason, hub, tiny, tmp_path):
    ended = run_from(hub, tiny, tmp_path, tmp_path / "out", fault)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("Could not load the ") and reason in last and "hf auth login" in last and len(last) < 600
