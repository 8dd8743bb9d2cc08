"""Make `demo/model` and `demo/data` again from nothing.

    python demo/make_demo.py                # both; the model wants a GPU
    python demo/make_demo.py --only data    # the data set alone: seconds, no PyTorch
    python demo/make_demo.py --only model   # the base model alone

What comes out:

- `demo/model`: a Qwen2-VL of the true architecture (2 x 2 merging, M-RoPE, the chat template and special tokens of the
  real one; patches of 7 pixels, since print is small), 9.5 million parameters, trained here from scratch to read
  *printed* formulas, drawn as a public printed set was drawn and with the statistics of its formulas, but with none of
  its texts and images. The one in the repository took 7.5 minutes on an H200, with 15 processes drawing (5,062
  steps, 1.7 million samples; `--seconds 470 --measure 500`).
- `demo/data`: photographs of a school's blackboard, chalk on green. The base model can't read them, and fine-tuning
  has to teach it. `train` and `test` in the layout of the Hugging Face hub.

The work is done in `maker/`, whose first lines say what is where. Needs what the project needs, and matplotlib; the
model needs pdflatex too (`apt-get install texlive-latex-base`), and the data set whose statistics it gets.
"""

import argparse
import os
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

DEMO = Path(__file__).resolve().parent
sys.path[:0] = [str(DEMO), str(DEMO.parent)]


def add_fields(parser, title, dataclass):
    """An option for each field of a dataclass."""
    group = parser.add_argument_group(title)
    for field in fields(dataclass):
        kind = (lambda word: word.lower() in ("1", "true", "yes")) if field.type is bool else field.type
        group.add_argument(f"--{field.name}", type=kind, help=f"default: {field.default}")


def chosen(args, dataclass):
    """What the command line says of a dataclass's fields."""
    values = {field.name: getattr(args, field.name, None) for field in fields(dataclass)}
    return {name: value for name, value in values.items() if value is not None}


def make_model(args):
    from datasets import load_dataset
    from maker import blank, training

    splits = load_dataset(args.formulas)
    recipe = replace(training.Recipe(), **chosen(args, training.Recipe))
    shape = replace(blank.Shape(), **chosen(args, blank.Shape))
    measured = []
    if args.measure:
        rows = splits["test"].select(range(min(args.measure, len(splits["test"]))))
        measured.append(("real", rows["image"], list(rows["text"])))
    texts, forbidden = list(splits["train"]["text"]), list(splits["test"]["text"])
    training.train(args.out / "model", texts, forbidden, recipe, shape, args.start, measured)


def main():
    parser = argparse.ArgumentParser(description="Make demo/model and demo/data again from nothing.")
    parser.add_argument("--only", choices=["data", "model"], help="make one of them (default: both)")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder that gets `model` and `data`")
    parser.add_argument(
        "--formulas", default="linxy/LaTeX_OCR", help="hub name or folder of the set with the statistics"
    )
    parser.add_argument("--measure", type=int, default=0, help="how many of its test images to measure with")
    parser.add_argument("--start", type=Path, help="a model to train on, in place of a new one")
    parser.add_argument("--train_rows", type=int, default=7000)
    parser.add_argument("--test_rows", type=int, default=200)
    wants_model = "data" not in sys.argv
    if wants_model:
        from maker import blank, training

        add_fields(parser, "how the model is trained", training.Recipe)
        add_fields(parser, "the model", blank.Shape)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only != "model":
        from maker import rows

        began = time.time()
        workers = max(os.cpu_count() - 1, 1)
        rows.make_data(args.out / "data", args.train_rows, args.test_rows, 3407, workers)
        print(f"the data took {time.time() - began:.0f} s on {workers} processes")
    if args.only != "data":
        make_model(args)


if __name__ == "__main__":
    main()
