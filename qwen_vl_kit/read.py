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
    if wanted.files and wanted.clipboard:
        parser.error("--clipboard takes no files: give one or the other")
    if not (wanted.files or wanted.clipboard):
        parser.error("name images to read, or add --clipboard")
    if "" in wanted.files:
        parser.error("one of the files has an empty name")
    if wanted.output and wanted.output.suffix.lower() not in (".csv", ".jsonl", ".md"):
        parser.error(f"--output {wanted.output} has to end in .csv, .jsonl or .md")
    if wanted.output and wanted.clipboard:
        parser.error("--output is for files, not for --clipboard")
    if wanted.resume and not wanted.output:
        parser.error("--resume continues a table: name it with --output")
    if wanted.output and wanted.output.exists() and not wanted.resume:
        sys.exit(f"{wanted.output} is there already: choose another --output, or continue it with --resume.")
    if wanted.files and not any(name == "-" or os.path.exists(name) for name in wanted.files):
        sys.exit("\n".join(f"{name}: there is no such file" for name in wanted.files))
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
    if any(file and file.suffix.lower() == ".pdf" for _, file in files):
        print("Each page of a PDF file is read as one formula: cut formulas out of full pages.", file=sys.stderr)
    source = loading.find(wanted.model)
    table = open_table(wanted, source) if wanted.output else None
    if table and {label for label, _ in files} <= table.done:
        table.finish(complete=True)
        print(f"{wanted.output} has them all.", file=sys.stderr)
        return
    reads = reader.load(wanted, source)
    try:
        failed = read_files(reads, files, table)
    except KeyboardInterrupt:
        kept = f" {wanted.output} keeps what it has; --resume reads the rest." if wanted.output else ""
        print(f"\nStopped.{kept}", file=sys.stderr)
        os._exit(130)
    if failed:
        again = " Fix them, and run the same command with --resume." if wanted.output else ""
        sys.exit(f"{failed} of {len(files)} files could not be read completely.{again}")


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


def open_table(wanted, source):
    """The table to write to, for what its readings depend on."""
    from qwen_vl_kit import loading
    from qwen_vl_kit.reader import in_4_bits, instruction_for
    from qwen_vl_kit.record import fingerprint_of_model
    from qwen_vl_kit.table import Table

    names = [source.model] + [loading.base_of(Path(source.model))] * source.is_adapter
    read_by = {
        "model": " on ".join(f"{name} ({fingerprint_of_model(name)})" for name in names),
        "load_in_4bit": in_4_bits(source, wanted.load_in_4bit),
        "instruction": instruction_for(source, wanted.instruction),
        "max_new_tokens": wanted.max_new_tokens,
        "folder": os.getcwd(),  # where the names of files start
    }
    return Table(wanted.output, read_by, wanted.resume)


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
        if table:
            with told(f"Could not write {table.file}", OSError):
                table.add(page, reading)
        tqdm.write(f"{page}\t{on_one_line(reading.text)}", file=sys.stdout)
        sys.stdout.flush()
        if reading.cut:
            tqdm.write(f"{page}: cut off after {reads.limit} tokens", file=sys.stderr)

    with tqdm(total=len(files), desc="Reading", unit="file", disable=len(files) == 1 or None) as bar:
        for some in chunks(pages(), reads.batch_size):
            labels, pictures = zip(*some, strict=True)
            in_order(labels, reads.batches(pictures), show)
    if table:
        table.finish(complete=not failed)
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
