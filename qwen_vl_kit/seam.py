"""Where the script and the kit meet: the decorator `step`, and which rooms wrap which step.

The script marks a function with `@step`, and a room that wants to wrap it has a function of the same name, whose first
argument is the step itself: it calls that before, after, between or in place of its own work. Rooms import the large
libraries, so they are imported when the first step is called, by then after Unsloth, which patches those libraries.
"""

import gc
from functools import cache, partial, wraps
from importlib import import_module

from qwen_vl_kit import environment

environment.prepare()
gc.disable()  # until all is imported: looking through a million objects that stay takes 2 s

# Each step, and the rooms that wrap it, the innermost first.
STEPS = {
    "split_batch": ["training", "parallel"],
    "read_options": ["options"],
    "load_processor": ["hub", "models", "record"],
    "load_splits": ["rows", "hub", "parallel"],
    "choose_rows": ["rows"],
    "order_rows": ["rows", "training", "record"],
    "load_model": ["models", "graphs", "parallel", "memory", "hub", "export"],
    "measure": ["memory"],
    "read": ["reading", "parallel"],
    "make_trainer": ["training", "trackers"],
    "save": ["reading", "checkpoints", "results", "report", "trackers", "export", "parallel", "lock"],
}


@cache
def rooms():
    """All rooms of STEPS, {name: module}: what one of them lacks is noticed at the first step, not after training."""
    found = {name: import_module(f"qwen_vl_kit.{name}") for names in STEPS.values() for name in names}
    gc.enable()
    gc.freeze()
    return found


def step(function):
    """Returns a step of the script, `function`, as the kit's rooms wrap it."""

    @wraps(function)
    def wrapped(*arguments, **options):
        inner = function
        for room in STEPS[function.__name__]:
            inner = partial(getattr(rooms()[room], function.__name__), inner)
        return inner(*arguments, **options)

    return wrapped
