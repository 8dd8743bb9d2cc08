"""Runs the script again and again, each time in a process of its own, without importing all libraries anew.

Reads lines of JSON, [arguments, path for its output, path for its errors], from its standard input. Answers each with
the process's id, and then, once that has ended, with its exit code (negative: the signal that killed it).
"""

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

for line in sys.stdin:
    arguments, *files = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in enumerate(files, start=1):
            with open(name, "ab", buffering=0) as file:
                os.dup2(file.fileno(), number)
        sys.argv = [SCRIPT.name, *arguments]
        sys.path[0] = str(SCRIPT.parent)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
