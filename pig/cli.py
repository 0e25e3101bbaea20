"""The one command line: `python -m pig.cli COMMAND`; `python -m pig.cli COMMAND --help` lists a command's arguments."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from typing import Any

from pig.errors import InputError, run_command
from pig.processes import die_with_parent

LIGHTNING = ("fit", "validate", "test", "predict")
# Command -> the function that does it, imported when it runs, and what it is for.
COMMANDS = {
    "generate": ("pig.commands.generate:generate", "draw a subject with any model, or a whole benchmark"),
    "tune": ("pig.commands.tune:tune", "tune a model for each subject of a folder: --config FILE --subjects DIR"),
    "app": ("pig.commands.app.serve:app", "draw on a page in the browser"),
    "attention": ("pig.commands.attention:attention", "which parts of a picture each word of its prompt looks at"),
    "cost": ("pig.commands.cost:cost", "measure a picture's seconds, FLOPs and memory"),
    "evaluate": ("pig.evaluation.benchmark:evaluate", "score a folder of generated images: tables and a report"),
    "compare": (
        "pig.evaluation.compare:compare",
        "compare results of `evaluate`: paired differences, images side by side",
    ),
    "study": ("pig.evaluation.study:study", "a blind study of two results with people"),
    "tournament": ("pig.commands.tournament.run:tournament", "train, draw, score and compare all methods: FILE.yaml"),
    "export": ("pig.commands.export:export", "write a checkpoint, model or authors' release as a model folder"),
}
# Names of the command line that are gone: command -> flag -> what to give instead.
GONE = {"generate": {"text_only": "--model base:NAME"}}


def overview() -> str:
    """All commands, a line each."""
    rows = {" | ".join(LIGHTNING): "run an experiment: --config FILE; --model.X, --data.X, --trainer.X override it"}
    rows |= {name: what for name, (_, what) in COMMANDS.items()}
    lines = [f"  {name:<33} {what}" for name, what in rows.items()]
    return "\n".join(["python -m pig.cli COMMAND ...", "", *lines, "", str(__doc__).partition("; ")[2]])


def run(args: list[str]) -> Any:
    command = args[0] if args else "--help"
    if command in COMMANDS:
        for flag, instead in GONE.get(command, {}).items():
            if any(re.match(rf"--{flag}(=|$)", word.replace("-", "_").replace("__", "--", 1)) for word in args):
                raise InputError(f"--{flag} is gone: give {instead}")
        if command == "tune":  # whose arguments are an experiment's, as those of `fit`
            from pig.commands.tune import tune

            return tune([re.sub("^--print-memory", "--print_memory", word) for word in args[1:]])
        from pig.arguments import parse  # not for --help

        function, values = parse(f"python -m pig.cli {command}", COMMANDS[command][0], args[1:])
        return function(**values)
    if command in ("-h", "--help"):
        print(overview())
        return None
    if not command.startswith("-") and command not in LIGHTNING:
        raise InputError(f"no command {command!r}; there are: {', '.join((*LIGHTNING, *COMMANDS))}")
    from pig.commands import fit  # Lightning takes seconds to import

    try:
        return fit.run([re.sub("^--print-memory", "--print_memory", word) for word in args])
    except fit.StoppedError:
        print("stopped by SIGTERM; go on with --ckpt_path and the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


def main() -> None:
    """Exit code 2 for bad input, with its message."""
    if "LOCAL_RANK" in os.environ:
        # One of several processes: if the one that started it is killed, it would wait for it in the next exchange.
        die_with_parent()
    logging.basicConfig(format="%(levelname)s %(message)s")
    run_command(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
