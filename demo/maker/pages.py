"""How formulas are drawn: by pdfTeX as print, by matplotlib in other typefaces, and on the demo's blackboard."""

import logging
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

# ---------------------------------------------------------------------------------------------------------------------
# As print: plain LaTeX at 10 points, 200 dots an inch, each dot black or white, halved. Found by matching
# linxy/LaTeX_OCR; formulas with errors are printed as TeX recovers from them.
# ---------------------------------------------------------------------------------------------------------------------

DOTS = 200  # an inch
# The images' sizes in dots before they are halved, (width, height); an image gets the first into which it fits.
SIZES = [(240, 100), (320, 80), (400, 80), (400, 100), (480, 80), (480, 100), (560, 80), (560, 100), (640, 80)]
SIZES += [(640, 100), (720, 80), (720, 100), (720, 120), (720, 200), (800, 100), (800, 320), (1000, 200)]
MARGIN = 8  # dots, left and above

# One page a formula, as large as the formula and 4 points around it. An empty paragraph before each: TeX stops after
# 100 errors in one. Without compression there is less to do.
DOCUMENT = r"""\documentclass[10pt]{article}\pagestyle{empty}\pdfcompresslevel=1\pdfobjcompresslevel=0
\begin{document}\hoffset=-1in\voffset=-1in\def\operatorname{}
\long\def\sheet#1#2#3{\setbox2=\vbox{\noindent\par}\setbox4=\hbox{$\displaystyle #3$}%
\pdfpagewidth=\dimexpr\wd4+10pt\relax\pdfpageheight=\dimexpr\ht4+\dp4+10pt\relax
\shipout\vbox{\kern #2pt\kern 4pt\hbox{\kern #1pt\kern 4pt\box4}}}
"""


def pdflatex():
    """The command of pdfTeX. `PDFLATEX` names one that is not on the path."""
    command = os.environ.get("PDFLATEX") or shutil.which("pdflatex")
    if not command:
        raise SystemExit("Printing needs pdflatex: apt-get install texlive-latex-base, or set PDFLATEX to its path.")
    return command


def typeset(latex, rng, dots):
    """Formulas as gray pages, uint8 (height, width), at `dots` an inch, each at another fraction of a pixel."""
    import pypdfium2

    with tempfile.TemporaryDirectory() as folder:
        pixel = 72.27 / dots
        sheets = (f"\\sheet{{{rng.random() * pixel:.3f}}}{{{rng.random() * pixel:.3f}}}{{{text} }}\n" for text in latex)
        Path(folder, "pages.tex").write_text(DOCUMENT + "".join(sheets) + "\\end{document}\n", encoding="utf-8")
        try:
            subprocess.run(
                [pdflatex(), "-interaction=batchmode", "pages.tex"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=20 + len(latex) / 10,
            )
            document = pypdfium2.PdfDocument(Path(folder, "pages.pdf"))
        except (subprocess.TimeoutExpired, pypdfium2.PdfiumError, FileNotFoundError):
            document = []
        if len(document) != len(latex):  # a formula cost a page, and all after it moved up: halve until it is alone
            if len(latex) == 1:
                return [None]
            half = len(latex) // 2
            return typeset(latex[:half], rng, dots) + typeset(latex[half:], rng, dots)
        pages = []
        for page in document:
            image = page.render(scale=dots / 72, grayscale=True).to_numpy()
            pages.append(image.reshape(image.shape[:2]).copy())
            page.close()
        document.close()
        return pages


def cropped(ink):
    """What is drawn, without the empty rows and columns around it; None if nothing is."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if not len(rows):
        return None
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def as_print(page, rng):
    """A page at 200 dots an inch as an image of the public printed set: uint8, or None if it fits no size."""
    if page is None:
        return None
    ink = cropped(page <= rng.randint(235, 254))
    if ink is None:
        return None
    height, width = ink.shape
    for size in SIZES:
        if width + 2 * MARGIN <= size[0] and height + 2 * MARGIN <= size[1]:
            sheet = np.full((size[1], size[0]), 255, np.uint8)
            sheet[MARGIN : MARGIN + height, MARGIN : MARGIN + width][ink] = 0
            return np.asarray(Image.fromarray(sheet).resize((size[0] // 2, size[1] // 2), Image.Resampling.LANCZOS))
    return None


# Other sizes of page, (height, width), so that there are few: batches are of one size.
OTHER_HEIGHTS, OTHER_WIDTHS = (28, 42, 56, 84, 112), (28, 56, 84, 112, 168, 224, 280, 336, 448)


def on_sheet(gray, rng, room=1.0):
    """A drawn formula somewhere on a white sheet of the next larger size, uint8, or None if there is none.

    `room`: how much larger than the formula the sheet may be.
    """
    if gray is None:
        return None
    gray = cropped(255 - gray)
    if gray is None:
        return None
    height, width = gray.shape
    heights = [side for side in OTHER_HEIGHTS if side >= height + 2]
    widths = [side for side in OTHER_WIDTHS if side >= width + 2]
    if not heights or not widths:
        return None
    size = heights[0], widths[0]
    if size[0] * size[1] < 28 * 28 or size[1] / size[0] > 12:
        return None
    sheet = np.full(size, 255, np.uint8)
    top = round((size[0] - height) * (0.5 + room * (rng.random() - 0.5)))
    left = round((size[1] - width) * (0.5 + room * (rng.random() - 0.5)))
    sheet[top : top + height, left : left + width] = 255 - gray
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# In other typefaces, and on a blackboard: drawn by matplotlib
# ---------------------------------------------------------------------------------------------------------------------

TYPEFACES = ["dejavusans", "dejavuserif", "stix", "stixsans", "cm"]
logging.getLogger("matplotlib.mathtext").setLevel(logging.ERROR)  # silent about an accent that is stretched


def coverage(latex, pixels, typeface):
    """Ink of a typeset formula: float32 (height, width), 0 to 1. `pixels` is the font size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    # mathtext would take the space after ^ or _ for the script itself.
    latex = latex.replace(" _ {", "_{").replace(" ^ {", "^{")
    font = FontProperties(size=pixels, math_fontfamily=typeface)
    ink = np.asarray(MathTextParser("agg").parse(f"${latex}$", dpi=72, prop=font).image, np.float32) / 255
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def on_grid(ink, rng, jitter, margin):
    """Empty margins that make both sides multiples of 14 pixels: the model sees such a picture unscaled.

    The ink is off the centre by up to `jitter` pixels, and at least `margin` from the edge.
    """
    margins = []
    for length in ink.shape:
        side = max(math.ceil((length + 2 * margin) / 14) * 14, 28)
        before = round((side - length) / 2 + rng.uniform(-jitter, jitter))
        before = min(max(before, margin), side - length - margin)
        margins.append((before, side - length - before))
    return np.pad(ink, margins)


def waves(rng, shape, between, height):
    """A smooth random surface, one hill or valley about every `between` pixels, up to some `height`."""
    noise = np.random.default_rng(rng.getrandbits(32))
    rough = noise.normal(0, height, [side // between + 2 for side in shape]).astype(np.float32)
    return np.asarray(Image.fromarray(rough).resize(shape[::-1], Image.Resampling.BICUBIC))


def photograph_blackboard(latex, rng):
    """The demo's domain, a photo of a blackboard: uint8 (height, width, 3), chalk on green, by an unsteady hand."""
    noise = np.random.default_rng(rng.getrandbits(32))
    ink = on_grid(coverage(latex, rng.uniform(17, 19), "dejavusans"), rng, jitter=4, margin=3)
    height, width = ink.shape
    # The letters lean, the line climbs or falls, and no two letters are quite alike.
    slant, climb = rng.uniform(0.05, 0.2), math.tan(math.radians(rng.uniform(-1, 1)))
    shear = (1, slant, -slant * height / 2, climb, 1, -climb * width / 2)
    image = Image.fromarray((ink * 255).astype(np.uint8)).transform(
        (width, height), Image.Transform.AFFINE, shear, Image.Resampling.BICUBIC
    )
    rows, columns = np.mgrid[:height, :width]
    rows = np.clip(np.rint(rows + waves(rng, ink.shape, 12, 0.25)), 0, height - 1).astype(int)
    columns = np.clip(np.rint(columns + waves(rng, ink.shape, 12, 0.25)), 0, width - 1).astype(int)
    image = Image.fromarray(np.asarray(image)[rows, columns]).filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 0.3)))
    # Chalk crumbles, and the board was wiped.
    ink = np.asarray(image, np.float32) / 255 * np.clip(noise.normal(0.9, 0.12, ink.shape), 0.4, 1)
    dark, light = rng.uniform(40, 70), rng.uniform(205, 240)
    board = np.array([dark * 0.75, dark * 1.1, dark * 0.9], np.float32)
    chalk = np.array([light, light, light - rng.uniform(0, 15)], np.float32)
    smears = waves(rng, ink.shape, 20, 5)[..., None] + noise.normal(0, 3, (height, width, 1))
    photo = board + (chalk - board) * ink[..., None] + smears
    return np.clip(photo, 0, 255).astype(np.uint8)
