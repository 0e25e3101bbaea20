"""Deltas: what a method has trained, in a folder, with the name of the base model that the rest comes from.

`delta.json` names method, base model (with a digest of its weights), settings and options; a safetensors file beside it
holds the trained weights. A method that is tuned on one subject leaves several: `SUBJECT/step-000250/` and so on, in a
*tuned folder* that holds all subjects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pig.errors import InputError, check_kinds
from pig.files import read_json, write_text
from pig.models.backbone import base_digest, base_settings, load_backbone
from pig.models.weights import copy_weights, read_weights
from pig.sampling.pipeline import SubjectPipeline

DELTA = "delta.json"


@dataclass(frozen=True)
class Delta:
    """What `delta.json` says."""

    method: str
    base: str
    base_digest: str
    settings: Mapping[str, Any]
    options: Mapping[str, Any]


def read_delta(folder: Path) -> Delta:
    told = read_json(folder / DELTA, f"{folder} is no delta")
    kinds = {"method": str, "base": str, "base_digest": str, "settings": Mapping, "options": Mapping}
    check_kinds(told, kinds, str(folder / DELTA))
    try:
        return Delta(**told)
    except TypeError as error:
        raise InputError(f"{folder / DELTA} is no description of a delta ({error})") from error


def load_weights(pipeline: SubjectPipeline, folder: Path) -> None:
    """Read what `save_weights` has written.

    Raises:
        InputError: the file is torn, or holds other weights than this pipeline's.
    """
    file = folder / pipeline.delta_file
    copy_weights(read_weights(file), dict(pipeline.trained_weights()), file, "It is not of this method and base model")


def save_delta(pipeline: SubjectPipeline, folder: Path, *, half: bool = False, origin: str | None = None) -> None:
    """Write what the pipeline's method has trained, and no more: the rest is the base model's.

    half: in float16. origin: the base model's digest; given only if the frozen weights are unchanged: no check then.

    Raises:
        InputError: the pipeline's base model is unknown, or its frozen weights are not that model's.
    """
    base = pipeline.config.base
    if base is None or not dict(pipeline.trained_weights()):
        raise InputError("only a model that was trained here has a delta, one whose base model is known by its name")
    origin = origin or _checked_origin(pipeline, base)
    pipeline.save_weights(folder, half=half)
    told = Delta(pipeline.method, base, origin, dict(pipeline.config.settings), pipeline.model_options())
    write_text(folder / DELTA, json.dumps(asdict(told), indent=1) + "\n")


def _checked_origin(pipeline: SubjectPipeline, base: str) -> str:
    """The base model's digest, once it is known that the pipeline's frozen weights are that model's."""
    backbone = load_backbone(base)
    origin = base_digest(backbone)  # before a method adds to it
    plain = type(pipeline).from_backbone(
        backbone, base=base, settings=pipeline.config.settings, **pipeline.model_options()
    )
    frozen, of_base = (_frozen(one) for one in (pipeline, plain))
    other = [name for name, tensor in frozen.items() if not torch.equal(tensor.cpu().float(), of_base[name].float())]
    if other or type(pipeline.scheduler) is not type(plain.scheduler) or told_of(pipeline) != told_of(plain):
        what = other[0] if other else "its scheduler, VAE configuration or tokenizer"
        raise InputError(f"{what} is not that of the base model {base!r}: a delta would lose it; export it whole")
    return origin


def _frozen(pipeline: SubjectPipeline) -> dict[str, Tensor]:
    trained = {id(parameter) for _, parameter in pipeline.trained_weights()}
    return {
        f"{part}.{name}": parameter.detach()
        for part, module in pipeline.components.items()
        if isinstance(module, nn.Module)
        for name, parameter in (*module.named_parameters(), *module.named_buffers())
        if id(parameter) not in trained
    }


def told_of(pipeline: SubjectPipeline) -> str:
    """The settings of a base model other than its weights: noise schedule, VAE scaling, vocabulary."""
    return base_settings(pipeline.vae, pipeline.scheduler, pipeline.tokenizer)


# -- tuned folders ----------------------------------------------------------------------------------------------------


def step_folder(subject: Path, step: int) -> Path:
    return subject / f"step-{step:06d}"


def kept_steps(subject: Path) -> dict[int, Path]:
    """Step -> its delta, in their order, of one subject."""
    found = {
        int(match[1]): path for path in subject.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    return {step: found[step] for step in sorted(found) if (found[step] / DELTA).is_file()}


def tuned_subjects(folder: Path) -> dict[str, dict[int, Path]]:
    """Subject -> its kept steps; empty if the folder holds no tuned subjects."""
    found = {path.name: kept_steps(path) for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    return {name: steps for name, steps in found.items() if steps}


def deltas_of(folder: Path, subjects: Sequence[str], step: int | None, flag: str = "--step") -> dict[str, Path]:
    """Subject -> the delta of its step, which `flag` has named; by default of its last one.

    Raises:
        InputError: a subject without weights, a step that was not kept; subjects of several methods or base models.
    """
    tuned, found = tuned_subjects(folder), {}
    for name in subjects:
        steps = tuned.get(name)
        if steps is None:
            raise InputError(f"{folder} has no weights of the subject {name!r}; it has: {', '.join(tuned)}")
        if step is not None and step not in steps:
            raise InputError(
                f"{flag} {step} was not kept of {name}; there are: {', '.join(map(str, steps))} (model.save_at names "
                "them)"
            )
        found[name] = steps[max(steps) if step is None else step]
        _check_file(found[name])
    last = {name: path.name for name, path in found.items()}
    if len(set(last.values())) > 1:
        behind = [f"{name} ({step})" for name, step in last.items() if step < max(last.values())]
        raise InputError(
            f"not all subjects of {folder} are tuned equally far; behind are {', '.join(behind)}: let `tune` finish, "
            "or give --step"
        )
    told = {name: read_delta(path) for name, path in found.items()}
    kinds = {
        (one.method, one.base_digest, json.dumps([one.settings, one.options], sort_keys=True)) for one in told.values()
    }
    if len(kinds) > 1:
        raise InputError(f"{folder} holds subjects of several methods, base models or settings: tune each into its own")
    return found


def _check_file(folder: Path) -> None:
    """Refuse torn weights, by their header and size, without reading them."""
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has lost its weights (*.safetensors): tune the subject again")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is torn ({error}): delete its folder and tune the subject again") from error
