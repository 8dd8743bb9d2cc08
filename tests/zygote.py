"""Runs the script again and again, each time in a process of its own that can be killed, without importing it all anew.

Reads lines [arguments, path of a log] from its standard input; answers each with the process's id, and then, once that
has ended, with its exit code (negative: the signal that killed it).
"""

import json
import os
import runpy
import sys

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import trl
from conftest import SCRIPT

trl.SFTTrainer, trl.SFTConfig, trl.TrlParser  # noqa: B018 (imported when first asked for)

for line in sys.stdin:
    arguments, log = json.loads(line)
    child = os.fork()
    if not child:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = [SCRIPT.name, *arguments]
        sys.path[0] = str(SCRIPT.parent)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
