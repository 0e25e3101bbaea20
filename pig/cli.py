"""The one command line: `python -m pig.cli COMMAND`; `python -m pig.cli COMMAND --help` lists a command's arguments."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import transformers
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pig.arguments import parse
from pig.data.modules import PersonalisationData
from pig.errors import InputError, find_input_error
from pig.training.checkpoints import load_checkpoint
from pig.training.memory import print_memory
from pig.training.module import PersonalisationModule

PR_SET_PDEATHSIG = 1

# `${run}` means the config's own top level, below whichever subcommand; `omegaconf+` resolves after all overrides.
jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)

LIGHTNING = ("fit", "validate", "test", "predict")
# Command -> the function that does it, imported when it runs, and what it is for.
COMMANDS = {
    "generate": ("pig.commands.generate:generate", "draw a subject with any model, or a whole benchmark"),
    "app": ("pig.commands.app.serve:app", "the same on a page in the browser"),
    "evaluate": ("pig.evaluation.benchmark:evaluate", "score a folder of generated images: tables and a report"),
    "compare": ("pig.evaluation.compare:compare", "two of these results: paired differences, images side by side"),
    "study": ("pig.evaluation.study:study", "two of these results before people's eyes"),
    "export": ("pig.commands.export:export", "a checkpoint or a model -> a model folder, whole or as a delta"),
}
# Names of the command line that are gone: command -> flag -> what to give instead.
GONE = {"generate": {"text_only": "--model base:NAME"}}


class CLI(LightningCLI):
    """LightningCLI in subclass mode with the omegaconf parser, so that configs may interpolate."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(
            PersonalisationModule,
            PersonalisationData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_kwargs={"parser_mode": "omegaconf+", "description": __doc__},
            save_config_kwargs={"overwrite": True},
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", default="runs/run", help="folder of this run, which configs refer to as ${run}")
        parser.add_argument("--print_memory", action="store_true", help="first say what the training takes of memory")

    def before_fit(self) -> None:
        self._refuse_a_used_folder()
        if self.config["fit"].get("print_memory"):
            print_memory(self.model, self.datamodule, self.trainer)

    def _refuse_a_used_folder(self) -> None:
        """A second run would leave its `last-v1.ckpt` beside the first one's `last.ckpt`."""
        if self.config["fit"].get("ckpt_path"):
            return
        for callback in self.trainer.checkpoint_callbacks:
            folder = Path(getattr(callback, "dirpath", None) or "")
            kept = sorted(folder.glob("*.ckpt")) if folder.name else []
            if kept:
                last = next((path for path in kept if path.stem.startswith("last")), kept[-1])
                raise InputError(
                    f"{folder} holds {last.name} of an earlier run: go on with --ckpt_path {last}, or give another "
                    "--run"
                )

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint before any work. Lightning would lay its settings over those of config and command."""
        told = self.config.get(self.config.subcommand) or {} if self.config.get("subcommand") else {}
        if not told:
            return
        if "weights_only" in told:
            told["weights_only"] = True  # of whatever is loaded: a pickle could run any code
        path = told.get("ckpt_path")
        if path and "://" in path:
            raise InputError(f"--ckpt_path {path}: an address; download the checkpoint and give the file")
        if path and path not in ("last", "best", "hpc"):
            load_checkpoint(Path(path))


def overview() -> str:
    """All commands, a line each."""
    rows = {" | ".join(LIGHTNING): "LightningCLI: --config FILE, and --model.X, --data.X, --trainer.X over it"}
    rows |= {name: what for name, (_, what) in COMMANDS.items()}
    lines = [f"  {name:<33} {what}" for name, what in rows.items()]
    return "\n".join(["python -m pig.cli COMMAND ...", "", *lines, "", str(__doc__).partition("; ")[2]])


def run(args: list[str]) -> Any:
    command = args[0] if args else "--help"
    if command in COMMANDS:
        for flag, instead in GONE.get(command, {}).items():
            if any(re.match(rf"--{flag}(=|$)", word.replace("-", "_").replace("__", "--", 1)) for word in args):
                raise InputError(f"--{flag} is gone: give {instead}")
        function, values = parse(f"python -m pig.cli {command}", COMMANDS[command][0], args[1:])
        return function(**values)
    if command in ("-h", "--help"):
        print(overview())
        return None
    if not command.startswith("-") and command not in LIGHTNING:
        raise InputError(f"no command {command!r}; there are: {', '.join((*LIGHTNING, *COMMANDS))}")
    sys.argv[1:] = [re.sub("^--print-memory", "--print_memory", word) for word in args]
    return CLI()


def main() -> None:
    """Exit code 2 for bad input, with its message."""
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        # One of several processes: if the one that started it is killed, it would wait for it in the next exchange.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    logging.basicConfig(format="%(levelname)s %(message)s")
    transformers.utils.logging.disable_progress_bar()
    for noise in (
        "Your `IterableDataset` has `__len__` defined",  # and gives each worker its own share
        r"Found \d+ module\(s\) in eval mode",  # the frozen VAE and text encoder
        "Precision bf16-mixed is not supported by the model summary",
        r".*LeafSpec",  # Lightning with a newer torch
    ):
        warnings.filterwarnings("ignore", noise)
    try:
        run(sys.argv[1:])
    except SIGTERMException:  # a SystemExit of code 0, which a scheduler would take for success
        print("stopped by SIGTERM; go on with --ckpt_path and the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        mistake = find_input_error(error)
        if mistake is None:
            raise
        # A loader's worker process wraps the message in its traceback.
        message = re.sub(r"(?s)^Caught InputError in .*\n\S*InputError: ", "", str(mistake)).strip()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
