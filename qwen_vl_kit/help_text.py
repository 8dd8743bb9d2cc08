"""What the script's `--help` and `--help_all` say.

Wraps no step: the room `options` asks it. `--help` has the script's settings, the kit's options and those of TRL's
trainer that people change, one line each; `--help_all` has all that are offered, as argparse lists them.
"""

import inspect
import re
import shutil
import sys
from argparse import SUPPRESS, Action
from textwrap import wrap

# What these do here, where TRL's own help says something else, or more than fits on a line.
HELP = {
    "max_length": "leave out rows of more tokens than this",
    "lr_scheduler_type": "how the learning rate falls: linear, cosine, constant, ...",
    "max_grad_norm": "scale larger gradients down to this norm; 0: never",
    "eval_strategy": "when to measure the validation loss: no, steps or epoch",
    "eval_steps": "steps between two validation losses; below 1: share of the run",
    "load_best_model_at_end": "make the checkpoint with the lowest validation loss the adapter; needs --eval_strategy",
    "save_strategy": "when to save checkpoints: steps, epoch or no",
    "save_total_limit": "how many checkpoints to keep",
    "dataloader_num_workers": "processes that prepare samples beside the one that trains",
    "report_to": "trackers, besides the report: tensorboard, wandb, trackio",
    "run_name": "what the tracker calls the run",
    "push_to_hub": "at the end, upload the adapter to --hub_model_id",
    "hub_model_id": "the adapter's repository on the hub, owner/name",
    "optim_args": "more arguments for the optimizer, as name=value,name=value",
    "loss_type": "chunked_nll (the default), nll, or dft",
}
# Of the trainer's options those that people change. The script's settings and the kit's options are in --help anyway.
OFTEN = (
    "lr_scheduler_type", "max_grad_norm", "max_length", "eval_strategy", "eval_steps", "save_strategy",
    "save_total_limit", "dataloader_num_workers", "report_to", "run_name", "push_to_hub", "hub_model_id",
)  # fmt: skip
THEIRS = ("trl", "transformers", "unsloth", "builtins")
NAMES = 29  # columns for an option's name; after a longer one the text begins on the next line


def comments(settings_class):
    """{field: the comment after it} of a dataclass, from its source. Empty where that is not at hand."""
    try:
        source = inspect.getsource(settings_class)
    except (OSError, TypeError):
        return {}
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))


def own(owner):
    """{option: what it does} of a class and its ancestors, in their order, but for the trainer's, which bring texts."""
    ours = [part for part in reversed(owner.__mro__) if part.__module__.split(".")[0] not in THEIRS]
    texts = [dict.fromkeys(vars(part).get("__annotations__", ()), "") | comments(part) for part in ours]
    return {name: text for part in texts for name, text in part.items()}


class HelpAll(Action):
    """`--help_all`: all options, as argparse lists them."""

    def __call__(self, parser, *_):
        print(parser.format_all())
        sys.exit()


def give(parser, classes):
    """Has each option of a parser say what it does, once, under the name with underscores."""
    ours = {name: text for owner in classes for name, text in own(owner).items()} | HELP
    for action in parser._actions:  # argparse has no public list of its options; TRL's parser reads this one, too
        action.help = ours.get(action.dest, action.help or "").replace(" %", " %%")
        if action.option_strings[0].startswith("--no_"):  # the same as --name false
            action.help = SUPPRESS
        elif action.dest != "help":  # found by both spellings all the same
            action.option_strings = action.option_strings[:1]
            action.metavar = None if action.choices else action.dest.rpartition("_")[2].upper()


def short(parser, script, kit):
    """The text of `--help`: `script` and `kit` are the classes whose options are all in it."""
    width = max(60, shutil.get_terminal_size((100, 45)).columns) - 1
    actions = {action.dest: action for action in reversed(parser._actions) if action.help != SUPPRESS}
    kit = [name for name in kit if name in actions]
    settings = [name for name in script if name in actions and name not in OFTEN]
    lines = [f"usage: {parser.prog} [--config FILE.yaml] [--OPTION VALUE ...]"]
    lines += ["Teaches a vision-language model to read formulas, and measures the difference.", ""]
    for title, names in (("", settings), ("The kit's:", kit), ("The trainer's:", OFTEN)):
        lines += [title] * bool(title)
        for name in names:
            lines += entry(f"--{name}", f"{actions[name].help.replace('%%', '%')}{usually(actions[name])}", width)
    lines += entry("--config", "a YAML file of options: demo/config.yaml, or the config.yaml of a run", width)
    lines += entry("--help_all", "all options, those of TRL's trainer that few people change, too", width)
    return "\n".join(lines) + "\n"


def usually(action):
    """The default of an option in brackets; nothing where that is None or empty, which its text is to explain."""
    value = getattr(action.default, "value", action.default)
    if value is None or value == []:
        return ""
    return f" [{str(value).lower() if isinstance(value, bool) else value}]"


def entry(name, text, width):
    """The lines for one option."""
    first, *others = wrap(text, width - NAMES - 1, break_on_hyphens=False) or [""]  # without the source, no text
    column = " " * (NAMES + 1)
    head = [name.ljust(NAMES) + " " + first] if len(name) <= NAMES else [name, column + first]
    return head + [column + line for line in others]
