"""Judges what a run of finetune_qwen_vl.py read, and shows it.

    python report.py outputs

The script calls this at its end, where this file lies beside it. From `metrics.json`, `predictions.jsonl` and
`held_out/` in the output folder it makes

- `report.html`, one page to open from disk, without a network and without scripts;
- more scores in `metrics.json` and `predictions.jsonl`: BLEU, formula match, is it LaTeX, and how sure each change is;
- the adapter's model card, `adapter/README.md`, with the scores as the hub wants them.
"""

import base64
import html
import io
import json
import re
import sys
from datetime import datetime
from itertools import accumulate, chain
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment
from latex2mathml.converter import convert_to_element
from PIL import Image
from rapidfuzz.distance import Levenshtein
from sacrebleu.metrics import BLEU

# Name, what it is, whether less is better, how to print it.
SCORES = {
    "cer": ("CER", "character error rate: changes needed, over the length of the truth", True, ".3f"),
    "bleu": ("BLEU-4", "LaTeX tokens in common with the truth, in runs of up to four", False, ".3f"),
    "exact_match": ("exact match", "the same characters, spaces aside", False, ".1%"),
    "formula_match": ("formula match", "the same formula, however it is spelled", False, ".1%"),
    "is_latex": ("is LaTeX", "can be typeset at all", False, ".1%"),
    "cut": ("cut off", "still going on at the length limit", True, ".1%"),
}

# What became of a row, by whether the formula was right before and whether it is after.
KINDS = {
    (False, True): "fixed",
    (False, False): "still wrong",
    (True, False): "broken by training",
    (True, True): "kept right",
}

# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------

corpus_bleu = BLEU(tokenize="none", force=True, effective_order=True)
LATEX_TOKEN = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+\*?|\\.|\S")


def mathml(latex):
    """The MathML of a formula as a string that is the same for all its spellings. None if `latex` is not LaTeX.

    That is: spaces, braces and the order of sub- and superscript don't count. What can't be LaTeX: braces that don't
    match, commands without their arguments. A command that the converter does not know stands for itself.
    """
    tokens = LATEX_TOKEN.findall(latex)
    depth = [*accumulate((token == "{") - (token == "}") for token in tokens)]
    if not tokens or min(depth) < 0 or depth[-1] != 0:
        return None
    try:
        formula = convert_to_element(" ".join(tokens))
        # From the inside out, every <mrow> that holds one thing, or stands in another row, gives way to what it holds.
        for node in reversed([*formula.iter()]):
            in_row = node.tag in ("math", "mrow", "mstyle", "msqrt", "mtd")
            parts = ([*child] if child.tag == "mrow" and (in_row or len(child) == 1) else [child] for child in node)
            node[:] = chain.from_iterable([*parts])
        return ElementTree.tostring(formula, encoding="unicode")
    except Exception:  # the converter raises its own kinds, IndexError, RecursionError, ...
        return None


def judge(truth, text):
    """The scores of one reading as a dictionary, and the counts that the scores of many are made of (see `rates`)."""
    wanted, read = ("".join(latex.split()) for latex in (truth, text))
    wanted_tokens, tokens = (" ".join(LATEX_TOKEN.findall(latex)) for latex in (truth, text))
    errors = Levenshtein.distance(wanted, read)
    bleu = corpus_bleu.sentence_score(tokens, [wanted_tokens])
    formula = mathml(text)
    scores = {
        "cer": errors / len(wanted),
        "bleu": bleu.score / 100,
        "exact_match": wanted == read,
        "formula_match": wanted == read or (formula is not None and formula == mathml(truth)),
        "is_latex": formula is not None,
    }
    return scores, [errors, len(wanted), bleu.sys_len, bleu.ref_len, *bleu.counts, *bleu.totals]


def rates(sums, rows):
    """The scores of many readings, from their number and the sums of the counts of `judge` and of four flags."""
    errors, length, tokens, wanted_tokens, *rest = sums
    bleu = corpus_bleu.compute_bleu(rest[:4], rest[4:8], tokens, wanted_tokens, "exp", effective_order=True)
    shares = dict(zip(("exact_match", "formula_match", "is_latex", "cut"), rest[8:], strict=True))
    return {"cer": errors / length, "bleu": bleu.score / 100} | {name: count / rows for name, count in shares.items()}


def score(predictions, seed):
    """Adds to each prediction its scores. Returns those of all before and after, and their differences.

    A difference is {"value": float, "interval": [low, high]}: 95% of the differences are in it when the rows are drawn
    anew, with replacement, 1,000 times (a paired bootstrap).
    """
    rows, counts = len(predictions), {"before": [], "after": []}
    for prediction in predictions:
        for when, so_far in counts.items():
            reading = prediction[when]
            scores, parts = judge(prediction["truth"], reading["text"])
            reading |= scores
            so_far.append(parts + [reading[name] for name in ("exact_match", "formula_match", "is_latex", "cut")])
    before, after = (rates(np.sum(counts[when], axis=0).tolist(), rows) for when in counts)
    resamples = np.random.default_rng(seed).multinomial(rows, [1 / rows] * rows, size=1000)
    drawn = [[rates(sums, rows) for sums in (resamples @ counts[when]).tolist()] for when in counts]
    difference = {}
    for name in before:
        changes = [new[name] - old[name] for old, new in zip(*drawn, strict=True)]
        low, high = np.quantile(changes, [0.025, 0.975]).tolist()
        difference[name] = {"value": after[name] - before[name], "interval": [low, high]}
    return before, after, difference


def verdict(name, difference):
    """What the interval of a difference allows to say."""
    low, high = difference["interval"]
    if low <= 0 <= high:
        return "no clear change"
    return "better" if (high < 0) == SCORES[name][2] else "worse"


def as_text(name, value):
    """A score as people read it: 0.094 or 70.0%."""
    return format(value, SCORES[name][3])


def change_as_text(name, difference):
    """A difference with its interval as people read it: -0.655 (-0.751 to -0.568), +69.0 points (+60.0 to +78.0)."""
    percent = "%" in SCORES[name][3]
    numbers = (difference["value"], *difference["interval"])
    value, low, high = (f"{100 * number:+.1f}" if percent else f"{number:+.3f}" for number in numbers)
    return f"{value}{' points' * percent} ({low} to {high})"


# ---------------------------------------------------------------------------------------------------------------------
# What a reading looks like
# ---------------------------------------------------------------------------------------------------------------------

TAGS = re.compile(
    "math|menclose|mfrac|mi|mmultiscripts|mn|mo|mover|mpadded|mphantom|mprescripts|mroot|mrow|mspace|msqrt|mstyle|msub|"
    "msubsup|msup|mtable|mtd|mtext|mtr|munder|munderover|none"
)
ATTRIBUTES = re.compile(
    "accent|accentunder|columnalign|columnlines|columnspacing|depth|display|displaystyle|fence|form|frame|height|"
    "largeop|linethickness|lspace|mathcolor|mathvariant|maxsize|minsize|movablelimits|notation|rowlines|rowspacing|"
    "rspace|scriptlevel|separator|stretchy|symmetric|voffset|width|xmlns"
)


def drawing(latex):
    """The formula as MathML for a page, or None. Readings are data: nothing in them becomes markup, style or a link."""
    if mathml(latex) is None:
        return None
    formula = convert_to_element(latex)
    for node in formula.iter():
        node.tag = node.tag if TAGS.fullmatch(node.tag) else "mrow"
        node.text = html.unescape(node.text or "")  # the converter writes entities; tostring escapes what must be
        for name, value in [*node.attrib.items()]:
            if not (ATTRIBUTES.fullmatch(name) and re.fullmatch(r"[\w#%.:/+ -]{0,40}", value)):
                del node.attrib[name]
    formula.set("displaystyle", "true")
    return ElementTree.tostring(formula, encoding="unicode")


def marked(text, other):
    """`text` in pieces, (piece, whether it differs from `other`), spaces aside."""
    letters = [place for place, letter in enumerate(text) if not letter.isspace()]
    steps = Levenshtein.opcodes("".join(text.split()), "".join(other.split()))
    differs = dict.fromkeys(letters, False)
    for step in steps:
        if step.tag != "equal":
            differs |= dict.fromkeys(letters[step.src_start : step.src_end], True)
    pieces = []
    for place, letter in enumerate(text):
        mark = differs.get(place, bool(pieces) and pieces[-1][1] and differs.get(place + 1, False))
        if pieces and pieces[-1][1] == mark:
            pieces[-1][0] += letter
        else:
            pieces.append([letter, mark])
    return pieces


def picture(file):
    """The image in `file` for a page, as a data URI, no larger than a page needs."""
    with Image.open(file) as image:
        image.thumbnail((1200, 600))
        png = io.BytesIO()
        image.save(png, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def gallery(outputs, predictions, shown=240):
    """What the page shows of each row: the worst, the median and the best ones if there are more than `shown`."""
    ranking = sorted(range(len(predictions)), key=lambda i: (-predictions[i]["after"]["cer"], predictions[i]["row"]))
    middle = len(ranking) // 2
    if len(ranking) > shown:
        third = shown // 3
        ranking = ranking[:third] + ranking[middle - third // 2 :][:third] + ranking[-third:]
        middle = third + third // 2
    rows = []
    for rank, i in enumerate(ranking):
        prediction = predictions[i]
        truth, old, new = prediction["truth"], prediction["before"], prediction["after"]
        readings = [("truth", drawing(truth), [[truth, False]], None)]
        for when, reading in (("before", old), ("after", new)):
            readings.append((when, drawing(reading["text"]), marked(reading["text"], truth), reading))
        rows.append(
            {
                "row": prediction["row"],
                "kind": KINDS[old["formula_match"], new["formula_match"]],
                "place": {0: "worst", middle: "median", len(ranking) - 1: "best"}.get(rank, ""),
                "order": (rank, abs(rank - middle), len(ranking) - rank),
                "image": picture(outputs / prediction["image"]),
                "readings": readings,
            }
        )
    return rows


def curve(log):
    """The training log as a drawing of 480 x 200: losses, held-out losses and learning rates, and their ticks."""
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    speeds = [(entry["step"], entry["learning_rate"]) for entry in log if "learning_rate" in entry]
    last = max([step for step, _ in losses + held_out], default=1)
    most = max([loss for _, loss in losses + held_out if np.isfinite(loss)], default=1) or 1
    fastest = max([speed for _, speed in speeds], default=1) or 1

    def points(values, top):
        return [(round(480 * x / last, 1), round(200 - 200 * y / top, 1)) for x, y in values if np.isfinite(y)]

    def ticks(top):
        unit = 10 ** np.floor(np.log10(top / 2))
        step = next(unit * factor for factor in (1, 2, 5, 10) if top / (unit * factor) <= 5)
        return [(200 - 200 * i * step / top, f"{i * step:.3g}") for i in range(int(top / step) + 1)]

    return {
        "losses": points(losses, most),
        "held_out": points(held_out, most),
        "speeds": points(speeds, fastest),
        "loss_ticks": ticks(most),
        "speed_ticks": ticks(fastest),
        "last": last,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The page and the model card
# ---------------------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ model }}: what it reads now</title>
<style>
:root { color-scheme: light dark; --page: #fff; --text: #1c2024; --dim: #60646c; --line: #d9dce1; --panel: #f6f7f9;
  --old: #9aa1ab; --new: #0b68cb; --good: #157f3b; --bad: #b42318; --mark: #ffd9d3; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --text: #e8eaed; --dim: #a3a9b3; --line: #353a42;
  --panel: #1d2026; --old: #7b828d; --new: #62a8f5; --good: #5ac77f; --bad: #ff8f85; --mark: #6b2620; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; }
.dim, figcaption, summary small { color: var(--dim); font-size: .875rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.score { display: grid; grid-template-columns: 15rem 1fr 15rem; gap: .1rem 1rem; align-items: center;
  padding: .55rem 0; border-top: 1px solid var(--line); }
.bars { position: relative; display: grid; gap: 3px; }
.bar { height: .75rem; min-width: 2px; border-radius: 2px; background: var(--old); }
.bar.new { background: var(--new); }
.whisker { position: absolute; bottom: .3rem; height: .2rem; min-width: 2px; background: var(--text);
  outline: 1px solid var(--page); }
.numbers { font-variant-numeric: tabular-nums; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; max-width: 46rem; overflow: visible; font-size: 15px; }
svg text { fill: var(--dim); } svg .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.loss { stroke: var(--new); } .speed { stroke: var(--old); stroke-dasharray: 5 4; }
circle { fill: var(--bad); }
.key { display: inline-block; width: 1.6em; border-top: 2px solid var(--new); vertical-align: middle; }
.key.speed { border-top: 2px dashed var(--old); } .key.dot { width: .6em; height: .6em; border: 0; border-radius: 50%;
  background: var(--bad); }
.pick { position: absolute; opacity: 0; }
.pick + label { display: inline-block; margin: .15rem .1rem; padding: .2rem .75rem; border: 1px solid var(--line);
  border-radius: 1rem; cursor: pointer; }
.pick:checked + label { background: var(--new); border-color: var(--new); color: var(--page); }
.pick:focus-visible + label { outline: 2px solid var(--text); outline-offset: 2px; }
.pick:disabled + label { opacity: .45; cursor: default; }
.gallery { display: flex; flex-direction: column; gap: 1rem; margin-top: .8rem; }
article { order: var(--worst); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }
#best:checked ~ .gallery article { order: var(--best); }
#median:checked ~ .gallery article { order: var(--median); }
{%- for kind in kinds %}
#kind{{ loop.index }}:checked ~ .gallery article:not([data-kind="{{ kind }}"]) { display: none; }
{%- endfor %}
article header { display: flex; justify-content: space-between; padding: .35rem .8rem; background: var(--panel); }
article img { display: block; max-width: calc(100% - 1.6rem); max-height: 11rem; margin: .8rem; background: #fff; }
.reading { display: grid; grid-template-columns: 4.5rem minmax(0, 1fr) minmax(0, 1fr); gap: .2rem 1rem;
  align-items: center; padding: .5rem .8rem; border-top: 1px solid var(--line); }
code { font: .875rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
article code { max-height: 12rem; overflow: auto; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }
.formula { overflow: auto; max-height: 20rem; }
math { font-size: 1.15rem; }
td { padding: .1rem 1rem .1rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { overflow-wrap: normal; }
@media (max-width: 44rem) {
  .score, .reading { grid-template-columns: minmax(0, 1fr); }
}
</style>
</head>
<body>
<h1>{{ model }} <span class="dim">fine-tuned on {{ data }}</span></h1>
<p>{{ sentence }}</p>

<h2>Before and after, on {{ rows }} images that it did not train on</h2>
{% for name, (label, meaning, less, _) in scores.items() -%}
{% set change = difference[name] -%}
{% set top = [1, before[name], after[name]] | max -%}
<div class="score">
<div><b>{{ label }}</b><br><span class="dim">{{ meaning }}; {{ "less" if less else "more" }} is better</span></div>
<div class="bars">
<div class="bar" style="width: {{ 100 * before[name] / top }}%"></div>
<div class="bar new" style="width: {{ 100 * after[name] / top }}%"></div>
{% set low = [0, before[name] + change.interval[0]] | max -%}
{% set high = [top, before[name] + change.interval[1]] | min -%}
<div class="whisker" style="left: {{ 100 * low / top }}%; width: {{ 100 * (high - low) / top }}%"></div>
</div>
{% set said = verdict(name, change) -%}
<div class="numbers">{{ as_text(name, before[name]) }} → <b>{{ as_text(name, after[name]) }}</b><br>
<span class="{{ {"better": "good", "worse": "bad"}.get(said, "dim") }}">{{ said }}</span><br>
<span class="dim">{{ change_as_text(name, change) }}</span></div>
</div>
{% endfor -%}
<p class="dim">The upper bar is before training, the lower one after. In brackets, and as a line across the lower bar:
where the change lies with 95% certainty, as far as {{ rows }} images can tell.</p>

<h2>Training</h2>
<figure>
<svg viewBox="-44 -12 578 250" role="img" aria-label="loss and learning rate by step">
{% for y, text in curve.loss_ticks -%}
<line class="grid" x2="480" y1="{{ y }}" y2="{{ y }}"/><text x="-8" y="{{ y + 4 }}" text-anchor="end">{{ text }}</text>
{% endfor -%}
{% for y, text in curve.speed_ticks -%}
<text x="488" y="{{ y + 4 }}">{{ text }}</text>
{% endfor -%}
<text y="220">0</text><text x="480" y="220" text-anchor="end">{{ "{:,}".format(curve.last) }} steps</text>
<polyline class="speed" points="{% for x, y in curve.speeds %}{{ x }},{{ y }} {% endfor %}"/>
<polyline class="loss" points="{% for x, y in curve.losses %}{{ x }},{{ y }} {% endfor %}"/>
{% for x, y in curve.held_out %}<circle cx="{{ x }}" cy="{{ y }}" r="4"/>{% endfor %}
</svg>
<figcaption><span class="key"></span> loss, on the left{% if curve.held_out %} · <span class="key dot"></span> held-out
loss{% endif %} · <span class="key speed"></span> learning rate, on the right</figcaption>
</figure>

<h2>What it reads</h2>
{% if gallery | length < rows %}<p class="dim">{{ gallery | length }} of {{ rows }} images: the worst, the median and
the best ones.</p>{% endif %}
<input class="pick" type="radio" name="kind" id="all" checked><label for="all">all {{ gallery | length }}</label>
{%- for kind, count in kinds.items() %}
<input class="pick" type="radio" name="kind" id="kind{{ loop.index }}"{{ "" if count else " disabled" }}>
<label for="kind{{ loop.index }}">{{ kind }} {{ count }}</label>
{%- endfor %}
<br>
<input class="pick" type="radio" name="order" id="worst" checked><label for="worst">worst first</label>
<input class="pick" type="radio" name="order" id="median"><label for="median">median first</label>
<input class="pick" type="radio" name="order" id="best"><label for="best">best first</label>
<div class="gallery">
{% for item in gallery -%}
<article data-kind="{{ item.kind }}" style="--worst: {{ item.order[0] }}; --median: {{ item.order[1] }}; --best:
  {{ item.order[2] }}">
<header><b>{{ item.kind }}</b><span class="dim">{{ item.place + ", " if item.place }}row {{ item.row }}</span></header>
<img alt="the image of row {{ item.row }}" src="{{ item.image }}">
{% for when, formula, pieces, reading in item.readings -%}
<div class="reading"><div class="dim">{{ when }}
{%- if reading %}<br>CER {{ "%.2f" | format(reading.cer) }}{{ ", cut" if reading.cut }}{% endif %}</div>
<code>{% for piece, differs in pieces %}{% if differs %}<mark>{{ piece }}</mark>{% else %}{{ piece }}{% endif %}
{%- endfor %}
{%- if reading and reading.formula_match and not reading.exact_match %} <span class="good">the same formula</span>
{%- endif %}</code>
<div class="formula">{% if formula %}{{ formula | safe }}{% else %}<span class="dim">not LaTeX</span>{% endif %}</div>
</div>
{% endfor -%}
</article>
{% endfor -%}
</div>

<h2>What was run</h2>
<table>
{% for name, value in run.items() %}<tr><td class="dim">{{ name }}</td><td>{{ value }}</td></tr>
{% endfor -%}
</table>
<details><summary>All settings <small>({{ settings | length }})</small></summary><table>
{% for name, value in settings.items() %}<tr><td><code>{{ name }}</code></td><td><code>{{ value }}</code></td></tr>
{% endfor -%}
</table></details>
</body>
</html>
"""

CARD = """---
{{ card_data }}
---

# {{ name }}

LoRA adapters that teach {{ model }} to write the LaTeX of the formula in an image, fine-tuned on {{ data }} by
`finetune_qwen_vl.py` (adapters in the vision and the language layers, loss on the answer alone).

On {{ rows }} images that it did not train on:

| | before | after | difference (95% interval) |
|---|---|---|---|
{% for score, (label, meaning, _, _) in scores.items() -%}
| {{ label }}: {{ meaning }} | {{ as_text(score, before[score]) }} | {{ as_text(score, after[score]) }} |
{{- " " + change_as_text(score, difference[score]) }} |
{% endfor %}
| recipe | |
|---|---|
{% for key, value in run.items() if key not in ("model", "data") -%}
| {{ key }} | {{ value }} |
{% endfor %}
To read an image, asked as in training and prepared by the processor that lies beside the adapters:

```python
from transformers import pipeline

name = "owner/name"  # of this repository, or its folder
reader = pipeline("image-text-to-text", name, processor=name, device_map="auto")
question = {"type": "text", "text": {{ instruction | tojson }}}
chat = [{"role": "user", "content": [question, {"type": "image", "path": "formula.png"}]}]
greedily = {"max_new_tokens": 512, "do_sample": False, "repetition_penalty": 1.0}
print(reader(chat, return_full_text=False, generate_kwargs=greedily)[0]["generated_text"])
```
"""


def shown_name(name):
    """A hub name as it is, of a path only its end: the folders of somebody's machine are nobody's business."""
    return Path(name).name if Path(name).is_absolute() or ".." in Path(name).parts else name


def make(outputs):
    """Writes the report, the scores and the model card of the run in the folder `outputs`; prints a summary.

    In a notebook the report is shown as well. Raises OSError if the run's files can't be read.
    """
    outputs = Path(outputs)
    metrics = json.loads((outputs / "metrics.json").read_text(encoding="utf-8"))
    lines = (outputs / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    predictions = [json.loads(line) for line in lines]
    settings, train = metrics["settings"], metrics["train"]
    before, after, difference = score(predictions, settings["seed"])
    metrics |= {"before": before, "after": after, "difference": difference}

    rows, samples = len(predictions), train["samples"]
    memory = {"peak GPU memory": f"{train['peak_memory_gb']:.1f} GB"} if "peak_memory_gb" in train else {}
    run = {
        "model": shown_name(settings["model_name_or_path"]),
        "data": shown_name(settings["dataset_name"]),
        "held out": f"{rows} rows of {metrics['test_split']}",
        "trained on": f"{samples:,} samples in {train['log'][-1]['step']:,} steps",
        "learning rate": f"{settings['learning_rate']:g}, {settings['lr_scheduler_type']}",
        "adapters": f"r {settings['lora_r']}, alpha {settings['lora_alpha']}, dropout {settings['lora_dropout']}",
        "seed": settings["seed"],
        "time": f"{train['train_runtime']:.0f} s, {train['train_samples_per_second']:.1f} samples/s",
        **memory,
        "hardware": metrics["hardware"],
        "versions": ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
        "date": f"{datetime.fromtimestamp((outputs / 'predictions.jsonl').stat().st_mtime):%Y-%m-%d %H:%M}",
    }
    shown = {"rows": rows, "scores": SCORES, "before": before, "after": after, "difference": difference, "run": run}
    shown |= {
        "as_text": as_text,
        "change_as_text": change_as_text,
        "verdict": verdict,
        "model": run["model"],
        "data": run["data"],
    }

    items = gallery(outputs, predictions)
    sentence = "On {} images that it never trained on, {:.1%} of the formulas are right, {:.1%} were before.".format(
        rows, after["formula_match"], before["formula_match"]
    )
    if metrics["rows_of_seen_formulas"]:
        sentence += f" {metrics['rows_of_seen_formulas']} of the images show formulas that training images show too."
    page = (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            **shown,
            sentence=sentence,
            settings=settings,
            gallery=items,
            kinds={kind: sum(item["kind"] == kind for item in items) for kind in KINDS.values()},
            curve=curve(train["log"]),
        )
    )

    hub = {"base_model": settings["model_name_or_path"], "datasets": settings["dataset_name"]}
    results = {"task_type": "image-to-text", "dataset_type": run["data"], "dataset_name": run["data"]}
    results["dataset_split"] = metrics["test_split"]
    card = ModelCardData(
        model_name=f"{run['model']} for LaTeX OCR",
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["lora", "latex-ocr", "trl", "sft"],
        eval_results=[EvalResult(**results, metric_type=name, metric_value=after[name]) for name in SCORES],
        **{key: name for key, name in hub.items() if name == shown_name(name) and not Path(name).exists()},
    )
    card = ModelCard.from_template(
        card, template_str=CARD, name=card.model_name, instruction=settings["instruction"], **shown
    )

    files = {
        "predictions.jsonl": "".join(json.dumps(prediction) + "\n" for prediction in predictions),
        "metrics.json": json.dumps(metrics, indent=2),
        "report.html": page,
        "adapter/README.md": str(card),
    }
    for name, text in files.items():
        part = outputs / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(outputs / name)

    print(f"\n{f'{rows} held-out images':<20}{'before':>9}{'after':>9}   change, with its 95% interval")
    for name, (label, *_) in SCORES.items():
        scores = f"{as_text(name, before[name]):>9}{as_text(name, after[name]):>9}"
        print(f"{label:<20}{scores}   {change_as_text(name, difference[name])}")
    print(f"To look at it: {outputs / 'report.html'}")
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from IPython.display import HTML, display

        display(HTML(f'<iframe srcdoc="{html.escape(page)}" style="width: 100%; height: 48rem; border: 0"></iframe>'))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python report.py FOLDER, the --output_dir of a run")
    try:
        make(sys.argv[1])
    except OSError as error:
        sys.exit(f"There is no finished run to report on in {sys.argv[1]}: {error}")
