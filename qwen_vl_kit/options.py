"""Options: checked before anything is loaded, each mistake told in a sentence.

Wraps `read_options`. What can't be done is said now rather than after hours of training.
"""

import math
import os
import re
from argparse import SUPPRESS
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml
from accelerate.utils import gather_object
from trl import TrlParser

from qwen_vl_kit import checkpoints, export, help_text, lock, offered, recipe, record, run
from qwen_vl_kit.arguments import meant
from qwen_vl_kit.sentences import fail

# What the trainer's own defaults would make of a run: losses and checkpoints every 500 steps, NaN hidden from the log,
# a search for unused parameters in each step, and everything in the output folder pushed to the hub.
DEFAULTS = {
    "eval_steps": 0.2,
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,
    "ddp_find_unused_parameters": False,
    "hub_strategy": "end",
    "max_length": None,
    "load_best_model_at_end": None,  # wherever validation losses are measured
}


@dataclass
class ExtraOptions:
    """What the kit can do beyond the script. The comment after an option is its --help."""

    max_characters: int = 4000  # leave out rows whose LaTeX is longer: it would fill the memory
    image_folder: str | None = None  # where image paths start; None: the data file's or the working folder
    save_merged: bool = False  # at the end, also write base and adapters as one 16-bit model
    save_gguf: str | None = None  # at the end, also write it as GGUF, for llama.cpp and Ollama: q8_0, ...
    normalize_latex: bool = False  # write all formulas, held-out ones too, in one spelling
    num_validation_rows: int | None = None  # rows for the validation loss; None: num_test_rows
    early_stopping_patience: int | None = None  # stop after so many validation losses in a row without improvement
    cuda_graphs: str = "auto"  # launch each layer stack at once on a GPU: auto, true, false


class Parser(TrlParser):
    """TRL's parser with our defaults and help; numbers in a config file are checked like those of the command line."""

    def __init__(self, classes):
        super().__init__(classes, usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]", allow_abbrev=False)
        self.classes = classes
        self.set_defaults(**DEFAULTS)
        help_text.give(self, classes)
        offered.hide(self)
        hidden = {"nargs": 0, "dest": SUPPRESS, "default": SUPPRESS, "help": SUPPRESS}
        self.add_argument("--help_all", "--help-all", action=help_text.HelpAll, **hidden)
        self.unset = vars(super().parse_known_args([])[0])  # what a command line that sets nothing comes to

    def format_help(self):
        return help_text.short(self, *map(help_text.own, self.classes))

    def format_all(self):
        return super().format_help()

    def parse_known_args(self, *arguments, **more):
        options, unknown = super().parse_known_args(*arguments, **more)
        self.given = {**vars(options)}
        if (options.num_validation_rows or options.early_stopping_patience) and options.eval_strategy in offered.UNSET:
            options.eval_strategy = "steps"  # else what they ask for would never happen
        offered.check(options, self.usual, self.error)
        return options, unknown

    def set_defaults_with_config(self, **config):
        config = {str(key).replace("-", "_"): value for key, value in config.items()}
        typed = {key: str(value) if isinstance(value, (bool, int, float)) else value for key, value in config.items()}
        typed |= {
            key: "no" for key, value in config.items() if value is False and key.endswith("_strategy")
        }  # YAML's no
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
        names = [word.split("=")[0] for word in unknown if word.startswith("-")] or unknown[:1]
        hint = meant(names[0], [f"--{name}" for name in parser.usual if name not in offered.REFUSED])
        parser.error(f"unknown option {' '.join(names)}{hint} (see --help and --help_all)")
    return options, extra, parser


def check_numbers(options, extra, error):
    """Calls `error` with a sentence for a number that no run can have."""
    if extra.early_stopping_patience is not None and extra.early_stopping_patience < 1:
        error(f"--early_stopping_patience must be at least 1, not {extra.early_stopping_patience}")
    if extra.early_stopping_patience and (options.save_strategy == "no" or options.load_best_model_at_end is False):
        error(
            "--early_stopping_patience needs the best checkpoint: leave out --save_strategy no and "
            "--load_best_model_at_end false"
        )
    extra.cuda_graphs = extra.cuda_graphs.lower()
    if extra.cuda_graphs not in ("auto", "true", "false"):
        error(f"--cuda_graphs must be auto, true or false, not {extra.cuda_graphs}")
    if extra.cuda_graphs == "true" and (options.use_cpu or not torch.cuda.is_available()):
        error("--cuda_graphs true needs an NVIDIA GPU: leave it out")
    if (extra.num_validation_rows or 0) < 0 or (extra.num_validation_rows == 0 and options.eval_strategy != "no"):
        error("--num_validation_rows must be at least 1: losses on the way need rows of their own")
    if not 0 <= options.num_train_epochs < math.inf or (options.max_steps < 1 and not options.num_train_epochs):
        error("--max_steps must be at least 1, unless --num_train_epochs is above 0")
    if options.num_test_rows < 1:
        error("--num_test_rows must be at least 1: without held-out rows there is nothing to measure")
    for name, low, high in (
        ("seed", 0, 2**32 - 1), ("temperature", 1e-6, math.inf), ("min_p", 0, 1), ("lora_dropout", 0, 0.999),
        ("dataloader_num_workers", 0, 1024), ("logging_steps", 1e-6, math.inf), ("save_steps", 1e-6, math.inf),
    ):  # fmt: skip
        if not low <= getattr(options, name) <= high:
            error(f"--{name} must lie between {low} and {high}, not be {getattr(options, name)}")
    least = options.min_pixels if options.min_pixels != type(options).min_pixels else 0
    if least and options.max_pixels and least > options.max_pixels:
        error(f"--min_pixels {least} is more than --max_pixels {options.max_pixels}")
    try:
        re.compile(options.lora_target_modules or "")
    except re.error as reason:
        error(f"--lora_target_modules is no regular expression: {reason}")
    for name in ("test_batch_size", "max_new_tokens", "lora_r", "lora_alpha", "min_pixels", "max_pixels", "max_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            error(f"--{name} must be at least 1, not {value}")


def read_options(step, options_class, arguments):
    options, extra, parser = parse(options_class, arguments)
    check_numbers(options, extra, parser.error)
    offered.check_possible(options, parser.error)
    if options.hub_token:  # the libraries take it from here, too; as an option it would be saved with checkpoints
        os.environ["HF_TOKEN"], options.hub_token = options.hub_token, None
    if extra.num_validation_rows is None:
        extra.num_validation_rows = 0 if options.eval_strategy == "no" else options.num_test_rows
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
    with options.main_process_first():
        if options.process_index == 0:
            lock.take(outputs, parser.error)
            checkpoints.put_back(outputs)
        options.resume_from_checkpoint = checkpoint = checkpoints.find(options, parser.error)
    if len({*gather_object([checkpoints.record_of(checkpoint)["step"] if checkpoint else 0])}) > 1:
        parser.error(f"not every process finds {checkpoint}: put --output_dir where all machines see it")
    checkpoints.check(outputs, checkpoint, parser.error)
    run.options, run.extra = options, extra
    record.begin(options, extra, checkpoint, parser.error)
    if checkpoint and not options.num_train_epochs:  # else how many steps that is depends on the rows
        checkpoints.check_steps(options, extra)
    if checkpoint:
        record.announce(checkpoint)
    if options.process_index == 0:
        run.exports = export.prepare(options, extra)
    run.notes |= recipe.note(parser.given, parser.unset, options.world_size)
    run.notes["settings"] = {field.name: getattr(extra, field.name) for field in fields(extra)}
    return options
