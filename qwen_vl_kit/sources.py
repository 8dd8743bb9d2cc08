"""What people's files look like: tables, folders of images, text files beside images, im2latex's lists.

Wraps no step. `rows` asks here for the splits of a data set. What has one meaning is taken; else the run ends with what
to write, in lines made of the user's own file names.
"""

import codecs
import csv
import os
import re
from collections import Counter
from itertools import islice
from pathlib import Path, PurePosixPath

from datasets import Dataset, DatasetDict, Features, Image, NamedSplit, Value, load_dataset
from huggingface_hub.constants import HF_HUB_CACHE

from qwen_vl_kit import run
from qwen_vl_kit.pictures import SUFFIXES, path_of, placed
from qwen_vl_kit.sentences import fail

TABLES = (".csv", ".tsv", ".xlsx", ".jsonl", ".json")
FILE_TYPES = (".parquet", *TABLES, ".lst")
TEXTS = (".txt", ".tex", ".latex")
FILE_COLUMNS = ("file_name", "filename", "image_path", "image_file", "path", "file")  # of images, as others have them
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation"}
SPLITS |= {"val": "validation", "valid": "validation", "validate": "validation", "dev": "validation"}
csv.field_size_limit(1 << 27)


def as_found(options):
    """The splits of `options.dataset_name` as they are there: a hub name, a file, or a folder."""
    source = Path(options.dataset_name)
    run.data_folder = source if source.is_dir() else source.parent if source.is_file() else Path(HF_HUB_CACHE)
    run.dropped_parts, run.lines_of = 0, {}
    if source.is_file():
        return of_file(source, options)
    if source.is_dir() and not understood(source):
        return of_folder(source, options)
    return load_dataset(options.dataset_name, options.dataset_config)


def of_file(source, options):
    kind = source.suffix.lower()
    if kind not in FILE_TYPES:
        fail(f"{source} is not a supported file ({', '.join(FILE_TYPES)}). Name one, a folder, or a hub data set.")
    if kind == ".parquet":
        return load_dataset("parquet", data_files=str(source))
    if kind == ".lst":
        return of_lists(source.parent, [source], options)
    return DatasetDict({"train": table(source, options)})


def understood(folder):
    """Whether this folder is left to `datasets`: parquet files, archives, images with a metadata file deep in it."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        depth = len(Path(place).relative_to(folder).parts)
        for name in names:
            if Path(name).suffix in (".parquet", ".arrow", ".tar", ".zip") or name == "metadata.jsonl":
                return True
            if name == "metadata.csv" and (depth > 1 or (depth and Path(place).name.lower() not in SPLITS)):
                return True  # others are read here: `datasets` makes numbers of formulas like 12, and nothing of NA
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def table(file, options, split="train"):
    """The rows of a table in a file, all cells of CSV, TSV and Excel files as text."""
    kind = file.suffix.lower()
    if kind == ".xlsx":
        rows, run.lines_of[split] = of_excel(file), lambda number: f"line {number + 2}"
    elif kind in (".json", ".jsonl"):
        rows = load_dataset("json", data_files=str(file), split="train")
        run.lines_of[split] = json_lines(file)
    else:
        rows = of_csv(file, options, split)
    names = [name for name in FILE_COLUMNS if name in rows.column_names]
    if options.image_column == "image" and "image" not in rows.column_names and len(names) == 1:
        rows = rows.rename_column(names[0], "image")
    return rows


def encoding_of(file):
    """How the text of a file is encoded: by its first bytes, or UTF-8 if all of it is, else as Windows in the west."""
    with file.open("rb") as opened:
        start = opened.read(4096)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        zeros = start.count(b"\0")
        if zeros > len(start) // 4:  # half of the bytes of plain text in UTF-16
            return "utf-16-le" if start[1::2].count(0) > zeros // 2 else "utf-16-be"
        opened.seek(0)
        decoder, windows = codecs.getincrementaldecoder("utf-8-sig")(), True
        try:
            while chunk := opened.read(1 << 20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
            return "utf-8-sig"
        except UnicodeDecodeError:
            opened.seek(0)
            while windows and (chunk := opened.read(1 << 20)):
                windows = not re.search(rb"[\x81\x8d\x8f\x90\x9d]", chunk)  # which it does not have
    return "cp1252" if windows else "latin-1"


def separator_of(file, encoding, options):
    """The character between the cells of a file, and the names of its columns, by its first line."""
    wanted = {options.image_column, options.text_column, *FILE_COLUMNS}
    with file.open(encoding=encoding, newline="") as opened:
        head = next(csv.reader(line for line in opened if line.strip()), [])
        opened.seek(0)
        first = next((line for line in opened if line.strip()), "").lstrip("\ufeff").rstrip("\r\n")
    if not head:
        fail(f"{file} is empty.")
    found = {separator: next(csv.reader([first], delimiter=separator)) for separator in ",;\t|"}
    best = max(found, key=lambda one: (len(wanted & {*found[one]}), len(found[one])))
    return best, found[best]


def of_csv(file, options, split):
    encoding = encoding_of(file)
    separator, columns = separator_of(file, encoding, options)
    if any(Path(cell).suffix.lower() in SUFFIXES for cell in columns):
        names = f"{options.image_column}{separator}{options.text_column}"
        fail(f"The first line of {file} is a row already: write the names of the columns above it, such as {names!r}.")
    if len({*columns}) < len(columns):
        fail(f"{file} has two columns of one name in {columns}: rename one.")
    if encoding not in ("utf-8-sig", "utf-16"):
        print(f"{file} is not UTF-8: it is read as {encoding}.")
    check_lines(file, encoding, separator, columns)
    features = Features({name: Value("string") for name in columns})  # else formulas such as 12 were numbers
    how = {"sep": separator, "encoding": encoding, "features": features, "keep_default_na": False}
    run.lines_of[split] = csv_lines(file, encoding, separator)
    return load_dataset("csv", data_files=str(file), split="train", **how)


def check_lines(file, encoding, separator, columns):
    """Ends the run at the first row with more cells than there are columns: a formula that was cut at a comma."""
    with file.open(encoding=encoding, newline="") as opened:
        reader = csv.reader(opened, delimiter=separator)
        for cells in reader:
            if len(cells) > len(columns):
                fail(
                    f"Line {reader.line_num} of {file} has {len(cells)} cells, where its first line has "
                    f"{len(columns)}: put formulas that contain {separator!r} or a quote in quotes, such as "
                    f'"a{separator} b".'
                )


def csv_lines(file, encoding, separator):
    """A function that tells the line on which a row starts. The file is read again when it is first asked."""
    starts = []

    def line(number):
        if not starts:
            with file.open(encoding=encoding, newline="") as opened:
                reader, last = csv.reader(opened, delimiter=separator), 0
                for cells in reader:
                    if cells:
                        starts.append(last + 1)
                    last = reader.line_num
        return f"line {starts[number + 1]}" if number + 1 < len(starts) else None

    return line


def json_lines(file):
    """The same of JSON Lines; of a JSON list, whose rows have no lines, None."""
    with file.open("rb") as opened:
        if opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
            return None
    starts = []

    def line(number):
        if not starts:
            with file.open("rb") as opened:
                starts.extend(at for at, content in enumerate(opened, start=1) if content.strip())
        return f"line {starts[number]}" if number < len(starts) else None

    return line


def of_excel(file):
    try:
        import openpyxl
    except ImportError:
        fail(f"{file} needs a library: pip install openpyxl. Or save it as CSV.")
    try:
        sheet = openpyxl.load_workbook(file, read_only=True, data_only=True).active
    except Exception as error:  # it is a zip file of XML, and fails in as many ways
        fail(f"{file} is no Excel workbook (.xlsx) that can be read ({type(error).__name__}): save it as CSV.")
    lines = sheet.iter_rows(values_only=True)
    columns = [str(cell) for cell in next(lines, ()) if cell is not None]
    if not columns:
        fail(f"The first sheet of {file} is empty.")
    rows = [["" if cell is None else str(cell) for cell in cells[: len(columns)]] for cells in lines]
    while rows and not any(rows[-1]):  # Excel counts lines that only look different
        rows.pop()
    cells = {name: [row[at] if at < len(row) else "" for row in rows] for at, name in enumerate(columns)}
    return Dataset.from_dict(cells, features=Features({name: Value("string") for name in columns}))


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def visible(folder):
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "~$")))


def images_in(folder):
    return [file for file in visible(folder) if file.suffix.lower() in SUFFIXES and file.is_file()]


def texts_in(folder):
    return [file for file in visible(folder) if file.suffix.lower() in TEXTS and file.is_file()]


def of_folder(folder, options):
    """The splits in a folder: in folders of their names, in tables of their names, or all of it as train."""
    folders = [entry for entry in visible(folder) if entry.is_dir()]
    of_splits = {SPLITS[entry.name.lower()]: entry for entry in folders if entry.name.lower() in SPLITS}
    tables = [entry for entry in visible(folder) if entry.suffix.lower() in TABLES and entry.is_file()]
    if lists := [entry for entry in visible(folder) if entry.suffix.lower() == ".lst"]:
        return of_lists(folder, lists, options)
    if by_split := {SPLITS[file.stem.lower()]: file for file in tables if file.stem.lower() in SPLITS}:
        return DatasetDict({split: table(file, options, split) for split, file in by_split.items()})
    if of_splits and not tables and not images_in(folder):
        return DatasetDict({split: one_split(entry, folder, options, split) for split, entry in of_splits.items()})
    rows = one_split(folder, folder, options, "train")
    if of_splits and options.image_column in rows.column_names:
        parts = [PurePosixPath(str(path).replace("\\", "/")).parts[:1] for path in rows[options.image_column]]
        splits = [SPLITS.get(part[0].lower()) if part else None for part in parts]
        if all(splits):  # one table for train/ and test/
            run.lines_of = {}
            numbers = {split: [at for at, one in enumerate(splits) if one == split] for split in dict.fromkeys(splits)}
            return DatasetDict({split: rows.select(these) for split, these in numbers.items()})
    return DatasetDict({"train": rows})


def one_split(folder, root, options, split):
    """The rows of one folder. Paths start at `root`."""
    tables = [file for file in visible(folder) if file.suffix.lower() in TABLES and file.is_file()]
    named = [file for file in tables if file.stem.lower() in ("metadata", "labels")]
    if len(tables) == 1 or len(named) == 1:
        rows = table((named or tables)[0], options, split)
        if folder != root and options.image_column in rows.column_names:
            place = folder.relative_to(root)
            rows = rows.map(lambda row: {options.image_column: str(place / (row[options.image_column] or ""))})
        return rows
    if tables:
        fail(f"{folder} has several tables ({some(tables)}): name one of them with --dataset_name.")
    images, texts = images_in(folder), texts_in(folder)
    if not images:
        folders = [entry for entry in visible(folder) if entry.is_dir()]
        with_images = [entry for entry in folders if images_in(entry)]
        with_texts = [entry for entry in folders if texts_in(entry)]
        if len(with_images) == 1:  # also where its own text files are the only ones
            images, texts = (
                images_in(with_images[0]),
                [text for entry in with_texts for text in texts_in(entry)] or texts,
            )
        elif with_images:
            fail(
                f"{folder} has images in several folders ({some(with_images)}), and no table. "
                + what_to_write(folder, [file for entry in with_images for file in images_in(entry)])
            )
    if not images:
        fail(f"{folder} has no images and no table of them ({', '.join(FILE_TYPES)}).")
    by_name = {}
    for text in texts:
        by_name.setdefault(text.stem, []).append(text)
    if twice := next((files for files in by_name.values() if len(files) > 1), None):
        fail(f"{twice[0]} and {twice[1]} would both be the formula of one image: keep one of them.")
    stems = Counter(image.stem for image in images)
    if twice := next((stem for stem in by_name if stems[stem] > 1), None):
        fail(f"{len(images)} images in {folder}: two of them are named {twice}, and one text file is. Rename one.")
    if not any(image.stem in by_name for image in images):
        fail(
            f"{folder} has {len(images)} image{'s' * (len(images) > 1)}, but nothing that says what they show. "
            + what_to_write(folder, images)
        )
    read = {image: content(by_name[image.stem][0]) if image.stem in by_name else None for image in images}
    print(f"{folder}: {sum(text is not None for text in read.values())} of {len(images)} images have a text file")
    paths = [str(image.relative_to(root)) for image in images]
    columns = {options.image_column: paths, options.text_column: [*read.values()]}
    return Dataset.from_dict(columns, Features({name: Value("string") for name in columns}), split=NamedSplit(split))


def content(file):
    return file.read_bytes().decode(encoding_of(file)).strip()


def some(files):
    return ", ".join(file.name for file in files[:4]) + ", ..." * (len(files) > 4)


def what_to_write(folder, images):
    """The end of a sentence: which file to write, with two lines of the user's own images."""
    lines = "".join(f'\n{image.relative_to(folder)},"{text}"' for image, text in zip(images, EXAMPLES, strict=False))
    return f"Write {folder / 'metadata.csv'}, a line for each image, with its LaTeX:\nfile_name,text{lines}"


EXAMPLES = (r"\frac{1}{2}", "x^2")


def of_lists(folder, lists, options):
    """The splits of im2latex: lists of `formula image ...` or `image formula`, and a file with a formula a line."""
    beside = [file for file in visible(folder) if file.is_file() and file.suffix.lower() not in TABLES]
    formulas = [file for file in beside if "formula" in file.name.lower()]
    lists = [file for file in lists if file not in formulas]
    if len(formulas) != 1 or not lists:
        fail(
            f"A list as im2latex has it needs the formulas beside it: exactly one file in {folder} with 'formula' in "
            f"its name, and a .lst file of numbers and images. There are {some(formulas) or 'none'} and "
            f"{some(lists) or 'none'}."
        )
    texts = formulas[0].read_bytes().decode(encoding_of(formulas[0])).split("\n")  # others are characters of formulas
    files = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES:
                file = Path(place, name).relative_to(folder)
                files[file.stem] = files[name] = files[str(file)] = str(file)
    splits = {}
    for file in lists:
        split = next((SPLITS[word] for word in re.split(r"\W|_", file.stem.lower()) if word in SPLITS), "train")
        if split in splits:
            fail(f"{some(lists)} in {folder} are several lists of {split} rows: name one with --dataset_name.")
        lines = [line.split() for line in content(file).splitlines() if line.strip()]
        at = next((at for at in (0, 1) if all(len(line) > 1 and line[at].isdecimal() for line in lines)), None)
        if at is None or not lines:
            fail(f"{file} is not a list as im2latex has it: each line is the line of a formula, from 0, and an image.")
        if outside := next((line for line in lines if int(line[at]) >= len(texts)), None):
            fail(
                f"{file} names formula {outside[at]}, but {formulas[0]} ends at {len(texts) - 1}: it is another one's."
            )
        columns = {
            options.image_column: [files.get(line[1 - at], line[1 - at]) for line in lines],
            options.text_column: [texts[int(line[at])].strip() for line in lines],
        }
        splits[split] = Dataset.from_dict(columns, Features({name: Value("string") for name in columns}))
    return DatasetDict(splits)


# ---------------------------------------------------------------------------------------------------------------------
# Where images are
# ---------------------------------------------------------------------------------------------------------------------


def find_images(splits, options):
    """Decides where the paths of images start, `run.data_folder`, and ends the run if none of them is found.

    The first of these that has one of the images: --image_folder, the folder of the data, the working directory.
    """
    given = getattr(run.extra, "image_folder", None)
    if given and not Path(given).is_dir():
        fail(f"--image_folder {given} is not a folder.")
    if not Path(options.dataset_name).exists():
        return
    paths = [path for rows in splits.values() for path in sample(rows, options.image_column)]
    if not paths:
        return
    folders = [Path(given)] if given else [run.data_folder, Path.cwd()]
    for folder in folders:
        depth = max(len(PurePosixPath(path.replace("\\", "/")).parts) for path in paths)
        for drop in range(depth if given else 1):  # paths of another computer, to the folder that is given
            there = [placed(path, folder, drop) for path in paths]
            if any(exists(file) and inside(file, folder) for file in there):
                if len({*there}) < len({*paths}):
                    break  # two images would be one
                run.dropped_parts = drop
                if folder != run.data_folder or drop:
                    said = f", without the first {drop} of their folders" if drop else ""
                    print(f"The paths of the images are found in {folder}{said}.")
                run.data_folder = folder
                return
    first = paths[0]
    if file := next((placed(path, run.data_folder) for path in paths if exists(placed(path, run.data_folder))), None):
        fail(
            f"The images of {options.dataset_name} are outside its folder, such as {file}: allow that by "
            f"--image_folder {file.resolve().parent}."
        )
    tried = " and ".join(dict.fromkeys(str(placed(first, folder)) for folder in folders))
    fail(
        f"None of the images in column {options.image_column!r} is found: looked for {tried}. {seem_to_be(first)}"
        "Set --image_folder to the folder that the paths start in, or choose another column with --image_column."
    )


def inside(file, folder):
    return file.resolve().is_relative_to(folder.resolve())


def exists(file):
    try:
        return file.is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero in it
        return False


def sample(rows, column):
    """The paths of images in up to 1,000 rows all over a split; none if images are in the rows themselves."""
    rows = rows.select_columns(column).cast_column(column, Image(decode=False))
    numbers = [*range(0, len(rows), max(len(rows) // 1000, 1))]
    images = rows.select(numbers)[column][:] if numbers else []
    if any(image and image["bytes"] for image in images):
        return []
    paths = [path_of(image) for image in images if image]
    return [path for path in paths if isinstance(path, str) and path and "://" not in path]


def seem_to_be(path):
    """A sentence that says where a file of this name is, if it is not far from the data; or nothing."""
    name = PurePosixPath(path.replace("\\", "/")).name
    walk = (
        Path(place, name)
        for root in (run.data_folder, run.data_folder.resolve().parent)
        for place, _, names in islice(os.walk(root), 2000)
        if name in names
    )
    found = next(walk, None)
    return f"There is {found}. " if found else ""
