"""A table of readings that grows as they are made, loses nothing when it is interrupted, and can be continued.

It wraps no step. Rows are appended to the file itself. Beside it lies FILE.about, with what they were read by, since a
table of two models' readings would look like one model's, and whether all files are in it.
"""

import csv
import io
import json
import os
import re
from pathlib import Path

from qwen_vl_kit.sentences import fail

COLUMNS = ("file", "latex", "cut", "certainty")


def on_one_line(text):
    return " ".join(text.split())


def as_csv(*cells):
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def from_csv(line):
    return next(csv.reader([line]))[0]


def as_jsonl(*cells):
    return json.dumps(dict(zip(COLUMNS, cells, strict=True)), ensure_ascii=False) + "\n"


def from_jsonl(line):
    return json.loads(line)["file"]


def as_markdown(file, latex, cut, certainty):
    fence = "`" * (1 + max(map(len, re.findall("`+", latex)), default=0))
    code = f"{fence} {latex} {fence}" if latex else ""
    cells = (file, code, "yes" if cut else "", certainty)
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |\n"


def from_markdown(line):
    return line.removeprefix("| ").split(" | ")[0].replace(r"\|", "|")  # within cells, bars have a backslash


FORMATS = {  # the lines before the first row, how a row is written, and how its file is found again
    ".csv": (as_csv(*COLUMNS), as_csv, from_csv),
    ".jsonl": ("", as_jsonl, from_jsonl),
    ".md": ("| file | LaTeX | cut off | certainty |\n|---|---|---|---|\n", as_markdown, from_markdown),
}


class Table:
    """A file of readings, which depend on what `read_by`, {name: value}, says.

    `done` are the labels of pages in it. Nothing is written before the first row. Ends the program with a sentence if
    the file is there and not to be continued, or was made by something else.
    """

    def __init__(self, file, read_by, resume):
        self.file, self.about, self.opened = Path(file), Path(f"{file}.about"), None
        self.head, self.line, self.name_in = FORMATS[self.file.suffix.lower()]
        self.read_by, self.done = json.loads(json.dumps(read_by)), set()
        if not self.file.parent.is_dir():
            fail(f"Could not write {self.file}: there is no folder {self.file.parent}.")
        if self.file.exists():
            self.take_up(resume)

    def take_up(self, resume):
        if not resume:
            fail(f"{self.file} is there already: choose another --output, or continue it with --resume.")
        try:
            then = json.loads(self.about.read_text(encoding="utf-8"))
            content = self.file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]  # a kill can leave half a line
            lines = whole.decode("utf-8").removeprefix(self.head).splitlines()
            self.done = {self.name_in(line) for line in lines}
            then.pop("complete")
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
            fail(f"{self.file} was not made by this command, or {self.about} is gone: choose another --output.")
        for name, value in self.read_by.items():
            if then.get(name) != value:
                fail(
                    f"{self.file} was made with {name.replace('_', ' ')} {then.get(name)}, not {value}: choose another "
                    "--output, or do as then."
                )
        os.truncate(self.file, len(whole))

    def write(self, line):
        if not self.opened:
            self.opened = self.file.open("a", encoding="utf-8", newline="")
            self.note(complete=False)
            line = line if self.file.stat().st_size else self.head + line
        self.opened.write(line)
        self.opened.flush()

    def note(self, complete):
        self.about.write_text(json.dumps(self.read_by | {"complete": complete}, indent=1) + "\n", encoding="utf-8")

    def add(self, file, reading):
        cells = file, on_one_line(reading.text), reading.cut, round(reading.certainty, 4)
        self.write(self.line(*cells))

    def finish(self, complete):
        """Closes the table, and notes whether all files that were asked for are in it."""
        if self.opened or self.done:
            self.note(complete)
        if self.opened:
            self.opened.close()
