"""Runs the script, or a module, again and again, each time in a process of its own, without importing libraries anew.

Reads lines of JSON from its standard input, each one thing to start: its `arguments`, the files `out` and `err` for its
outputs, and its `cwd`; for `python -m` also the `module`, and the `paths` that its imports and those of what it starts
are first looked for in. Answers each with the process's id, and then, once that has ended, with its exit code
(negative: the signal that killed it). No module of ours is imported here: each process imports its own.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "finetune_qwen_vl.py"

import bitsandbytes  # noqa: E402, F401
import datasets  # noqa: E402, F401
import peft  # noqa: E402, F401
import transformers  # noqa: E402
import trl  # noqa: E402
from transformers.models.qwen2_vl import modeling_qwen2_vl, processing_qwen2_vl  # noqa: E402, F401

trl.SFTTrainer, trl.SFTConfig, trl.TrlParser  # noqa: B018 (imported when first asked for)
transformers.AutoModelForImageTextToText, transformers.AutoProcessor, transformers.TextStreamer  # noqa: B018

# Else each process copies all of this memory when it collects garbage, at the latest at its end: 1.8 s of CPU for 0.5.
gc.collect()
gc.freeze()

for line in sys.stdin:
    what = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(what["cwd"])
        sys.stdin = open(os.devnull)  # noqa: SIM115
        os.dup2(sys.stdin.fileno(), 0)  # the server's is not for it to read
        for number, name in enumerate((what["out"], what["err"]), start=1):
            with open(name, "ab", buffering=0) as file:
                os.dup2(file.fileno(), number)
        if "module" in what:
            sys.path[:1] = what["paths"]
            os.environ["PYTHONPATH"] = os.pathsep.join(what["paths"][1:])
            sys.argv = [what["module"], *what["arguments"]]
            runpy.run_module(what["module"], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(SCRIPT.parent)
            sys.argv = [SCRIPT.name, *what["arguments"]]
            runpy.run_path(str(SCRIPT), run_name="__main__")
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
