"""What the commands of `python -m qwen_vl_kit` share on their command lines.

It wraps no step, and imports nothing large: a mistake, or `--help`, is answered at once.
"""

import argparse
from difflib import get_close_matches

FLAG = {"nargs": "?", "const": True, "metavar": "true|false"}


class Parser(argparse.ArgumentParser):
    """Takes `--save-merged=true` for `--save_merged true`, as TRL's options are spelled, and no abbreviations."""

    def __init__(self, prog, what, **how):
        super().__init__(prog=prog, description=what, allow_abbrev=False, **how)

    def parse_args(self, arguments):
        options, unknown = self.parse_known_args([with_underscores(word) for word in arguments])
        if unknown:
            names = [word.partition("=")[0] for word in unknown if word.startswith("-")] or unknown[:1]
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown option {' '.join(names)}{meant(names[0], known)} (see --help)")
        return options


def with_underscores(word):
    option, equals, value = word.partition("=")
    return f"--{option[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def meant(word, known):
    """`; did you mean X?`, X being what is most like `word` of those `known`, or "" if nothing is."""
    if word.startswith("-") != next(iter(known)).startswith("-"):  # a value among options
        return ""
    bare, word = {name.strip("-"): name for name in known}, word.strip("-").replace("-", "_")
    within = sorted((not name.startswith(word), len(name), name) for name in bare if len(word) > 3 and word in name)
    close = get_close_matches(word, bare, 1, 0.7) or [name for *_, name in within]
    return f"; did you mean {bare[close[0]]}?" if close else ""


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number above 0, not {text!r}")
    return int(text)


def add_flag(parser, name, what, default=False):
    parser.add_argument(name, type=true_or_false, default=default, help=what, **FLAG)


def add_model(parser, limit=512, batches=True):
    """The arguments that say which model reads, and how (see `reader.load`); with `batches`, how many at once, too."""
    what = "the --output_dir of a run, the folder of an adapter or a model, or a name on the hub"
    parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument("--instruction", help="what the model is asked (default: what it was trained with)")
    tokens = f"token limit of a reading (default: {limit or 'as in training, and no true formula is cut'})"
    parser.add_argument("--max_new_tokens", type=positive, default=limit, metavar="N", help=tokens)
    if batches:
        batch = "images to read at once (default: 64 on a GPU, 16 without; halved where the memory does not hold them)"
        parser.add_argument("--batch_size", type=positive, metavar="N", help=batch)
    add_flag(parser, "--load_in_4bit", "weights in 4 bits (default: as in training, else as they are stored)", None)
    add_flag(parser, "--cuda_graphs", "on a GPU, launch all of a token's work at once (default: true)", True)
