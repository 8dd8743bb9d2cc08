"""Fills the template of the page: scores, the readings of each row beside its image, what was run.

It wraps no step. A page shows the readings of one model, {"after": its name}, or of two, {"before": a name, "after": a
name}: a base model and what a run made of it, or any two models on the same rows.
"""

import base64
import html
import io
import re
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

from jinja2 import Environment
from latex2mathml.converter import convert_to_element
from PIL import Image
from rapidfuzz.distance import Levenshtein

from qwen_vl_kit import mistakes
from qwen_vl_kit.latex import looks, tokens
from qwen_vl_kit.scores import SCORES, as_text, change_as_text, held_out, verdict, warning

SHOWN = 240  # rows on the page: with more, it takes a browser seconds to open
NEAR, NEARLY_RIGHT = "near", "nearly right"  # one token off: among the wrong ones a kind of its own
TRAINED = {"before": "before", "after": "after"}  # what a run names its readings


def template(name):
    """The text of a file in `templates/`, also where the package is in an archive."""
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def make_page(outputs, predictions, names, scores, run, **of_a_run):
    """The page, as text, of `predictions`, whose images lie in the folder `outputs`.

    `names` are those of the readings, {"after": str} or {"before": str, "after": str}; `scores` are what
    `scores.score_one` or `scores.score` returned of these predictions; `run` is a table, {what: value}. What only the
    report of a run shows is `of_a_run`: its title, a sentence, curve, settings and so on, see the template.
    """
    *scores, spread = scores
    wrong = what_goes_wrong(predictions, names)
    items = gallery(outputs, predictions, names, {symbol["rows"][0] for symbol in wrong["symbols"]})
    filled = {"names": names, "spread": spread, "run": run, "rows": len(predictions), "gallery": items}
    filled |= dict(zip(names, scores, strict=True)) | {"title": " and ".join(names.values())}
    filled |= {"mistakes": wrong, "on_page": {item["row"] for item in items}}
    filled["kinds"] = {kind: sum(item["kind"] == kind for item in items) for kind in kinds_of(names).values()}
    page = Environment(autoescape=True).from_string(template("report.html.j2"))
    return page.render(helpers(len(predictions)) | filled | of_a_run)


def helpers(rows):
    """What templates need to show scores of so many rows."""
    words = {"as_text": as_text, "change_as_text": change_as_text, "between": between, "verdict": verdict}
    words["sentence_of"] = sentence_of
    return words | {"scores": SCORES, "held_out": held_out(rows), "warning": warning(rows)}


def between(name, interval):
    """The interval of a score as people read it: 0.081 to 0.112."""
    return " to ".join(as_text(name, end) for end in interval)


def sentence_of(whose, count):
    """How many readings are wrong, and how narrowly; `whose` says which, in words."""
    rows, wrong, near = count["rows"], count["wrong"], count["near"]
    said = f"{wrong} of {rows} readings {whose} {'is' if wrong == 1 else 'are'} wrong"
    return f"{said}, {near} of them by one token: another, a missing or a needless one." if wrong else f"{said}."


def kinds_of(names):
    """What became of a row, by whether each of its readings is the right formula, in the order of the page."""
    if len(names) == 1:
        return {(True,): "right", NEAR: NEARLY_RIGHT, (False,): "wrong"}
    if names == TRAINED:
        words = {(False, True): "fixed", NEAR: NEARLY_RIGHT, (False, False): "still wrong"}
        return words | {(True, False): "broken by training", (True, True): "kept right"}
    before, after = names.values()
    words = {(False, True): f"only {after}", (False, False): "both wrong", (True, False): f"only {before}"}
    return words | {(True, True): "both right"}


def kind_of(prediction, names):
    kinds, right = kinds_of(names), tuple(prediction[when]["formula_match"] for when in names)
    if NEAR in kinds and not any(right) and mistakes.is_near(prediction["truth"], prediction["after"]):
        return NEARLY_RIGHT
    return kinds[right]


def gallery(outputs, predictions, names, examples):
    """What the page shows of each row: the worst, the median and the best ones if there are more than `SHOWN`, and
    those whose numbers are `examples`."""
    ranking = sorted(predictions, key=lambda prediction: (-prediction["after"]["cer"], prediction["row"]))
    last, middle, third = len(ranking) - 1, len(ranking) // 2, SHOWN // 3
    places = {0: "worst", middle: "median", last: "best"}
    start = middle - third // 2
    few = {*range(third), *range(start, start + third), *range(last + 1 - third, last + 1)}
    shown = [
        (rank, prediction)
        for rank, prediction in enumerate(ranking)
        if len(ranking) <= SHOWN or rank in few or prediction["row"] in examples
    ]
    return [
        {
            "row": prediction["row"],
            "kind": kind_of(prediction, names),
            "place": places.get(rank, ""),
            "order": (rank, abs(rank - middle), last - rank),
            "image": picture(Path(outputs) / prediction["image"]),
            "readings": readings(prediction, names),
        }
        for rank, prediction in shown
    ]


def readings(prediction, names):
    """The truth and the readings: their names, drawings, marked texts and scores."""
    truth = prediction["truth"]
    shown = [("truth", drawing(truth), [[truth, False]], None)]
    for when, name in names.items():
        reading = prediction[when]
        near = {"near": mistakes.is_near(truth, reading)}
        shown.append((name, drawing(reading["text"]), marked(reading["text"], truth), reading | near))
    return shown


def what_goes_wrong(predictions, names):
    """What `mistakes` counts, as the page shows it: of a run after training, of others of each reading."""
    found = mistakes.summary(predictions, {"after": "after training"} if names == TRAINED else names)
    for symbol in found["symbols"]:
        symbol |= {when: {"text": symbol[when], "formula": symbol_drawing(symbol[when])} for when in ("truth", "read")}
    return found | {"of": [*found["counts"]]}


def symbol_drawing(token):
    """A token as it looks, where that is more than its letters."""
    return drawing(token) if token and re.fullmatch(r"\\[A-Za-z]+", token) else None


def picture(file):
    """The image in `file` as a data URI, no larger than a page needs."""
    with Image.open(file) as image:
        image.thumbnail((1200, 600))
        png = io.BytesIO()
        image.save(png, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


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
    if looks(latex) is None:
        return None
    try:
        formula = convert_to_element(" ".join(tokens(latex)))
    except Exception:  # the converter raises its own kinds, IndexError, RecursionError, ...
        return None
    for node in formula.iter():
        node.tag = node.tag if TAGS.fullmatch(node.tag) else "mrow"
        node.text = html.unescape(node.text or "")  # the converter writes entities; tostring escapes what must be
        for name, value in [*node.attrib.items()]:
            if not (ATTRIBUTES.fullmatch(name) and re.fullmatch(r"[\w#%.:/+ -]{0,40}", value)):
                del node.attrib[name]
    formula.set("displaystyle", "true")
    return ElementTree.tostring(formula, encoding="unicode")


def marked(text, other):
    """`text` in pieces, [piece, whether it differs from `other`], spaces aside."""
    letters = [place for place, letter in enumerate(text) if not letter.isspace()]
    differs = dict.fromkeys(letters, False)
    for step in Levenshtein.opcodes("".join(text.split()), "".join(other.split())):
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
