"""A table of readings that grows as they are made, loses nothing when it is interrupted, and can be continued.

It wraps no step. Rows are appended to the file itself. Beside it lies FILE.unfinished as long as some are missing, with
what they are read by: a table of two models' readings would look like one model's.
"""

import csv
import io
import json
import os
import re
import sys
from pathlib import Path

from qwen_vl_kit.images import PAGE
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
    return re.split(r"(?<!\\) \| ", line.removeprefix("| "))[0].replace(r"\|", "|")


FORMATS = {  # the lines before the first row, how a row is written, and how its file is found again
    ".csv": (as_csv(*COLUMNS), as_csv, from_csv),
    ".jsonl": ("", as_jsonl, from_jsonl),
    ".md": ("| file | LaTeX | cut off | certainty |\n|---|---|---|---|\n", as_markdown, from_markdown),
}


class Table:
    """A file of readings of `files`, labels, which depend on what `read_by`, {name: value}, says.

    Ends the program with a sentence if the file is there and not to be continued, or was made by something else.
    """

    def __init__(self, file, files, read_by, resume):
        self.file, self.mark = Path(file), Path(f"{file}.unfinished")
        self.head, self.line, self.name_in = FORMATS[self.file.suffix.lower()]
        self.done, read_by = set(), json.dumps(read_by, indent=1, ensure_ascii=False) + "\n"
        if self.file.exists():
            self.take_up(files, read_by, resume)
        else:
            self.mark.write_text(read_by, encoding="utf-8")
        self.opened = self.file.open("a", encoding="utf-8", newline="")
        if not self.file.stat().st_size:
            self.write(self.head)

    def take_up(self, files, read_by, resume):
        if not resume:
            fail(f"{self.file} is there already: choose another --output, or continue it with --resume.")
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a kill can leave half a line
        try:
            lines = whole.decode("utf-8").removeprefix(self.head).splitlines()
            self.done = {self.name_in(line) for line in lines}
        except (ValueError, KeyError, IndexError, TypeError):
            fail(f"{self.file} was not made by this command: choose another --output.")
        if not self.mark.exists():
            if {*files} - {name.partition(PAGE)[0] for name in self.done}:
                fail(f"{self.file} was finished, without some of these files: choose another --output for them.")
            print(f"{self.file} has them all.", file=sys.stderr)
            sys.exit()
        if (then := self.mark.read_text(encoding="utf-8")) != read_by:
            fail(f"{self.file} was made by something else:\n{then}Now it would be:\n{read_by}Choose another --output.")
        os.truncate(self.file, len(whole))

    def write(self, line):
        self.opened.write(line)
        self.opened.flush()

    def add(self, file, reading):
        cells = file, on_one_line(reading.text), reading.cut, round(reading.certainty, 4)
        self.write(self.line(*cells))

    def finish(self):
        self.opened.close()
        self.mark.unlink()
