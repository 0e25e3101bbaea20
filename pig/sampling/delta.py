"""Deltas: what a method has trained, in a folder, with the name of the base model that the rest comes from.

`delta.json` names method, base model (with a digest of its weights), settings and options; a safetensors file beside it
holds the trained weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pig.errors import InputError
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


def save_delta(pipeline: SubjectPipeline, folder: Path, *, half: bool = False) -> None:
    """Write what the pipeline's method has trained, and no more: the rest is the base model's.

    half: in float16.

    Raises:
        InputError: it is not known from which base model it was made, or its frozen weights are not that model's.
    """
    base = pipeline.config.base
    if base is None or not dict(pipeline.trained_weights()):
        raise InputError("only a model that was trained here has a delta, one whose base model is known by its name")
    backbone = load_backbone(base)
    origin = base_digest(backbone)
    plain = type(pipeline).from_backbone(
        backbone, base=base, settings=pipeline.config.settings, **pipeline.model_options()
    )
    frozen, of_base = (_frozen(one) for one in (pipeline, plain))
    other = [name for name, tensor in frozen.items() if not torch.equal(tensor.cpu().float(), of_base[name].float())]
    if other or type(pipeline.scheduler) is not type(plain.scheduler) or told_of(pipeline) != told_of(plain):
        what = other[0] if other else "its scheduler, VAE configuration or tokenizer"
        raise InputError(f"{what} is not that of the base model {base!r}: a delta would lose it; export it whole")
    pipeline.save_weights(folder, half=half)
    told = Delta(pipeline.method, base, origin, dict(pipeline.config.settings), pipeline.model_options())
    write_text(folder / DELTA, json.dumps(asdict(told), indent=1) + "\n")


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
    """What of a base model stands beside its weights."""
    return base_settings(pipeline.vae, pipeline.scheduler, pipeline.tokenizer)
