"""What README.md and docs/ say has to be so, and what they promise to be short has to be short."""

import ast
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT, run

from qwen_vl_kit.__main__ import COMMANDS

README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{page.name}": page.read_text() for page in (ROOT / "docs").glob("*.md")}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def test_every_option_exists():
    """Those of the script and of the commands; lines of other programs, and what a launcher takes, are theirs."""
    helps = run("--help").stdout + run("--help_all").stdout
    for command in COMMANDS:
        asked = [sys.executable, "-m", "qwen_vl_kit", command, "--help"]
        helps += subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout
    known = {*re.findall(r"(?<![\w-])--[a-z][a-z_0-9]+", helps), "--config", "--num_processes"}
    others = ("pip install", "jupytext", "vllm")
    launched = re.sub(r"(accelerate launch|torchrun) [^`\n]*finetune_qwen_vl.py", "", "\n".join(PAGES.values()))
    own = [line for line in launched.splitlines() if not any(word in line for word in others)]
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9]+", "\n".join(own)))
    assert len(used) > 30
    assert not used - known


def anchors(page):
    """What a link to `page` can end in, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page), re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | {*re.findall(r'<a id="([^"]+)">', page)}


def test_every_link_leads_somewhere():
    links = [
        (name, *link.partition("#")[::2])
        for name, page in PAGES.items()
        for link in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', FENCE.sub("", page))
        for link in filter(None, link)
        if not link.startswith("https://")
    ]
    assert len(links) > 20
    for name, path, anchor in links:
        target = ((ROOT / name).parent / path if path else ROOT / name).resolve()
        assert target.exists() and target.is_relative_to(ROOT), f"{name}: {path}"
        assert not anchor or anchor in anchors(target.read_text()), f"{name}: {path}#{anchor}"


def test_every_sentence_that_troubleshooting_names_is_said():
    foreign = {"Weights only load failed", "hf cache rm"}
    tables = README.partition("## Troubleshooting")[2].partition("## ")[0] + PAGES["docs/troubleshooting.md"]
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    quoted = {words for row in rows for words in re.findall(r"`([A-Za-z,:]+(?: [A-Za-z,:]+){2,})`", row)} - foreign
    assert len(quoted) > 8
    said = "".join(file.read_text() for file in (SCRIPT, *(ROOT / "qwen_vl_kit").glob("*.py")))
    assert not {words for words in quoted if words not in said}


def test_requirements_are_what_the_install_cell_and_pip_install():
    cell = SCRIPT.read_text().split("# ## Settings")[0]
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    in_cell = dict(re.findall(r" ([\w-]+)==([\w.]+)", cell))
    needs, extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")
    in_project = dict(re.findall(r'"([\w-]+)==([\w.]+)"', needs))
    only_to_read = {"pypdfium2", "pyperclip", "openpyxl"}  # the last only for .xlsx
    from_colab = {"torch", "torchvision", "pillow", "xformers"}
    assert set(pinned) - set(in_cell) == from_colab | only_to_read, "Colab brings or fits those, or needs them not"
    assert set(pinned) - set(in_project) == {"torch", "torchvision", "xformers"}, "these fit one another"
    assert in_cell.items() <= pinned.items() and in_project.items() <= pinned.items()
    tested = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements-dev.txt").read_text(), re.M))
    assert dict(re.findall(r'"([\w-]+)==([\w.]+)"', extras)).items() <= tested.items()


def test_ci_runs_the_readme_s_test_line():
    line = next(line for line in README.splitlines() if "pytest" in line and "pip install" in line)
    assert line.strip() in (ROOT / ".ci" / "run").read_text()


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="xformers is not for this machine"
)
def test_xformers_loads_next_to_this_torch():
    said = subprocess.run([sys.executable, "-m", "xformers.info"], capture_output=True, text=True, check=True).stdout
    assert re.search(r"build\.info: +available", said)
    assert re.search(r"memory_efficient_attention\.cutlassF-pt: +available", said)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
    assert len(FENCE.sub("", README).split()) <= 1500


def test_the_script_is_short():
    source = SCRIPT.read_text()
    assert len(source.splitlines()) <= 400
    cells = re.split(r"^# %%.*\n", source, flags=re.MULTILINE)
    assert len(cells) > 10 and max(len(cell.strip().splitlines()) for cell in cells) <= 60
    conditionals = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If | ast.IfExp | ast.Try)]
    assert len(conditionals) <= 30
    assert len([line for line in source.splitlines() if "qwen_vl_kit" in line]) <= 3


# ---------------------------------------------------------------------------------------------------------------------
# The walk
# ---------------------------------------------------------------------------------------------------------------------

# What is not done here: it installs, needs a network or an account, waits for requests, or runs these tests.
ELSEWHERE = ("-m venv", "pip install", "hf auth", "--push_to_hub", "kit page", "-m pytest", "<your-repo-url>")
ON_A_GPU = ".venv/bin/python finetune_qwen_vl.py"  # nothing behind it: the 7B
# The demo is shorter here. After so many steps a merge can be told from the base model.
SHORTER = {"--config demo/config.yaml": "--config demo/config.yaml --max_steps 140 --num_test_rows 40"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a clone after the README's first `pip install`."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copy(SCRIPT, clone)
    for name in ("qwen_vl_kit", "demo", "requirements.txt"):
        (clone / name).symlink_to(ROOT / name)
    (clone / ".venv").symlink_to(Path(sys.executable).parents[1])
    return clone


def commands(block):
    """The commands of a block for the shell that can be run here."""
    for command in re.split(r" && |\n", block.strip()):
        if command != ON_A_GPU and not any(words in command for words in ELSEWHERE):
            for words, instead in SHORTER.items():
                command = command.replace(words, instead)
            yield command


def shape(line):
    """A line of output without what differs from run to run: numbers, and what is read."""
    return " ".join(re.sub(r"[-+]?\d[\d,.]*", "#", line.partition("model reads:")[1] or line).split())


@pytest.mark.slow
def test_whoever_pastes_the_readme_s_lines_gets_what_they_say(clone):
    done, said = [], ""
    for language, block in FENCE.findall(README):
        if language == "python":
            assert "In Python, saved as `read.py`, `.venv/bin/python read.py`:" in " ".join(README.split())
            (clone / "read.py").write_text(block)
            block, language = ".venv/bin/python read.py", "sh"
        if language == "sh":
            for command in commands(block):
                ended = subprocess.run(["bash", "-c", command], cwd=clone, capture_output=True, text=True, timeout=300)
                assert ended.returncode == 0, f"{command}\n{ended.stdout[-1000:]}\n{ended.stderr[-3000:]}"
                done, said = [*done, command], ended.stdout
                check_what_follows(command, said, clone)
        elif not language:  # what was printed
            lines = map(shape, said.splitlines())
            assert not [line for line in map(shape, block.splitlines()) if line not in lines], said
    assert [" ".join(command.split()[:4]) for command in done] == [
        ".venv/bin/python finetune_qwen_vl.py --config demo/config.yaml",
        ".venv/bin/jupytext --to ipynb finetune_qwen_vl.py",
        ".venv/bin/python -m qwen_vl_kit read",
        ".venv/bin/python -m qwen_vl_kit score",
        ".venv/bin/python read.py",
    ]


def check_what_follows(command, said, clone):
    """What the README's prose promises of a command."""
    demo = clone / "outputs/demo"
    if "demo/config.yaml" in command:
        assert "<article" in (demo / "report.html").read_text() and (demo / "adapter").is_dir()
    elif "jupytext" in command:
        assert len(json.loads((clone / "finetune_qwen_vl.ipynb").read_text())["cells"]) > 10
    elif "kit read" in command:
        read = dict(line.split("\t") for line in said.splitlines())
        assert {Path(file).name: text for file, text in read.items()} == readings(demo)
    elif "kit score" in command:
        files = demo.with_name("score") / "scores.json", demo / "metrics.json"
        scores, metrics = (json.loads(file.read_text()) for file in files)
        assert scores["before"] == metrics["before"] and scores["after"] == metrics["after"]
    elif "read.py" in command:
        first = json.loads((demo / "predictions.jsonl").read_text().splitlines()[0])
        assert said.splitlines()[-1] == first["after"]["text"]


def readings(demo):
    """What the run has read in its held-out images at its end."""
    rows = map(json.loads, (demo / "predictions.jsonl").read_text().splitlines())
    return {Path(row["image"]).name: row["after"]["text"] for row in rows}


def test_the_notebook_s_line_for_the_demo_is_there_to_be_changed():
    assert '`NOTEBOOK_OPTIONS = "--config demo/config.yaml"`' in README
    assert re.search(r'^NOTEBOOK_OPTIONS = ""', SCRIPT.read_text(), re.MULTILINE)
