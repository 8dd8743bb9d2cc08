"""Scores a model on held-out rows, without training; or two models on the same rows.

    python -m qwen_vl_kit score outputs
    python -m qwen_vl_kit score outputs --dataset_name scans.csv
    python -m qwen_vl_kit score outputs --against base

The rows, the scores, their intervals and the page are made as in a run. Of a run's model, the rows are the ones that
the run held out, unless others are named.
"""

import sys
from argparse import ArgumentTypeError
from math import inf
from pathlib import Path

from qwen_vl_kit.arguments import Parser, add_model, positive

SPLITS = ("test", "validation", "train")  # the first of these that there is


def parse(arguments, prog):
    parser = Parser(prog, "Scores a model on held-out rows.", usage="%(prog)s MODEL [--OPTION VALUE ...]")
    add_model(parser, limit=None)
    parser.add_argument(
        "--against", metavar="OTHER", help="another model, or base: the adapter's own; it reads the same rows"
    )
    parser.add_argument("--dataset_name", help="a hub name, a folder, or a file (default: that of the model's run)")
    parser.add_argument("--dataset_config", help="which configuration of the data set, if it has several")
    parser.add_argument("--dataset_test_split", help=f"the split (default: that of the run, or one of {SPLITS})")
    parser.add_argument("--image_folder", help="where the paths of images start (default: as in training)")
    parser.add_argument("--image_column", help="the column of images")
    parser.add_argument("--text_column", help="the column of their LaTeX")
    rows = "how many rows, or all (default: as many as the run held out, or 64)"
    parser.add_argument("--num_test_rows", type=number_or_all, metavar="N", help=rows)
    parser.add_argument("--seed", type=int, help="decides which rows (default: that of the run)")
    folder = "where the page and the numbers go (default: %(default)s)"
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/score"), help=folder)
    return parser.parse_args(arguments)


def number_or_all(text):
    try:
        return inf if text == "all" else positive(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}, or all") from None


def check_folder(folder):
    """Ends the program if there is something in the folder that is not ours to replace."""
    if folder.exists() and not (folder / "scores.json").is_file() and any(folder.iterdir()):
        sys.exit(f"{folder} holds other files: choose another --output_dir.")


def main(arguments, prog):
    wanted = parse(arguments, prog)
    check_folder(wanted.output_dir)
    from qwen_vl_kit import environment

    environment.prepare()
    from qwen_vl_kit import scoring

    scoring.score(wanted)
