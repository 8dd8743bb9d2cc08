"""How the kit ends a run: with one sentence that says what to do, and no traceback."""

import os
import sys
import time
from contextlib import contextmanager


def fail(sentence, end=sys.exit):
    """Ends the run with a sentence, the last thing on the terminal. `end` is what ends it, given the sentence."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(5)  # where all processes fail alike, the first says why, and the launcher ends the others meanwhile
    end(sentence)


def first_line(error):
    """What an error says, on one line, without the punctuation at its end."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:! ")


@contextmanager
def told(what, *errors):
    """Ends the program with a sentence, `what` and why, for errors of these kinds. All others keep their traceback."""
    try:
        yield
    except errors as error:
        sys.exit(f"{what}: {first_line(error)}.")
