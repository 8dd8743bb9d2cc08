"""The report as people see it: in a real browser, from disk, without a network, with readings that mean harm."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image, ImageChops
from rapidfuzz.distance import Levenshtein

from qwen_vl_kit import curves, mistakes, report, report_page

browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(browser is None, reason="no Chromium here (Debian: apt-get install chromium)")

HARM = [
    "<script>window.harmed = 1</script>",
    r"\text{<script>window.harmed = 1</script>}",
    r"\text{<img src=x onerror='window.harmed = 1'>}",
    r"\href{javascript:window.harmed=1}{x}",
    r"\style{position:fixed;inset:0;background:red}{x}",
    r"\class{pick}{x}",
    "</code></div></article></body><h1>harm</h1>",
    '"><svg onload="window.harmed = 1">',
    "{{ 7 * 191 }} {% for x in y %}",
    r"\newcommand{\a}{\a\a}\a",
    r"\hspace{99999em} x \rule{9999em}{9999em}",
    "x" * 3000,
]
HIGH = r"f ^ { i } \sum _ { i _ { j _ { k } } } ^ { n ^ { m ^ { l } } } f f"  # drawn beyond its box, above and below
# Truth, before and after: one fixed, one broken, one right both times, two nearly right, and one still wrong for each
# attempt at harm.
ROWS = [
    (r"\hat { M } _ { x } ^ { n ^ { 2 } }", "x", r"\hat M_x^{n^2}"),
    ("a + b", "a + b", "a - b"),
    (r"\frac { 1 } { 2 }", r"\frac12", r"\frac { 1 } { 2 }"),
    (HIGH, "x", HIGH.replace("l", "k")),
    ("a + b + c + d", "x", r"a + b + c + \begin{<img src=x onerror='window.harmed = 1'>}"),
]
KINDS = {"fixed": [0], "broken by training": [1], "kept right": [2], "nearly right": [4, 3]}
ROWS += [(r"\sum _ { i } x _ { i }", text, text) for text in HARM]


def reading(truth, text):
    """A reading as the script writes it."""
    truth, read = ("".join(latex.split()) for latex in (truth, text))
    return {"text": text, "cut": False, "errors": Levenshtein.distance(truth, read), "length": len(truth)}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What a run leaves behind, and the report of it."""
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "adapter").mkdir()
    (folder / "held_out").mkdir()
    log = [{"step": i, "loss": 2 / i, "learning_rate": 1e-3 * (1 - i / 20)} for i in range(1, 21)]
    log += [{"step": 10, "eval_loss": 0.4}, {"step": 20, "eval_loss": 0.3}, {"step": 20, "train_runtime": 1.0}]
    settings = {"model_name_or_path": "/home/somebody/secret/model", "dataset_name": "unsloth/LaTeX_OCR", "seed": 1}
    settings |= {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "lora_r": 16, "lora_alpha": 16}
    settings |= {"lora_dropout": 0.0, "dataset_test_split": "test", "instruction": "Write <b>LaTeX</b>."}
    train = {"train_runtime": 12.5, "train_samples_per_second": 8.0, "samples": 100, "log": log, "peak_memory_gb": 9.3}
    metrics = {"train": train, "settings": settings, "hardware": "a GPU", "versions": {"torch": "2.10.0"}}
    metrics |= {"rows_of_seen_formulas": 5, "test_split": "train"}
    metrics |= {"run": {"resumed": []}, "changed": {"lora_r": [8, 16], "instruction": ["Read.", "Write <b>LaTeX</b>."]}}
    metrics |= {"command": "python finetune_qwen_vl.py --lora_r 16 --model_name_or_path /home/somebody/secret/model"}
    metrics |= {"local": {"model_name_or_path": settings["model_name_or_path"]}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    skipped = [{"row": row, "split": "train", "reason": "image of <i>one</i> color"} for row in range(12, 0, -1)]
    skipped.append({"row": 7, "split": "test", "reason": "no text"})
    (folder / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skipped))
    with open(folder / "predictions.jsonl", "w") as file:
        for row, (truth, before, after) in enumerate(ROWS):
            Image.new("RGB", (200 + 300 * row, 40), "white").save(folder / "held_out" / f"{row}.png")
            line = {"row": row, "image": f"held_out/{row}.png", "truth": truth}
            readings = (reading(truth, text) for text in (before, after))
            print(json.dumps(line | dict(zip(("before", "after"), readings, strict=True))), file=file)
    make(folder)
    return folder


def kit(*arguments, cwd=ROOT):
    """`python -m qwen_vl_kit *arguments`, from any folder: its `CompletedProcess`."""
    command = [sys.executable, "-m", "qwen_vl_kit", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def make(folder):
    ended = kit("report", folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_files(outputs):
    metrics = json.loads((outputs / "metrics.json").read_text())
    predictions = [json.loads(line) for line in (outputs / "predictions.jsonl").read_text().splitlines()]
    assert metrics["before"]["formula_match"] == metrics["after"]["formula_match"] == pytest.approx(2 / len(ROWS))
    low, high = metrics["difference"]["formula_match"]["interval"]
    assert low < 0 < high
    assert [prediction["after"]["formula_match"] for prediction in predictions[:3]] == [True, False, True]
    assert predictions[2]["before"]["formula_match"] and not predictions[2]["before"]["exact_match"]
    before = {name: (outputs / name).read_text() for name in ("metrics.json", "predictions.jsonl", "report.html")}
    long_ago = (outputs / "predictions.jsonl").stat().st_mtime - 1e6
    os.utime(outputs / "predictions.jsonl", (long_ago, long_ago))
    make(outputs)
    assert before == {name: (outputs / name).read_text() for name in before}, "a second report is another one"
    assert not list(outputs.rglob("*.part"))
    said = make(outputs)
    assert "\nformula match" in said
    few = f"Only {len(ROWS)} held-out images: too few to show more than large changes."
    assert few in said
    assert all(few in (outputs / name).read_text() for name in ("report.html", "adapter/README.md"))
    assert "5 of the images show formulas that also appear in training images" in (outputs / "report.html").read_text()


def test_model_card(outputs):
    from huggingface_hub import ModelCard

    text = (outputs / "adapter" / "README.md").read_text()
    data = ModelCard(text).data
    assert {result.dataset_split for result in data.eval_results} == {"train"}
    assert data.datasets == "unsloth/LaTeX_OCR" and data.library_name == "peft"
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == json.loads((outputs / "metrics.json").read_text())["after"]
    for name in ("report.html", "adapter/README.md"):  # what is folded up has all
        assert "somebody" not in (outputs / name).read_text().split("All settings")[0], (
            f"a path of the user's in {name}"
        )


def test_a_run_of_the_script_alone_has_a_report(outputs, tmp_path):
    """It measures less: no time, no memory, no hardware, no versions."""
    folder = shutil.copytree(outputs, tmp_path / "outputs")
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = {name: metrics[name] for name in ("settings", "test_split")}
    (folder / "metrics.json").write_text(json.dumps(kept | {"train": {"log": metrics["train"]["log"]}}))
    make(folder)
    assert json.loads((folder / "metrics.json").read_text())["after"] == metrics["after"]


def broken(folder, name, text):
    (folder / name).write_text(text)
    return folder


# What became of a run's folder, and the words that say so.
BROKEN = {
    "another folder": (lambda folder: ROOT / "tests", "no finished run in"),
    "no folder": (lambda folder: folder / "nowhere", "There is no folder"),
    "half a file": (lambda folder: broken(folder, "metrics.json", '{"train":'), "metrics.json is damaged"),
    "no text": (lambda folder: broken(folder, "predictions.jsonl", "[1]\n"), "predictions.jsonl is damaged"),
    "another's metrics": (lambda folder: broken(folder, "metrics.json", '{"loss": 1}'), "it lacks settings"),
    "older predictions": (lambda folder: broken(folder, "predictions.jsonl", '{"row": 1}\n'), "this version"),
    "an image gone": (lambda folder: (folder / "held_out/0.png").unlink() or folder, "held_out/0.png"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_run_is_said(case, outputs, tmp_path):
    change, words = BROKEN[case]
    ended = kit("report", change(shutil.copytree(outputs, tmp_path / "outputs")))
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
    assert words in ended.stderr


def test_commands(tmp_path):
    for arguments in ((), ("--help",), ("report", "--help"), ("export", "--help")):
        ended = kit(*arguments, cwd=tmp_path)
        assert ended.returncode == 0 and "usage: python -m qwen_vl_kit" in ended.stdout and not ended.stderr
    for command in ("report", "export"):
        assert f"\n  {command} " in kit().stdout
    for arguments in (("repot",), ("report",), ("export", "outputs"), ("export", "outputs", "--save_merged", "maybe")):
        ended = kit(*arguments, cwd=tmp_path)
        assert ended.returncode == 2 and "Traceback" not in ended.stderr and not ended.stdout, arguments


def test_help_imports_no_torch():
    code = (
        "import runpy, sys; sys.argv[1:] = ['export', '--help']; runpy.run_module('qwen_vl_kit', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "usage" in ended.stdout and "qwen_vl_kit.finished" in ended.stderr
    assert " torch\n" not in ended.stderr and " transformers\n" not in ended.stderr


SHOW = """
import sys, warnings
warnings.simplefilter("error")
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
shell = InteractiveShell.instance()
from qwen_vl_kit import report
with capture_output() as captured:
    report.make(sys.argv[1])
(shown,) = captured.outputs
print(shown.data["text/html"])
"""


@needs_browser
def test_a_notebook_shows_the_page_without_a_warning(outputs, tmp_path):
    ended = subprocess.run([sys.executable, "-c", SHOW, outputs], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr[-3000:]
    frame = ended.stdout[ended.stdout.index("<iframe srcdoc=") :]
    (tmp_path / "cell.html").write_text(f"<!doctype html><meta charset='utf-8'><h1>A notebook</h1>{frame}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto((tmp_path / "cell.html").as_uri())
        inside = page.frame_locator("iframe")
        inside.locator("table a", has_text="row 3").first.click()
        assert inside.locator("article:target").get_attribute("id") == "row3"
        chromium.close()


@pytest.fixture
def page(outputs, request, tmp_path):
    """The report in Chromium, at a width and in a colour scheme."""
    from playwright.sync_api import sync_playwright

    width, scheme = request.param
    said = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        page = context.new_page()
        page.on("request", lambda request: said.append(f"request: {request.url[:60]}"))
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("dialog", lambda dialog: said.append("dialog"))
        page.goto((outputs / "report.html").as_uri())
        page.screenshot(path=tmp_path / f"report-{width}.png", full_page=True)
        yield page
        asked = [line for line in said if not line.startswith(("request: file:", "request: data:"))]
        assert not asked, asked
        chromium.close()


def visible(page):
    return [int(text.split()[-1]) for text in page.locator("article:visible header .dim").all_inner_texts()]


@needs_browser
@pytest.mark.parametrize("page", [(1280, "light"), (390, "dark")], indirect=True)
def test_in_a_browser(page):
    assert page.evaluate("window.harmed") is None
    assert page.locator("h1").count() == 1 and page.locator("script, iframe, object, link, base").count() == 0
    assert page.locator("a").count() == page.locator("a[href^='#row']").count() > 0
    assert page.locator("article [style], article [class=pick], math [href]").count() == 0
    assert page.locator("text=1337").count() == 0
    assert page.locator(".symbols tr", has_text="onerror").count() == 1, "a token that means harm is shown as it is"
    # Everything is laid out, nothing is wider than the page.
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    boxes = "[...document.querySelectorAll('math')].map(math => math.getBoundingClientRect())"
    sizes = page.evaluate(f"{boxes}.map(box => [box.width, box.height])")
    assert len(sizes) > 2 * len(ROWS) and all(width > 3 and height > 3 for width, height in sizes)
    inside = "a => a.scrollWidth <= a.clientWidth + 1"
    assert page.evaluate(f"[...document.querySelectorAll('article')].every({inside})")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    for plot in page.locator(".plot svg").all():
        assert plot.bounding_box()["width"] > 0.8 * page.locator("h1").bounding_box()["width"], "the whole width"
    marks = page.locator("article", has_text="row 1").first.locator("mark").all_inner_texts()
    assert marks
    # The filter.
    assert len(visible(page)) == len(ROWS)
    for label, rows in KINDS.items():
        page.get_by_text(label, exact=False).locator("visible=true").first.click()
        assert visible(page) == rows, label
    page.get_by_text("still wrong 12", exact=True).click()
    assert len(visible(page)) == len(HARM)
    page.locator("table a", has_text="row 3").first.click()
    assert 3 in visible(page), "an example that the filter hides is shown all the same"
    page.locator("label[for=all]").click()

    def top():
        order = "(a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top"
        return page.evaluate(f"[...document.querySelectorAll('article')].sort({order})[0].innerText")

    assert "worst" in top()
    page.locator("label[for=best]").click()
    assert "best" in top()
    page.locator("label[for=median]").click()
    assert "median" in top()
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    assert colours[0] != colours[1]


@needs_browser
@pytest.mark.parametrize("page", [(1280, "light"), (390, "light")], indirect=True)
def test_nothing_of_a_formula_is_cut_off(page):
    """Chromium draws high superscripts above the formula's box, where no scrolling gets to them."""

    def drawn(formula):
        box = formula.bounding_box()
        clip = {"x": box["x"], "y": box["y"] - 30, "width": box["width"], "height": box["height"] + 60}
        return Image.open(io.BytesIO(page.screenshot(clip=clip, full_page=True))).convert("L")

    page.add_style_tag(
        content="article, article * { background: none !important; border-color: transparent !important }"
    )
    formulas = page.locator("#row0 .formula, #row3 .formula").all()
    clipped = [drawn(formula) for formula in formulas]
    page.add_style_tag(content=".formula, article { overflow: visible !important }")
    whole = [drawn(formula) for formula in formulas]
    assert len(whole) == 6 and all(picture.getextrema()[0] < 100 for picture in whole)
    assert not [
        place for place, pair in enumerate(zip(clipped, whole, strict=True)) if ImageChops.difference(*pair).getbbox()
    ]


def test_the_page_says_how_the_run_was_made(outputs):
    text = (outputs / "report.html").read_text()
    shown, folded = text.split("All settings")
    assert "row 1, 2, 3" not in shown and "image of &lt;i&gt;one&lt;/i&gt; color" in shown
    assert "(rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...)" in shown and "(row 7)" in shown
    assert "in place of 8" in shown and '<td class="dim">resumed</td><td>no</td>' in shown
    assert "python finetune_qwen_vl.py --lora_r 16" in folded and "lowest validation loss 0.3, at step 20" in shown


def test_mistakes():
    def row(number, truth, text, match=False):
        return {
            "row": number,
            "truth": truth,
            "after": {"text": text, "formula_match": match, "errors": 1, "length": 10},
        }

    rows = [
        row(1, r"\alpha + b + c", r"a + b + c"),
        row(2, r"\alpha b c d", r"a b c d"),
        row(3, r"\frac { a } { b } + c", r"\frac { a } { b } + c +"),
        row(4, r"x ^ { y _ { i } } = 1", r"q q q q q q q q q q q q q"),
        row(5, r"x y", r"x  y", match=True),
        row(6, r"\begin{array} { c } a \end{array}", r"\begin{array} { c } a"),
        row(7, r"\sqrt { a b c d e }", r"\sqrt { a } b c d e"),
    ]
    found = mistakes.summary(rows, {"after": "a model"})
    assert found["counts"] == {"a model": {"rows": 7, "wrong": 6, "near": 4}}
    first, *others = [
        (symbol["truth"], symbol["read"], symbol["counts"], symbol["rows"]) for symbol in found["symbols"]
    ]
    assert first == (r"\alpha", "a", [2], [1, 2])
    assert sorted(others, key=str) == [(r"\end{array}", None, [1], [6]), (None, "+", [1], [3])]
    structures = {line["label"]: line["rows"] for line in found["structures"]}
    assert structures == {
        "fractions": 1, "roots": 1, "scripts": 1, "scripts of scripts": 1, "arrays": 1, "none of these": 3
    }  # fmt: skip
    assert sum(line["rows"] for line in found["lengths"]) == len(rows)
    assert found["lengths"][0]["label"].startswith("2") and found["lengths"][-1]["label"].endswith("11")


def test_examples_are_on_the_page_however_many_rows_there_are(outputs, monkeypatch):
    monkeypatch.setattr(report_page, "SHOWN", 6)
    metrics, predictions, run = report.of_run(outputs)
    page = report.page_of_run(outputs, metrics, predictions, run)
    assert page.count("<article ") == 7 and f"7 of {len(ROWS)} images" in page
    assert 'href="#row3"' in page and 'id="row3"' in page and "row 3</span>" in page


def test_curves():
    log = [{"step": step, "loss": 1 + (-1) ** step, "learning_rate": 1e-3} for step in range(1, 441)]
    log += [{"step": 100, "loss": float("nan")}, {"step": 220, "eval_loss": 0.5}, {"step": 440, "eval_loss": 4.0}]
    drawn = curves.curves({"": log})
    lines = {line["what"]: line["points"] for line in drawn["losses"] + drawn["rates"]}
    assert [len(points) for points in lines.values()] == [440, 440, 2, 440]
    assert {y for _, y in lines["loss"]} == {50, 100}
    assert all(abs(y - 75) < 1 for _, y in lines["smooth"][20:-20]), "the noise is gone"
    assert lines["validation"] == [[500, 87.5], [1000, 0]]
    assert "lowest validation loss 0.5, at step 220" in drawn["runs"][0]["said"] and drawn["step_ticks"][-1][1] == "400"
    assert curves.smoothed(curves.np.arange(1000.0))[500] == pytest.approx(500), "it does not lag behind"
    for few in ([], [{"step": 1, "loss": 0.5}], [{"step": 1, "loss": float("inf"), "learning_rate": 0.0}]):
        assert curves.curves({"": few})["step_ticks"]


def changed(folder, rows, after):
    """The run in a folder as another one: of these rows, renumbered, with another reading of the first."""
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    lines = [lines[row] | {"row": 100 + row} for row in rows]
    lines[0]["after"] = reading(lines[0]["truth"], after)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["settings"]["learning_rate"] = 5e-4
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_two_runs_compared(outputs, tmp_path):
    one, other = (shutil.copytree(outputs, tmp_path / name) for name in ("one", "other"))
    before = {file: file.read_bytes() for file in [*one.rglob("*.*"), *other.rglob("metrics.json")]}
    changed(other, range(1, len(ROWS)), "a + b")
    ended = kit("report", "one", "other", cwd=tmp_path)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr[-3000:]
    title, *lines = ended.stdout.strip().splitlines()
    assert title.split()[-6:-4] == ["one", "other"] and f"{len(ROWS) - 1} held-out images" in title
    (match,) = (line.split() for line in lines if line.startswith("formula match"))
    assert match[2:4] == ["6.2%", "12.5%"] and lines[-1] == "Comparison: other/report_against_one.html"
    assert {file: file.read_bytes() for file in before if file.parent != other} == {
        file: content for file, content in before.items() if file.parent != other
    }
    page = (other / "report_against_one.html").read_text()
    assert "one held out 1 others, other held out 0 others" in page and "before training" not in page
    assert (
        "only other 1<" in page
        and "only one 0<" in page
        and f"both wrong {len(HARM) + 2}<" in page
        and "both right 1<" in page
    )
    assert "<td><code>0.001</code></td><td><code>0.0005</code></td>" in page


def test_what_can_not_be_compared(outputs, tmp_path):
    one, other = (shutil.copytree(outputs, tmp_path / name) for name in ("one", "other"))
    changed(other, [0], "x")
    Image.new("RGB", (200, 40), "black").save(other / "held_out/0.png")
    for second, words in (
        (other, "held out no row in common"),
        (one, "are the same run"),
        (tmp_path / "no", "no folder"),
    ):
        ended = kit("report", one, second)
        assert ended.returncode == 1 and words in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
    assert not [*tmp_path.rglob("report_against*")]
