"""The settings of a tournament: a YAML file over these defaults, `key=value` on the command line over both."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from pig.errors import InputError, check_named
from pig.mistakes import settings_from

KINDS = ("trained", "tuned", "blended", "base")


@dataclass
class Method:
    """One that takes part. Words are those of a command line; `{out}` in them is the tournament's folder.

    Attributes:
        kind: `trained` once for all subjects by `fit`; `tuned` for each by `tune`; `blended`: draws with the
            checkpoints of a tuned one; `base`: the base model, which reads no reference.
        config: the experiment, of a trained or tuned one.
        words: of `fit` or `tune`, over the config.
        of: the tuned method whose checkpoints a blended one draws with.
        drawn: words of `generate`.
        trials: words of `generate`, one line for each trial on the validation subjects, the best of which is taken. All
            methods that have any have the same number.
        common: words of `generate` that set its image guidance to the value that all have in common.
    """

    kind: str = "trained"
    config: str = ""
    words: str = ""
    of: str = ""
    drawn: str = ""
    trials: list[str] = field(default_factory=list)
    common: str = ""


@dataclass
class Tournament:
    """All of it.

    Attributes:
        out: the folder of all that is made.
        data: commands that make the data, in their order; without `python -m`.
        subjects: the benchmark, a folder of subjects with its prompts.
        validation: such a folder, for the trials.
        prompts: of the benchmark; default: the subjects folder's own.
        partial: the same subjects, by pictures that show a part of each; "" where there are none.
        references: how many pictures the trained methods are given; each number is drawn and scored.
        base: the base model, as `generate --model` takes it.
        scorer: a config of `evaluate`.
        samples: that each method is trained on.
        same_time: whether each is also trained for as long as `against` took for its samples.
        seeds: of training.
        fit: words of every `fit`; drawing: of every `generate`.
        against: the method that all others are compared with.
    """

    out: str = MISSING
    data: list[str] = field(default_factory=list)
    subjects: str = MISSING
    validation: str = ""
    prompts: str = ""
    partial: str = ""
    references: list[int] = field(default_factory=lambda: [1, 4])
    base: str = MISSING
    scorer: str = MISSING
    samples: int = MISSING
    same_time: bool = True
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    fit: str = ""
    drawing: str = ""
    against: str = "bootpig"
    methods: dict[str, Method] = field(default_factory=dict)

    def folder(self) -> Path:
        return Path(self.out)

    def split(self, text: str) -> list[str]:
        """The words of a line."""
        return shlex.split(text.replace("{out}", self.out))

    def path(self, text: str) -> str:
        return text.replace("{out}", self.out)


def load_config(file: Path, overrides: Sequence[str]) -> Tournament:
    """
    Raises:
        InputError: no such file, an unknown key, a value that is missing or does not fit.
    """
    config = settings_from(Tournament, file, overrides)
    _check(config)
    return config


def _check(config: Tournament) -> None:
    if config.samples < 1 or not config.seeds or not config.references or min(config.references) < 1:
        raise InputError("samples and each of references must be at least 1, and seeds must name one")
    if len(set(config.seeds)) < len(config.seeds) or len(set(config.references)) < len(config.references):
        raise InputError("seeds and references: each number once")
    for name, method in config.methods.items():
        check_named(f"methods.{name}.kind", method.kind, KINDS)
        if not name.replace("_", "").isalnum():
            raise InputError(f"methods: {name!r} is no name: letters, digits and _")
        if method.kind in ("trained", "tuned") and not Path(method.config).is_file():
            raise InputError(f"methods.{name}.config: no such file: {method.config or '(none)'}")
        if method.kind == "blended" and (method.of not in config.methods or config.methods[method.of].kind != "tuned"):
            raise InputError(f"methods.{name}.of: name a tuned method, got {method.of!r}")
    check_named("against", config.against, tuple(config.methods))
    if config.methods[config.against].kind != "trained":
        raise InputError(f"against={config.against}: name a trained method")
    counts = {len(method.trials) for method in config.methods.values() if method.trials}
    if len(counts) > 1:
        raise InputError(f"methods that have trials must have the same number, got {sorted(counts)}")
    if counts and not config.validation:
        raise InputError("trials need validation, a folder of other subjects than those of the benchmark")
