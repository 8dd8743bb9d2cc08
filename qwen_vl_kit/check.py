"""Looks at a data set as a run would, before a GPU is rented: no GPU, no model, no network for what is here.

    python -m qwen_vl_kit check --dataset_name scans.csv

It wraps no step. Options are named as in training, and mean the same.
"""

import sys
from pathlib import Path

from qwen_vl_kit.arguments import Parser, positive


def parse(arguments, prog):
    parser = Parser(
        prog, "Looks at a data set as a run would.", usage="%(prog)s --dataset_name NAME [--OPTION VALUE ...]"
    )
    parser.add_argument("--dataset_name", required=True, help="a hub name, a folder, or a file")
    parser.add_argument("--dataset_config", help="which configuration of the data set, if it has several")
    parser.add_argument("--image_folder", help="where the paths of images start")
    parser.add_argument("--image_column", default="image", help="the column of images")
    parser.add_argument("--text_column", default="text", help="the column of their LaTeX")
    parser.add_argument("--dataset_train_split", default="train", help="the split to train on")
    parser.add_argument("--dataset_test_split", default="test", help="the split to measure on")
    tokens = "a model that counts its tokens (default: none, and they are about those of Qwen2-VL)"
    parser.add_argument("--model_name_or_path", metavar="MODEL", help=tokens)
    parser.add_argument("--max_length", type=positive, metavar="N", help="rows of more tokens are left out")
    parser.add_argument("--max_characters", type=positive, default=4000, metavar="N", help="the same of characters")
    parser.add_argument("--min_pixels", type=positive, default=30_000, help="smaller images are enlarged to this area")
    parser.add_argument("--max_pixels", type=positive, help="larger images are shrunk to this area")
    page = "where the page goes (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("outputs/check.html"), metavar="FILE.html", help=page)
    return parser.parse_args(arguments)


def main(arguments, prog):
    wanted = parse(arguments, prog)
    if wanted.output.suffix.lower() not in (".html", ".htm"):  # it would be replaced
        sys.exit(f"--output {wanted.output} is to be an HTML page: let its name end in .html.")
    from qwen_vl_kit import environment

    environment.prepare()
    from qwen_vl_kit import checking

    if not checking.check(wanted):
        sys.exit(1)
