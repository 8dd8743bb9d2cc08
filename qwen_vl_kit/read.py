"""Reads images: from pictures to LaTeX, in one command.

    python -m qwen_vl_kit read outputs picture.jpg scans/ more/*.webp
    python -m qwen_vl_kit read outputs scans/ --output table.csv
    python -m qwen_vl_kit read outputs --clipboard

One line for each image on the terminal, its file and its LaTeX, as soon as they are known. What can't be read is named
and passed by; the exit code is 1 then.
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from qwen_vl_kit.arguments import Parser, add_flag, add_model
from qwen_vl_kit.sentences import told

MOST_PIXELS = 100e6  # of the images that are open at once: 300 MB


def parse(arguments, prog):
    parser = Parser(prog, "Reads images of formulas.", usage="%(prog)s MODEL FILE ... [--OPTION VALUE ...]")
    add_model(parser)
    files = "images, PDF files, folders of them, or - for standard input"
    parser.add_argument("files", metavar="FILE", nargs="*", help=files)
    parser.add_argument("--output", type=Path, metavar="TABLE", help="write a table too: .csv, .jsonl or .md")
    add_flag(parser, "--resume", "continue that table where it was interrupted")
    add_flag(parser, "--clipboard", "read the image in the clipboard, and put its LaTeX there")
    wanted = parser.parse_args(arguments)
    if bool(wanted.files) == wanted.clipboard:
        parser.error("name images to read, or add --clipboard")
    if wanted.output and wanted.output.suffix.lower() not in (".csv", ".jsonl", ".md"):
        parser.error(f"--output {wanted.output} has to end in .csv, .jsonl or .md")
    if wanted.resume and not wanted.output:
        parser.error("--resume continues a table: name it with --output")
    return wanted


def main(arguments, prog):
    wanted = parse(arguments, prog)
    from qwen_vl_kit import environment

    environment.prepare()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it silently
    from qwen_vl_kit import images, loading, reader

    if wanted.clipboard:
        read_clipboard(wanted)
        return
    files = images.listed(wanted.files)
    if not any(file is None or file.exists() for _, file in files):  # before the model is loaded
        sys.exit("\n".join(f"{label}: there is no such file" for label, _ in files))
    if any(file and file.suffix.lower() == ".pdf" for _, file in files):
        print("Each page of a PDF file is read as one formula: cut formulas out of full pages.", file=sys.stderr)
    source = loading.find(wanted.model)
    table = open_table(wanted, source, files) if wanted.output else None
    reads = reader.load(wanted, source)
    try:
        failed = read_files(reads, files, table)
    except KeyboardInterrupt:
        kept = f" What was read is in {wanted.output}; --resume reads the rest." if wanted.output else ""
        print(f"\nStopped.{kept}", file=sys.stderr)
        os._exit(130)
    if failed:
        again = " When they are mended, --resume reads them." if wanted.output else ""
        sys.exit(f"{failed} of {len(files)} files could not be read, or not all of their pages.{again}")


def read_clipboard(wanted):
    import pyperclip

    from qwen_vl_kit import images, reader

    try:
        picture = images.from_clipboard()
    except images.Unusable as reason:
        sys.exit(f"Nothing was read: {reason}.")
    (reading,) = reader.load(wanted).read([picture])
    print(reading.text, flush=True)
    with told("Its LaTeX could not be put into the clipboard", pyperclip.PyperclipException):
        pyperclip.copy(reading.text)
    print("cut off at the length limit" if reading.cut else "copied", file=sys.stderr)


def open_table(wanted, source, files):
    """The table to write to; ends the program if it has all these files."""
    from qwen_vl_kit.reader import instruction_for
    from qwen_vl_kit.record import fingerprint_of_model
    from qwen_vl_kit.table import Table

    read_by = {"model": f"{source.name} ({fingerprint_of_model(source.model)})"}
    read_by |= {"instruction": instruction_for(source, wanted.instruction), "max_new_tokens": wanted.max_new_tokens}
    with told(f"Could not write {wanted.output}", OSError, ValueError):
        return Table(wanted.output, [label for label, _ in files], read_by, wanted.resume)


def read_files(reads, files, table):
    """Reads all pages of these files. Returns how many files could not be read, or not to their end."""
    from tqdm.auto import tqdm

    from qwen_vl_kit import images
    from qwen_vl_kit.table import on_one_line

    done, failed = table.done if table else set(), set()

    def pages():
        for label, file in files:
            bar.update()
            for page, picture in images.pages(label, file) if label not in done else ():
                if isinstance(picture, images.Unusable):
                    failed.add(label)
                    tqdm.write(f"{page}: {picture}", file=sys.stderr)
                elif page not in done:
                    yield page, picture

    def show(page, reading):
        tqdm.write(f"{page}\t{on_one_line(reading.text)}", file=sys.stdout)
        sys.stdout.flush()
        if reading.cut:
            tqdm.write(f"{page}: cut off after {reads.limit} tokens", file=sys.stderr)
        if table:
            table.add(page, reading)

    with (
        tqdm(total=len(files), desc="Reading", unit="file", disable=len(files) == 1 or None) as bar,
        told(f"Could not write {table.file}", OSError) if table else nullcontext(),
    ):
        for some in chunks(pages(), reads.batch_size):
            labels, pictures = zip(*some, strict=True)
            in_order(labels, reads.batches(pictures), show)
    if table and not failed:
        table.finish()
    return len(failed)


def chunks(pages, batch_size):
    """Lists of pages to be read together, a few batches if memory can hold them, so that those of like sizes can be."""
    some, pixels, most = [], 0, batch_size  # the first is one batch, for something to be seen soon
    for label, picture in pages:
        some.append((label, picture))
        pixels += picture.width * picture.height
        if len(some) == most or pixels > MOST_PIXELS:
            yield some
            some, pixels, most = [], 0, 4 * batch_size
    if some:
        yield some


def in_order(labels, batches, show):
    """Shows readings in the order of their labels, each as soon as all before it are known."""
    found, shown = {}, 0
    for readings in batches:
        found |= readings
        while shown in found:
            show(labels[shown], found.pop(shown))
            shown += 1
