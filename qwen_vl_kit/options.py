"""Options: checked before anything is loaded, each mistake told in a sentence, and `--help`.

Wraps `read_options`. What can't be done is said now rather than after hours of training.
"""

import inspect
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from qwen_vl_kit import checkpoints, export, offered, run
from qwen_vl_kit.sentences import fail

# What the trainer's own defaults would make of a run: held-out losses and checkpoints every 500 steps, NaN hidden from
# the log, a search for unused parameters in each step, and everything in the output folder pushed to the hub.
DEFAULTS = {
    "eval_steps": 0.2,
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,
    "ddp_find_unused_parameters": False,
    "hub_strategy": "end",
    "max_length": None,
    "load_best_model_at_end": None,  # wherever held-out losses are measured
}


@dataclass
class ExtraOptions:
    """What the kit can do beyond the script. The comment behind an option is its --help."""

    max_characters: int = 4000  # leave out rows whose LaTeX is longer: it would fill the memory
    save_merged: bool = False  # at the end, also write base and adapters as one 16-bit model
    save_gguf: str | None = None  # at the end, also write that for llama.cpp and Ollama: q8_0, ...


def comments(settings_class):
    """{field: the comment behind it} of a dataclass, from its source. Empty where that is not at hand."""
    try:
        source = inspect.getsource(settings_class)
    except (OSError, TypeError):
        return {}
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))


def help_of(classes):
    """The same for all fields of these classes and their ancestors, but for the trainer's, which bring their own."""
    found = {}
    for ancestor in (ancestor for owner in classes for ancestor in reversed(owner.__mro__)):
        if ancestor.__module__.split(".")[0] not in ("trl", "transformers", "unsloth"):
            found |= comments(ancestor)
    return found


class Parser(TrlParser):
    """TRL's parser with our defaults and help; numbers in a config file are checked like those of the command line."""

    def __init__(self, classes):
        usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"
        super().__init__(classes, usage=usage, allow_abbrev=False)
        ours = help_of(classes)
        for action in self._actions:  # argparse has no public list of its options; TRL's parser reads this one, too
            action.help = ours.get(action.dest, action.help or "").replace(" %", " %%")
        self.set_defaults(**DEFAULTS)
        offered.hide(self)

    def parse_known_args(self, *arguments, **more):
        options, unknown = super().parse_known_args(*arguments, **more)
        offered.check(options, self.usual, self.error)
        return options, unknown

    def set_defaults_with_config(self, **config):
        typed = {key: str(value) if isinstance(value, (bool, int, float)) else value for key, value in config.items()}
        return super().set_defaults_with_config(**typed)

    def error(self, message):
        fail(message, super().error)


def parse(options_class, arguments):
    """The options of the script and the kit's own, and the parser, whose `error` ends the run with a sentence."""
    parser = Parser([options_class, ExtraOptions])
    try:
        options, extra, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    except IndexError:
        parser.error("--config needs the name of a YAML file")
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))
    if unknown:  # without their values: one can be a token
        names = " ".join(word.split("=")[0] for word in unknown if word.startswith("-"))
        parser.error(f"unknown option {names or unknown[0]} (--help lists them all)")
    return options, extra, parser


def find_checkpoint(options):
    """The checkpoint to resume from: what the option names, for "true" the last one if there is any, or None."""
    checkpoint = options.resume_from_checkpoint
    if checkpoint and checkpoint.lower() == "true":
        checkpoint = get_last_checkpoint(options.output_dir)
        there_is_none = f"There is no checkpoint in {options.output_dir} yet: starting from the beginning"
        print(f"Resuming from {checkpoint}" if checkpoint else there_is_none)
    return checkpoint


def check_numbers(options, error):
    """Calls `error` with a sentence for a number that no run can have."""
    if options.num_train_epochs < 0 or (options.max_steps < 1 and not options.num_train_epochs):
        error("--max_steps must be at least 1, unless --num_train_epochs is above 0")
    if options.num_test_rows < 1:
        error("--num_test_rows must be at least 1: without held-out rows there is nothing to measure")
    for name in ("test_batch_size", "max_new_tokens", "lora_r", "min_pixels", "max_pixels", "max_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            error(f"--{name} must be at least 1, not {value}")


def read_options(step, options_class, arguments):
    options, extra, parser = parse(options_class, arguments)
    check_numbers(options, parser.error)
    offered.check_possible(options, parser.error)
    if options.hub_token:  # the libraries take it from here, too; as an option it would be saved with checkpoints
        os.environ["HF_TOKEN"], options.hub_token = options.hub_token, None
    best = options.eval_strategy != "no" and options.save_strategy != "no"
    if best and options.load_best_model_at_end is not False:  # the checkpoint of the lowest loss is kept
        options.save_strategy, options.save_steps = options.eval_strategy, options.eval_steps
        options.load_best_model_at_end, options.metric_for_best_model, options.greater_is_better = True, "loss", False
        options.save_total_limit = options.save_total_limit and max(options.save_total_limit, 2)  # the best, the last
    outputs = Path(options.output_dir)
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"can't write to {outputs} ({error.strerror}): choose another folder with --output_dir")
    options.resume_from_checkpoint = checkpoint = find_checkpoint(options)
    if checkpoint and not Path(checkpoint, "trainer_state.json").is_file():
        parser.error(
            f"there is no checkpoint {checkpoint} to resume from: start anew, without --resume_from_checkpoint"
        )
    checkpoints.check(outputs, checkpoint, 0 if options.num_train_epochs else options.max_steps, parser.error)
    run.options, run.extra = options, extra
    if options.process_index == 0:
        run.exports = export.prepare(options, extra)
    run.notes["settings"] = {field.name: getattr(extra, field.name) for field in fields(extra)}
    return options
