"""The settings of a tournament: a YAML file over these defaults, `key=value` on the command line over both."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from pig.commands.options import Output
from pig.data.images import SEEDS
from pig.errors import InputError, check_kinds, check_named, check_ranges
from pig.mistakes import read_config, settings_from, values_of

TAKEN = ("data", "records", "logs", "also")  # folders of a tournament
READ = {  # kind of method -> what it reads, besides `drawn`
    "trained": ("config", "words", "references", "seeds", "common", "trials"),
    "tuned": ("config", "words", "seeds", "trials"),
    "blended": ("of", "trials"),
    "again": ("of", "references", "common"),  # drawn as the best trial of the one whose weights it takes
    "base": ("trials",),
}


@dataclass
class Method:
    """One that takes part. Words are those of a command line; in them, as in all lines of a tournament's file, `{out}`
    stands for its folder and `{subjects}` for its folder of subjects.

    Attributes:
        kind: `trained` once for all subjects by `fit`; `tuned` for each by `tune`; `blended`: draws with the
            checkpoints of a tuned one; `again`: draws with the weights of another one, by words of its own; `base`: the
            base model, which reads no reference.
        config: the experiment, of a trained or tuned one.
        words: of `fit` or `tune`, over the config.
        of: the trained or tuned method whose weights a blended one or one of kind `again` draws with.
        references, seeds: in place of the tournament's. A method that draws with another's weights has its seeds.
        drawn: words of `generate`.
        trials: words of `generate`, one line for each trial on the validation subjects, the best of which is taken. All
            methods that have any have the same number.
        common: words of `generate` that set the image guidance which the methods have in the condition "common
            guidance".
    """

    kind: str = "trained"
    config: str = ""
    words: str = ""
    of: str = ""
    references: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    drawn: str = ""
    trials: list[str] = field(default_factory=list)
    common: str = ""


@dataclass
class Claim:
    """A claim that one entry scores higher than another.

    Attributes:
        source: who claims it, where, with which figures.
        says: the claim in words.
        higher, lower: the entries, as in the tables: a method's name, after which ", equal time" and what it was given
            may stand, such as `bootpig, 4 partial pictures`.
        score: in which they are compared.
        prompts: the kind of prompts; default: all.
    """

    source: str = MISSING
    says: str = MISSING
    higher: str = MISSING
    lower: str = MISSING
    score: str = "dino"
    prompts: str = ""


@dataclass
class Tournament:
    """All of it.

    Attributes:
        out: the folder of all that is made.
        data: commands that make the data, in their order; without `python -m`.
        subjects: the benchmark, a folder of subjects with its prompts.
        validation: such a folder, for the trials.
        prompts: of the benchmark; default: the subjects folder's own.
        partial: a second folder of the same subjects: of each four pictures three show a part, the last one all. Empty:
            none.
        references: how many pictures the trained methods are given; each number is drawn and scored.
        condition_seeds: with how many of the training seeds the conditions but a method's first are drawn; 0: with all.
        base: the base model, as `generate --model` takes it.
        scorer: a config of `evaluate`.
        samples: that each method is trained on.
        same_time: whether each is also trained for as long as `against` took for its samples.
        seeds: of training and tuning.
        fit, drawing: words of every `fit` and of every `generate`; a method's own words override them.
        trying: words of the trials' `generate` alone, such as fewer images.
        scoring: words of every `evaluate`; they override `scorer`.
        against: the method that all others are compared with.
        claims: to be tested by what is found.
    """

    out: str = MISSING
    data: list[str] = field(default_factory=list)
    subjects: str = MISSING
    validation: str = ""
    prompts: str = ""
    partial: str = ""
    references: list[int] = field(default_factory=lambda: [1, 4])
    condition_seeds: int = 0
    base: str = MISSING
    scorer: str = MISSING
    samples: int = MISSING
    same_time: bool = True
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    fit: str = ""
    drawing: str = ""
    trying: str = ""
    scoring: str = ""
    against: str = "bootpig"
    methods: dict[str, Method] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)

    def folder(self) -> Path:
        return Path(self.out)

    def split(self, text: str) -> list[str]:
        """The words of a line.

        Raises:
            InputError: a quotation that is not closed.
        """
        try:
            return [self.path(word) for word in shlex.split(text)]
        except ValueError as error:
            raise InputError(f"{text[:80]!r}: {error}") from error

    def weights_of(self, name: str) -> tuple[str, Method]:
        """The method whose training or tuning made the weights that `name` draws with: itself, or another one."""
        name = self.methods[name].of or name
        return name, self.methods[name]

    def seeds_of(self, name: str) -> list[int]:
        """Of the weights that a method draws with."""
        return self.weights_of(name)[1].seeds or self.seeds

    def number(self, flag: str, default: int, words: Sequence[str] = ()) -> int:
        """What `--flag=N` says in `words`, or else in `drawing`."""
        given = last([*self.split(self.drawing), *words], flag)
        return int(given) if given is not None and given.isdigit() else default

    def images_per_prompt(self, words: Sequence[str] = ()) -> int:
        return self.number("images_per_prompt", Output.images_per_prompt, words)

    def batch_size(self, method: Method) -> int:
        """Samples of a step, by the words of `fit` or `tune`, or else the config."""
        fit = self.split(self.fit) if method.kind == "trained" else []
        words = [*fit, *self.split(method.words)]
        size = last(words, "data.batch_size")
        if size is None:
            size = str(read_config(method.config)["data"]["init_args"]["batch_size"])
        if not (size.isdigit() and int(size) > 0):
            raise InputError(f"--data.batch_size={size} is no number of samples")
        return int(size)

    def kept_steps(self, method: Method) -> list[int]:
        """The steps whose checkpoints a tuning keeps."""
        words, save_at, steps = self.split(method.words), list[int](), 0
        for file in (method.config, *values_of(words, "--config")):
            told = read_config(file)
            save_at = told.get("model", {}).get("init_args", {}).get("save_at", save_at)
            steps = told.get("trainer", {}).get("max_steps", steps)
        save_at = yaml.safe_load(last(words, "model.save_at") or "null") or save_at
        return sorted({*save_at, self.number("trainer.max_steps", steps, words)})

    def prior_of(self, method: Method) -> dict[str, Any] | None:
        """Class pictures of a tuning, which are drawn once for each class: their folder, how many, in how many
        steps."""
        words = self.split(method.words)
        told = read_config(method.config)["data"]["init_args"].get("prior")
        if told is None or "--data.prior=null" in words:
            return None
        folder = last(words, "data.prior.folder") or told["folder"]
        default = {"count": 200, "steps": 50}
        counts = {key: self.number(f"data.prior.{key}", told.get(key, value), words) for key, value in default.items()}
        return {"folder": folder, **counts}

    def path(self, text: str) -> str:
        return text.replace("{subjects}", self.subjects).replace("{out}", self.out)


def last(words: Sequence[str], flag: str) -> str | None:
    """The value of a flag, of which the last one counts."""
    return next(reversed(values_of(words, f"--{flag}", f"--{flag.replace('_', '-')}")), None)


def load_config(file: Path, overrides: Sequence[str]) -> Tournament:
    """
    Raises:
        InputError: no such file, an unknown key, a value that is missing or does not fit.
    """
    config = settings_from(Tournament, file, overrides)
    _check(config)
    return config


def _check(config: Tournament) -> None:
    if not config.out.strip():
        raise InputError("out is empty: name a folder")
    if not config.base.startswith("base:"):
        raise InputError(f"base={config.base}: give it as `generate --model` takes a base model, base:NAME")
    if not Path(config.scorer).is_file():
        raise InputError(f"scorer={config.scorer}: no such file")
    check_ranges(samples=(config.samples, 1, 10**12), condition_seeds=(config.condition_seeds, 0, 10**6))
    for line in (*config.data, config.fit, config.drawing, config.trying, config.scoring):
        config.split(line)
    if not config.seeds or not config.references:
        raise InputError("references and seeds must each name one")
    for name, numbers in {
        "seeds": config.seeds,
        "references": config.references,
        **{f"methods.{name}.seeds": method.seeds for name, method in config.methods.items()},
        **{f"methods.{name}.references": method.references for name, method in config.methods.items()},
    }.items():
        if len(set(numbers)) < len(numbers):
            raise InputError(f"{name}: each number once")
        if name.endswith("references") and min(numbers, default=1) < 1:
            raise InputError(f"each of {name} must be at least 1")
        if name.endswith("seeds") and not all(0 <= seed < SEEDS for seed in numbers):
            raise InputError(f"{name}: from 0 to 2^32 - 1")
    for name, method in config.methods.items():
        check_named(f"methods.{name}.kind", method.kind, tuple(READ))
        if not name.replace("_", "").isalnum() or name in TAKEN:
            raise InputError(f"methods: {name!r} is no name: letters, digits and _; not {', '.join(TAKEN)}")
        for line in (method.words, method.drawn, method.common, *method.trials):
            config.split(line)
        if method.kind in ("trained", "tuned"):
            _check_experiment(name, method)
            config.batch_size(method)
        for key in dict.fromkeys(key for keys in READ.values() for key in keys):
            if getattr(method, key) and key not in READ[method.kind]:
                raise InputError(f"methods.{name}.{key}: a method of kind {method.kind} does not read it")
        sources = {"blended": ("tuned",), "again": ("trained", "tuned")}.get(method.kind, ())
        if sources and (method.of not in config.methods or config.methods[method.of].kind not in sources):
            raise InputError(f"methods.{name}.of: name a {' or '.join(sources)} method, got {method.of!r}")
    check_named("against", config.against, tuple(config.methods))
    if config.same_time and config.methods[config.against].kind != "trained":
        raise InputError(
            f"against={config.against}: equal time is that of a trained method; name one, or same_time=false"
        )
    counts = {len(method.trials) for method in config.methods.values() if method.trials}
    if len(counts) > 1:
        raise InputError(f"methods that have trials must have the same number, got {sorted(counts)}")
    if counts and not config.validation:
        raise InputError("trials need validation, a folder of other subjects than those of the benchmark")


def _check_experiment(name: str, method: Method) -> None:
    """A config of `fit` or `tune` that says what the plan reads of it."""
    where = f"methods.{name}.config: {method.config or '(none)'}"
    if not Path(method.config).is_file():
        raise InputError(f"{where}: no such file")
    told = read_config(method.config)
    check_kinds(told, {"trainer": dict, "model": dict, "data": dict}, where)
    check_kinds(told["trainer"], {"default_root_dir": str, "callbacks": list}, where)
    check_kinds(told["data"].get("init_args"), {"batch_size": int}, where)
