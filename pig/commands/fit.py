"""`fit`, `validate`, `test` and `predict`: LightningCLI over the methods' modules and the data modules."""

from __future__ import annotations

import inspect
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jsonargparse
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pig.commands.missing import missing_inputs
from pig.data.modules import PersonalisationData
from pig.errors import InputError, check_kinds, check_ranges, find_input_error
from pig.files import locked, make_folder
from pig.mistakes import PlainErrors, read_config, refuse_empty, values_of
from pig.models.backbone import fast_precision
from pig.training.checkpoints import RESUMED, load_checkpoint
from pig.training.memory import print_memory
from pig.training.module import PersonalisationModule

# `${run}` means the config's own top level, below whichever subcommand; `omegaconf+` resolves after all overrides.
jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
OmegaConf.register_resolver("fast_precision", fast_precision, replace=True)

OVERRIDES = "--config FILE sets everything; --model.X, --data.X and --trainer.X override single values of the file."
MOST_DEVICES = 1024
NO_BASE = "cannot load the base model"


class Parser(PlainErrors, LightningArgumentParser):
    """Its mistakes are `InputError`s."""

    def options_of(self, key: str) -> set[str]:
        kinds: list[type] = [{"model": PersonalisationModule, "data": PersonalisationData}.get(key, object)]
        if kinds == [object]:
            return set()
        for kind in kinds:  # which grows
            kinds += kind.__subclasses__()
        return {name for kind in kinds for name in inspect.signature(kind).parameters}


class CLI(LightningCLI):
    """LightningCLI in subclass mode with the omegaconf parser, so that configs may interpolate. built: whether model,
    data and trainer are made, or the arguments only read and checked."""

    description = "Train, validate, test or predict. " + OVERRIDES

    def __init__(self, args: Sequence[str] | None = None, *, run: bool = True, built: bool = True) -> None:
        self.built = built
        words = sys.argv[1:] if args is None else args
        refuse_empty(words, "--run", "--out", "--subjects", "--ckpt_path")
        for config in values_of(words, "--config", "-c"):
            read_config(config)
        super().__init__(
            PersonalisationModule,
            PersonalisationData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+", "description": self.description},
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"enable_model_summary": False},  # the module says what it trains
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", default="runs/run", help="folder of this run, which configs refer to as ${run}")
        told = "print an estimate of the memory that training needs, then train"
        parser.add_argument("--print_memory", action="store_true", help=told)

    def instantiate_classes(self) -> None:
        """
        Raises:
            InputError: names all inputs of a training that are not there, not the first one only.
        """
        if not self.built:
            return
        missing = missing_inputs(self.config["fit"]) if self.config.get("subcommand") == "fit" else []
        try:
            super().instantiate_classes()
        except Exception as error:
            mistake = find_input_error(error)
            if mistake is None or not str(mistake).startswith(NO_BASE):
                raise  # a wrong number, say, which comes first
            missing = [f"model.base: {mistake}", *(one for one in missing if not one.startswith("model.base"))]
            if len(missing) == 1:
                raise
        if len(missing) > 1:
            raise InputError("\n  ".join([f"{len(missing)} inputs of this experiment are not there:", *missing]))

    def _set_seed(self) -> None:
        if self.built:
            super()._set_seed()

    def instantiate_trainer(self, **more: Any) -> Trainer:
        """
        Raises:
            InputError: the machine, or Lightning, has no such trainer.
        """
        told = self.config.get(self.config.get("subcommand") or "") or self.config
        devices = told["trainer"].get("devices")
        for name, least in (("gradient_clip_val", 0), ("accumulate_grad_batches", 1), ("log_every_n_steps", 0)):
            if told["trainer"].get(name) is not None:
                check_ranges(**{f"trainer.{name}": (told["trainer"][name], least, math.inf)})
        if isinstance(devices, int) and devices > MOST_DEVICES:
            raise InputError(f"trainer.devices={devices}: at most {MOST_DEVICES} processes on one machine")
        try:
            return super().instantiate_trainer(**more)
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            raise find_input_error(error) or InputError(f"trainer: {str(error).splitlines()[0]}") from error

    def before_fit(self) -> None:
        self._refuse_a_used_folder()
        self._lock_folder()
        resumed = self.config["fit"].get("ckpt_path")
        if resumed and resumed not in ("last", "hpc"):
            check_kinds(load_checkpoint(Path(resumed)), RESUMED, resumed)
        if self.config["fit"].get("print_memory"):
            print_memory(self.model, self.datamodule, self.trainer)

    def _refuse_a_used_folder(self) -> None:
        """A second run would leave its `last-v1.ckpt` beside the first one's `last.ckpt`."""
        resumed = self.config["fit"].get("ckpt_path")
        for callback in self.trainer.checkpoint_callbacks:
            folder = Path(getattr(callback, "dirpath", None) or "")
            kept = sorted(folder.glob("*.ckpt")) if folder.name else []
            own = resumed and (resumed in ("last", "best", "hpc") or Path(resumed).resolve().parent == folder.resolve())
            if kept and not own:
                last = next((path for path in kept if path.stem.startswith("last")), kept[-1])
                raise InputError(
                    f"{folder} holds {last.name} of an earlier run: go on with --ckpt_path {last}, or give another "
                    "--run"
                )

    def _lock_folder(self) -> None:
        """Of the checkpoints: two runs at once would write one `last.ckpt`."""
        if not self.trainer.is_global_zero:
            return
        named = [getattr(one, "dirpath", None) for one in self.trainer.checkpoint_callbacks]
        for folder in {Path(one) for one in named if one is not None and "://" not in str(one)}:
            make_folder(folder)
            _locks.enter_context(locked(folder))

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
        if path == "best":
            raise InputError("--ckpt_path best: only the run itself knows it; give the file, such as best.ckpt")
        if path and path not in ("last", "hpc"):
            load_checkpoint(Path(path))
        if path == "last":  # where there is none, Lightning begins
            of_config = (told.get("trainer") or {}).get("callbacks") or []
            named = [one["init_args"].get("dirpath") for one in of_config if "ModelCheckpoint" in one["class_path"]]
            kept = [file for folder in dict.fromkeys(filter(None, named)) for file in Path(folder).glob("last*.ckpt")]
            if kept:
                load_checkpoint(max(kept, key=lambda file: file.stat().st_mtime_ns))


_locks = ExitStack()  # held while a command runs


def hush() -> None:
    """Leave out the messages that say nothing to a user, and Lightning's second copy of all others."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()  # the root's handler prints them already
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda line: "Tip:" not in line.getMessage())
    for noise in (
        "Your `IterableDataset` has `__len__` defined",  # and gives each worker its own share
        r"Found \d+ module\(s\) in eval mode",  # the frozen VAE and text encoder
        "Precision bf16-mixed is not supported by the model summary",
        r".*LeafSpec",  # Lightning with a newer torch
        "You defined a `validation_step` but have no `val_dataloader`",
        "Checkpoint directory .* exists and is not empty",  # of a run that goes on
        "The number of training batches .* is smaller than the logging interval",
    ):
        warnings.filterwarnings("ignore", noise)


def run(args: list[str]) -> None:
    """
    Raises:
        SIGTERMException: the scheduler stopped it. (A SystemExit of code 0, which would be taken for success.)
    """
    hush()
    sys.argv[1:] = args
    try:
        CLI()
    except SIGTERMException as error:
        raise StoppedError from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning makes an `exit(1)` of
            raise error.__context__ from None
        raise
    except OmegaConfBaseException as error:  # of what refers to an entry that is not there
        raise InputError(f"--config: {str(error).splitlines()[0]} at {error.full_key}") from error
    except ZeroDivisionError as error:
        raise InputError(
            "a number is 0 that must be at least 1, such as trainer.max_steps or trainer.accumulate_grad_batches"
        ) from error
    except ValueError as error:
        if "numpy accepts" in str(error):  # Lightning's only word on a seed
            raise InputError(f"--seed_everything: {error}") from error
        raise
    finally:
        _locks.close()


class StoppedError(Exception):
    """By SIGTERM."""
