"""The one command line: `python -m pig.cli SUBCOMMAND`.

    fit | validate | test | predict   LightningCLI: --config FILE, and --model.X, --data.X, --trainer.X over it
    generate                          draw a subject with a trained model, or a whole benchmark
    app                               the same on a page in the browser
    evaluate                          score a folder of generated images: tables and a report
    compare                           two of these results: paired differences, images side by side
    study                             two of these results before people's eyes
    export                            a checkpoint -> a loadable model folder

`python -m pig.cli SUBCOMMAND --help` lists the arguments.
"""

from __future__ import annotations

import ctypes
import inspect
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse
import transformers
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pig.app import app
from pig.data.modules import TripletDataModule
from pig.errors import find_input_error
from pig.evaluation.benchmark import evaluate
from pig.evaluation.compare import compare
from pig.evaluation.study import study
from pig.generate import generate
from pig.memory import print_memory
from pig.methods.base import PersonalisationModule, load_checkpoint
from pig.methods.bootpig import BootPIG

PR_SET_PDEATHSIG = 1

# `${run}` means the config's own top level, below whichever subcommand; `omegaconf+` resolves after all overrides.
jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class CLI(LightningCLI):
    """LightningCLI in subclass mode with the omegaconf parser, so that configs may interpolate."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(
            PersonalisationModule,
            TripletDataModule,
            subclass_mode_model=True,
            parser_kwargs={"parser_mode": "omegaconf+", "description": __doc__},
            save_config_kwargs={"overwrite": True},
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", default="runs/run", help="folder of this run, which configs refer to as ${run}")
        parser.add_argument("--print_memory", action="store_true", help="first say what the training takes of memory")

    def before_fit(self) -> None:
        if self.config["fit"].get("print_memory"):
            print_memory(self.model, self.datamodule, self.trainer)

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint before any work. Lightning would lay its settings over those of config and command."""
        path = (
            (self.config.get(self.config.subcommand) or {}).get("ckpt_path") if self.config.get("subcommand") else None
        )
        if path and path not in ("last", "best", "hpc") and "://" not in path:
            load_checkpoint(Path(path))


def export(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint of `fit` as a pipeline folder (safetensors only); its EMA weights, if it has any.

    Args:
        checkpoint: a `.ckpt` file of `fit`.
        out: folder for `BootPIGPipeline.from_pretrained`.
    """
    BootPIG.from_checkpoint(checkpoint).pipeline().save_pretrained(out)
    print(f"{checkpoint} -> {out}")


COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "evaluate": evaluate,
    "compare": compare,
    "study": study,
    "export": export,
    "app": app,
}


def run(args: list[str]) -> Any:
    if not args or args[0] not in COMMANDS:
        sys.argv[1:] = [re.sub("^--print-memory", "--print_memory", word) for word in args]
        return CLI()
    command = COMMANDS[args[0]]
    parser = jsonargparse.ArgumentParser(prog=f"python -m pig.cli {args[0]}", description=command.__doc__)
    parser.add_argument("--config", action="config", help="a YAML file with any of these arguments")
    # Lists as everyone types them, `--references a.jpg b.jpg`; jsonargparse's own form is `[a.jpg,b.jpg]`.
    hints = get_type_hints(command)
    kinds = {name: kind for name, hint in hints.items() for kind in (hint, *get_args(hint)) if get_origin(kind) is list}
    lists = {name: get_args(kind)[0] for name, kind in kinds.items()}
    switches = {name for name, hint in hints.items() if hint is bool}
    parameters = inspect.signature(command).parameters
    positional = [name for name, one in parameters.items() if one.kind is one.POSITIONAL_ONLY]
    for parameter in docstring_parser.parse(command.__doc__ or "").params:
        if parameter.arg_name in positional:
            kind = lists[parameter.arg_name]
            parser.add_argument(parameter.arg_name, nargs="+", type=kind, help=parameter.description)
        elif parameter.arg_name in lists:
            kind = lists[parameter.arg_name]
            parser.add_argument(f"--{parameter.arg_name}", nargs="+", type=kind, help=parameter.description)
        elif parameter.arg_name in switches:
            parser.add_argument(f"--{parameter.arg_name}", action="store_true", help=parameter.description)
    parser.add_function_arguments(command, as_positional=False, skip={*lists, *switches})
    # `--save-references` is `--save_references`, with or without `=...`.
    given = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in args[1:]]
    told = {name: value for name, value in parser.parse_args(given).as_dict().items() if name != "config"}
    first = [told.pop(name) for name in positional]
    return command(*first, **told)


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
