"""Images as a person sees them: found where a row says, decoded with care, and if that fails, why.

Wraps no step. `rows` opens those of training by it, `images` those that are named on a command line.
"""

import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datasets import Image
from datasets.config import DOWNLOADED_DATASETS_PATH
from PIL import Image as Pillow
from PIL import ImageOps

from qwen_vl_kit import run
from qwen_vl_kit.sentences import first_line

warnings.simplefilter("error", Pillow.DecompressionBombWarning)  # from 89 million pixels on
Pillow.init()
IMAGE_TYPES = [name for name in Pillow.ID if name != "EPS"]  # that is a program, for Ghostscript to run
SUFFIXES = {suffix for suffix, kind in Pillow.registered_extensions().items() if kind in IMAGE_TYPES} - {".pdf"}

# How files begin that people take for images, and how images begin of which too little is left to be known as such.
OTHERS = {b"%PDF-": "a PDF file", b"%!PS": "a PostScript file", b"<svg": "an SVG file", b"<!DO": "a web page"}
OTHERS |= {
    b"<htm": "a web page",
    b"PK\3\4": "a zip file",
    b"version https://git-lfs": "a Git LFS pointer: git lfs pull",
}
STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"RIFF")
ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b";"}  # by the name of the format


class Unusable(Exception):
    """Why a row can't be used, in words: the `reason` that rows share, and `detail`, which this row alone may have."""

    def __init__(self, reason, detail=""):
        super().__init__(reason + detail)
        self.reason, self.detail = reason, detail

    def __reduce__(self):  # to come from another process whole
        return Unusable, (self.reason, self.detail)


def path_of(image):
    """The path in an undecoded image, {"bytes": bytes or None, "path": str or None}, as it was written; or None."""
    path = image["path"]
    if path and path.startswith('"'):  # as `datasets` has it where other rows of a JSON file hold other things
        path = json.loads(path)
    return path


def placed(path, folder, drop=0):
    """Where the file of `path` is to be, without its first `drop` parts, in `folder`. Windows' paths are understood."""
    if "\\" in path and not (folder / path).is_file():
        path = path.replace("\\", "/")
    if drop:
        path = "/".join(PurePosixPath(path).parts[drop:])
    return folder / path


def image_bytes(image, folder):
    """The file of `image`, {"bytes": bytes or None, "path": str or None} as `datasets` has it undecoded.

    Paths start in `folder`, and may lead nowhere else, but into the cache of what was downloaded. Raises Unusable if
    there is no such file, and what reading a file raises.
    """
    if image and image["bytes"] is not None:
        return image["bytes"]
    if not image or not path_of(image):
        raise Unusable("no image")
    file = placed(path_of(image), folder, run.dropped_parts).resolve()
    if not any(file.is_relative_to(place) for place in (folder.resolve(), Path(DOWNLOADED_DATASETS_PATH).resolve())):
        raise Unusable("image outside the data set's folder")
    if not file.is_file():  # a pipe would be waited for
        if path_of(image) == "null":  # as `datasets` has None where other rows hold other things than paths
            raise Unusable("no image")
        raise Unusable("not a file" if file.exists() else "image file is missing")
    return file.read_bytes()


def open_image(content):
    """Decodes the bytes of an image file to RGB as a person would see it; raises what Pillow raises if it can't."""
    return as_seen(opened(content))


def opened(content):
    """The image in the bytes of a file, not decoded yet. Raises Unusable if it has too many pixels."""
    try:
        return Pillow.open(io.BytesIO(content), formats=IMAGE_TYPES)
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
        raise Unusable("image of too many pixels") from None


def as_seen(picture):
    """An image as RGB, as a person would see it. Raises Unusable if it is too narrow for the model.

    Transparency becomes white paper (else black text on it is black on black), 16 bits a pixel become 8 (else they are
    clipped to white), and a photo is turned as its EXIF data says.
    """
    if max(picture.size) > 200 * min(picture.size):  # Qwen2-VL takes no others
        raise Unusable("image over 200 times as long as wide")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = picture.point(lambda level: level * (1 / 256)).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Pillow.alpha_composite(Pillow.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def why(error, content):
    """Why the bytes of a file could not be opened as an image, after `error`: an Unusable."""
    if not content:
        return Unusable("the file is empty")
    if isinstance(error, Pillow.DecompressionBombError | Pillow.DecompressionBombWarning):  # of a later page
        return Unusable("image of too many pixels")
    size = f"{len(content) / 1000:,.0f} kB" if len(content) >= 1000 else f"{len(content)} bytes"
    if isinstance(error, Pillow.UnidentifiedImageError):
        start = content.lstrip(b"\xef\xbb\xbf \t\r\n")[:30]
        if content.startswith(STARTS):
            return Unusable("image cut off", f" after {size}")
        kind = next((kind for start_of, kind in OTHERS.items() if start.lower().startswith(start_of.lower())), None)
        return Unusable("not an image", f": {kind or size + ' of something else'}")
    try:
        end = ENDS.get(opened(content).format)
    except Exception:  # what was wrong with it is told below
        end = None
    if content.startswith(b"RIFF") and int.from_bytes(content[4:8], "little") + 8 > len(content):  # WebP says how long
        return Unusable("image cut off", f" after {size}")
    if (end and end not in content[-64:]) or "truncated" in str(error).lower():
        return Unusable("image cut off", f" after {size}")
    return Unusable("image damaged", f": {first_line(error)}")


@dataclass
class Picture(Image):
    """The type of a column of images that are decoded by `open_image`."""

    def decode_example(self, value, token_per_repo_id=None):
        return open_image(image_bytes(value, run.data_folder))
