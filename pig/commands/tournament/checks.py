"""What can be told of a tournament before its first command runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import get_args

from pig.arguments import parse
from pig.commands.generate import refuse_steps
from pig.commands.tournament import plan
from pig.commands.tournament.config import Tournament, last
from pig.data.subjects import PromptKind, is_benchmark, plain_prompts, prompt_kind, read_subjects
from pig.errors import InputError, check_named
from pig.methods import METHODS, Source, find_model, pipeline_class
from pig.mistakes import read_config, values_of

STEPS = ("step", "early", "late")  # flags of `generate` that name kept steps of a tuning


def check_plan(config: Tournament) -> None:
    """
    Raises:
        InputError: a claim names an entry, a score or a kind of prompt that there will not be; or `generate` would not
            take the words of a method, a trial or a condition.
    """
    _check_claims(config)
    for name, entry in plan.firsts(config).items():
        trials = config.methods[plan.tried(config, name)].trials or [""]
        given = dict.fromkeys(condition.words for condition in plan.conditions(config, entry))  # of several the same
        trying = tuple(config.split(config.trying)) if config.methods[name].trials else ()
        for trial, words in product(trials, given):
            _check_words(config, name, [*plan.words_of(config, name, config.split(trial)), *trying, *words])


def check_inputs(config: Tournament) -> None:
    """
    Raises:
        InputError: folders of subjects, or prompts, that no command of `data` makes are not there, or unreadable.
    """
    made = [folder for line in config.data for folder in values_of(config.split(line), "--out", "output")]
    prompts = Path(config.path(config.prompts)) if config.prompts else None
    if prompts is not None and not any(prompts.is_relative_to(folder) for folder in made) and not prompts.is_file():
        raise InputError(f"prompts={prompts}: no such file")
    for key in ("subjects", "validation", "partial"):
        folder = config.path(getattr(config, key))
        if folder and folder not in made:
            read_subjects(folder, prompts)


def _check_claims(config: Tournament) -> None:
    named: dict[str, tuple[str, str]] = {}  # as a claim may call it -> entry, condition
    for one in plan.entries(config):
        name = plan.name_of(one.method, one.budget)
        for given in reversed(plan.conditions(config, one)):
            named |= {name: (name, given.name), f"{name}, {given.name}".removesuffix(", "): (name, given.name)}
    file, kinds = Path(config.path(config.prompts)), get_args(PromptKind)
    if config.prompts and file.is_file() and not is_benchmark(file):
        kinds = tuple(sorted({prompt_kind(one) for one in plain_prompts(file)}))
    for number, claim in enumerate(config.claims):
        for key in ("higher", "lower"):
            check_named(f"claims[{number}].{key}", getattr(claim, key), list(named))
        if named[claim.higher] == named[claim.lower]:
            raise InputError(f"claims[{number}]: higher and lower are the same")
        check_named(f"claims[{number}].score", claim.score, plan.SCORES)
        if claim.score == "diversity" and config.images_per_prompt() < 2:
            raise InputError(f"claims[{number}]: diversity needs two images of a prompt: drawing=--images_per_prompt=2")
        segmenter = last(config.split(config.scoring), "segmenter") or read_config(config.scorer).get("segmenter")
        if claim.score == "dino_masked" and segmenter in (None, "none"):
            raise InputError(f"claims[{number}]: dino_masked needs a segmenter: scoring=--segmenter=sam")
        if claim.prompts:
            check_named(f"claims[{number}].prompts", claim.prompts, kinds)


def _check_words(config: Tournament, name: str, words: Sequence[str]) -> None:
    """As `generate` will check them, once the model is there."""
    words = [*config.split(config.drawing), *words]
    source = _source_of(config, name)
    try:
        _, told = parse(
            "generate", "pig.commands.generate:generate", ["--model=-", "--subjects=-", "--out=-", *words], source
        )
        pipeline_class(source.method).Settings.given({}, told["settings"])
        told["output"].check()
        refuse_steps(source, told["what"])
        kept = config.kept_steps(config.weights_of(name)[1]) if source.tuned else []
        for flag in STEPS:
            step = getattr(told["what"], flag)
            if step is not None and step not in kept:
                raise InputError(f"--{flag}={step} is not kept; there will be {', '.join(map(str, kept))}")
    except InputError as error:
        raise InputError(f"methods.{name}, drawn with {shlex.join(words)}: {error}") from error


def _source_of(config: Tournament, name: str) -> Source:
    """As `find_model` will tell of the model, once it is there."""
    method, (_, made_by) = config.methods[name], config.weights_of(name)
    if method.kind == "base":
        return find_model(config.base)
    if method.kind == "blended":
        return Source("dreamblend", None, {}, tuned=True, blended=True)
    path = str(read_config(made_by.config)["model"].get("class_path"))
    found = next((method for method, package in METHODS.items() if path.startswith(f"{package}.")), None)
    if found is None:
        raise InputError(f"methods.{name}: {path} is of no method in METHODS (pig/methods/__init__.py)")
    return Source(found, None, {}, tuned=made_by.kind == "tuned")
