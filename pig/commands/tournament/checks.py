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
from pig.files import sha256_of
from pig.methods import METHODS, Source, find_model, pipeline_class
from pig.mistakes import read_config, values_of

STEPS = ("step", "early", "late")  # flags of `generate` that name kept steps of a tuning
# Flags by which commands differ that are otherwise the same.
OF_ONE = ("--run", "--out", "--seed_everything", "--data.seed", "--subjects", "--images", "--name")


def check_plan(config: Tournament) -> None:
    """
    Raises:
        InputError: a claim names an entry, a score or a kind of prompt that there will not be; or a command would not
            take its words: `generate` those of a method, a trial or a condition; `fit`, `tune` and `evaluate` theirs.
    """
    _check_claims(config)
    _check_commands(config)
    for name, entry in plan.firsts(config).items():
        trials = config.methods[plan.tried(config, name)].trials or [""]
        given = dict.fromkeys(condition.words for condition in plan.conditions(config, entry))  # of several the same
        if config.methods[name].trials:
            given[tuple(config.split(config.trying))] = None
        for trial, words in product(trials, given):
            _check_words(config, name, [*plan.words_of(config, name, config.split(trial)), *words])


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


def check_subjects(config: Tournament) -> None:
    """Once the data is there.

    Raises:
        InputError: the subjects cannot serve: pictures of the benchmark are among those of the trials, `partial` is of
            other subjects, or one has fewer pictures than `references` asks for.
    """
    folders = {key: config.path(getattr(config, key)) for key in ("subjects", "validation", "partial")}
    prompts = Path(config.path(config.prompts)) if config.prompts else None
    of = {
        key: {one.name: one.images for one in read_subjects(folder, prompts)}
        for key, folder in folders.items()
        if folder
    }
    pictures = {
        key: {sha256_of(image): image for images in of.get(key, {}).values() for image in images}
        for key in ("subjects", "validation")
    }
    if same := pictures["subjects"].keys() & pictures["validation"].keys():
        raise InputError(
            f"validation={folders['validation']} holds {pictures['validation'][min(same)]} of the benchmark: settings "
            "must be chosen on other subjects"
        )
    if "partial" in of and of["partial"].keys() != of["subjects"].keys():
        raise InputError(f"partial={folders['partial']} must hold the subjects of {folders['subjects']}, and no others")
    read = [one for name, one in config.methods.items() if config.weights_of(name)[1].kind == "trained"]
    most = max((count for method in read for count in method.references or config.references), default=0)
    for key in of:
        name, images = min(of[key].items(), key=lambda one: len(one[1]))
        if len(images) < most:
            raise InputError(f"references={most}: {folders[key]}/{name} has only {len(images)} pictures")


def _check_commands(config: Tournament) -> None:
    """Read the arguments of `fit`, `tune` and `evaluate`. (Those of the data's commands, which come first, are read by
    themselves.)"""
    from pig.commands.fit import CLI
    from pig.commands.tune import TuneCLI

    score = plan.Step("scores", (*plan.scorer(config), "--images=-", "--subjects=-", "--out=-"))
    stages: dict[str, Sequence[plan.Chain]] = {**plan.stages(config, []), "scoring": [[score]]}
    seen = set()
    for name, step in ((name, step) for name, chains in stages.items() for chain in chains for step in chain):
        program, *words = step.words
        own = tuple(word for word in words if word.partition("=")[0] not in OF_ONE)
        if own in seen:  # of another seed, or other subjects
            continue
        seen.add(own)
        try:
            if words[0] == "fit":
                CLI(words[1:], run=False, built=False)
            elif words[0] == "tune":
                TuneCLI(words[1:], built=False)
            elif words[0] == "evaluate":
                parse("evaluate", "pig.evaluation.benchmark:evaluate", words[1:])
        except InputError as error:
            raise InputError(f"{name}, python -m {shlex.join([program, *own])}: {error}") from error


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
    source = source_of(config, name)
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


def source_of(config: Tournament, name: str) -> Source:
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
