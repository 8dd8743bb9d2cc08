"""`python -m qwen_vl_kit`, or `qwen-vl-kit` where it is installed: what comes after a run, one command for each room.

A command is a module of this package with a function `main(arguments, prog)`; a line in COMMANDS is all it takes. It is
imported only when it is asked for.
"""

import sys
from importlib import import_module
from pathlib import Path

from qwen_vl_kit.arguments import meant

COMMANDS = {
    "check": "look at a data set before training on it: bad rows, lengths, duplicates, spellings",
    "read": "read images of formulas, from files, folders, PDF pages or the clipboard",
    "page": "open a page in the browser that reads images of formulas",
    "score": "score a model on held-out rows, or two models side by side",
    "report": "make the page, the scores and the model card of a run, or compare two runs",
    "export": "merge the adapter into its base model, convert it to GGUF, push it to the hub",
}


def main():
    prog = "qwen-vl-kit" if Path(sys.argv[0]).stem == "qwen-vl-kit" else f"python -m {__package__}"
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        print(f"usage: {prog} COMMAND ... [--OPTION VALUE ...]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:<8} {what}")
        print(f"\n{prog} COMMAND --help lists the options of one.")
    elif command not in COMMANDS:
        hint = meant(command, COMMANDS) or f"; choose from {', '.join(COMMANDS)}."
        print(f"{prog}: unknown command {command!r}{hint}", file=sys.stderr)
        sys.exit(2)
    else:
        import_module(f"{__package__}.{command}").main(arguments, f"{prog} {command}")


if __name__ == "__main__":
    main()
