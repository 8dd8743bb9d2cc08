"""The images that people name on a command line: files, folders, the pages of TIFF and PDF files, standard input.

It wraps no step. Each is opened as the rows of training are (`pictures`), and what can't be opened has a reason.
"""

import io
import os
import re
import sys
from pathlib import Path

from PIL import Image

from qwen_vl_kit.pictures import SUFFIXES, Unusable, as_seen, opened, why
from qwen_vl_kit.sentences import first_line

TYPES = SUFFIXES | {".pdf"}
DPI = 200  # at which PDF pages are drawn: 10-point letters are 28 pixels high, as the models like them
PAGE = "#page="  # as in links to a page of a PDF file
LONGEST = 4000  # pixels of a page's longer side at most


def listed(names):
    """The files that `names` stand for, each once: [(label, Path or None for standard input), ...].

    A folder stands for the images in it and in its folders, in the order of their names, 2 before 10.
    """
    found = {}
    for name in names:
        if name == "-":
            found["-"] = "-", None
            continue
        for file in sorted(in_folder(Path(name)), key=natural) if os.path.isdir(name) else [Path(name)]:
            label = name if str(file) == os.path.normpath(name) else str(file)
            found.setdefault(os.path.abspath(file), (printable(label), file))
    return [*found.values()]


def printable(name):
    """A file's name on one line, whatever is in it: tabs, line breaks, bytes that are no letters."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)


def in_folder(folder):
    """The images in a folder, at any depth, without what is hidden; the folder itself if there are none."""
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk goes into those that are left
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return [file for file in files if file.suffix.lower() in TYPES] or [folder]


def natural(file):
    parts = (re.split(r"(\d+)", name) for name in file.parts)
    return [[(int(part) if part.isdecimal() else -1, part) for part in name] for name in parts]


def pages(label, file):
    """Yields (label, picture as RGB) of a file, one for each page of a TIFF or PDF file, labelled FILE#page=1, ...

    In place of a picture that can't be had, or of all of them, stands an Unusable with the reason in words.
    """
    try:
        content = content_of(file)
        numbers, draw = drawn(content)
    except Unusable as reason:
        yield label, reason
        return
    for number in numbers:
        try:
            picture = draw(number)
            if picture.getcolors(1):
                picture = Unusable("image of one color: there is nothing to read")
        except Unusable as reason:
            picture = reason
        except Exception as error:  # on a broken file Pillow's decoders raise anything
            picture = why(error, content)
        yield (f"{label}{PAGE}{number}" if number else label), picture


def drawn(content):
    """The numbers of the pages in a file, [0] if it is an image and has no pages, and a function that draws one."""
    if content.startswith(b"%PDF-"):
        return of_pdf(content)
    try:
        picture = opened(content)
        count = picture.n_frames if picture.format == "TIFF" else 1
    except (Unusable, MemoryError):
        raise
    except Exception as error:
        raise why(error, content) from error

    def draw(number):
        picture.seek(max(number - 1, 0))
        return as_seen(picture.copy())

    return (range(1, count + 1) if count > 1 else [0]), draw


def content_of(file):
    if file is None:
        return sys.stdin.buffer.read()
    if os.path.isdir(file):
        raise Unusable("a folder without images")
    if not os.path.exists(file):
        raise Unusable("a link to nothing" if os.path.islink(file) else "there is no such file")
    if not os.path.isfile(file):  # a pipe would be waited for
        raise Unusable("not a file")
    try:
        return file.read_bytes()
    except OSError as error:
        raise Unusable(error.strerror) from error


def of_pdf(content):
    try:
        import pypdfium2
    except ImportError:
        raise Unusable("a PDF file, which needs a library: pip install pypdfium2") from None
    try:
        document = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        raise Unusable(f"a PDF file that is damaged or needs a password ({first_line(error)})") from error

    def draw(number):
        page = document[number - 1]
        scale = min(DPI / 72, LONGEST / max(page.get_size()))
        return as_seen(page.render(scale=scale).to_pil())

    return range(1, len(document) + 1), draw


def from_clipboard():
    """The image in the clipboard. Raises Unusable if there is none, or the desktop has no way to ask."""
    from PIL import ImageGrab

    try:
        found = ImageGrab.grabclipboard()
    except (NotImplementedError, OSError) as error:  # ChildProcessError among them
        raise Unusable(f"the clipboard can't be read ({first_line(error)})") from error
    if isinstance(found, list) and len(found) == 1:  # a file that was copied in a file manager
        _, found = next(pages("clipboard", Path(found[0])))
        if isinstance(found, Unusable):
            raise found
    if not isinstance(found, Image.Image):
        raise Unusable("there is no image in the clipboard")
    content = io.BytesIO()
    found.save(content, "PNG")
    return as_seen(opened(content.getvalue()))
