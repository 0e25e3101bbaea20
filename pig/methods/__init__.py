"""The registry of methods, and how a model is loaded whatever its method is.

A method is one package with a `Pipeline` (a `SubjectPipeline`); if it is trained, a `Module` (a
`PersonalisationModule`); and if its authors have published weights, a `release.py` (`is_release`, `from_release`). A
package is imported when its method is asked for, so that `--help` stays fast.

On disk a model is *whole* (a diffusers pipeline folder) or a *delta* (`pig.sampling.delta`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pig.errors import InputError, check_kinds, check_named
from pig.files import read_json
from pig.models.backbone import Backbone, base_digest, check_backbone, load_backbone
from pig.models.names import FORMS, TOYWORLD, WEIGHTS
from pig.models.weights import read_weights
from pig.sampling.delta import DELTA, kept_steps, load_weights, read_delta, tuned_subjects
from pig.sampling.pipeline import SubjectPipeline
from pig.sampling.storing import METHOD_FILE

if TYPE_CHECKING:
    from pig.training.module import PersonalisationModule

METHODS = {
    "base": "pig.methods.base",
    "bootpig": "pig.methods.bootpig",
    "dreamblend": "pig.methods.dreamblend",
    "dreambooth": "pig.methods.dreambooth",
    "ezigen": "pig.methods.ezigen",
    "instantbooth": "pig.methods.instantbooth",
    "ip_adapter": "pig.methods.ip_adapter",
    "textual_inversion": "pig.methods.textual_inversion",
}
BLEND = "dreamblend:"  # before a folder made by `tune`
EMBEDDED = "bootpig"  # what `toyworld` stands for
WHOLE = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".th", ".joblib", ".npy", ".npz")


def pipeline_class(method: str) -> type[SubjectPipeline]:
    check_named("method", method, tuple(METHODS))
    return import_module(METHODS[method]).Pipeline


def module_class(method: str) -> type[PersonalisationModule]:
    check_named("method", method, tuple(METHODS))
    found = getattr(import_module(METHODS[method]), "Module", None)
    if found is None:
        raise InputError(f"the method {method} is not trained: it has no module")
    return found


@dataclass(frozen=True)
class Source:
    """Where a model lies, and what its small files say of it. folder: None for a base model alone. tuned: a folder of
    several subjects' weights; blended: of which two checkpoints draw together."""

    method: str
    folder: Path | None
    settings: Mapping[str, Any]
    base: str | None = None
    tuned: bool = False
    blended: bool = False


def find_model(model: str | Path) -> Source:
    """Look a model up by reading its small files only.

    Raises:
        InputError: there is no such model; names what can be given.
    """
    name = str(model)
    if name.startswith("base:"):
        return Source("base", None, {}, name.removeprefix("base:"))
    if name == f"{TOYWORLD}/base":
        return Source("base", None, {}, TOYWORLD)
    if name.startswith(BLEND):
        inner = find_model(name.removeprefix(BLEND))
        if not inner.tuned or inner.method != "dreambooth":
            raise InputError(
                f"{name}: DreamBlend draws with the checkpoints of DreamBooth: give {BLEND}FOLDER, made by `tune`"
            )
        return replace(inner, method="dreamblend", blended=True)
    folder = Path(name)
    if name == TOYWORLD or name.startswith(f"{TOYWORLD}/"):
        method = name.partition("/")[2] or EMBEDDED
        folder = WEIGHTS / method
        if method not in METHODS or not (folder / DELTA).is_file():
            raise InputError(f"no embedded model {name!r}; there are: {', '.join(embedded_models())}")
    if (folder / DELTA).is_file():
        delta = read_delta(folder)
        return Source(delta.method, folder, delta.settings, delta.base)
    if subjects := tuned_subjects(folder):
        delta = read_delta(list(next(iter(subjects.values())).values())[-1])
        return Source(delta.method, folder, delta.settings, delta.base, tuned=True)
    if steps := kept_steps(folder):
        raise InputError(
            f"{model} holds several steps of one subject: give one, such as --model {[*steps.values()][-1]}"
        )
    index = read_json(folder / WHOLE, f"{model} is no model: give {FORMS}")
    if (folder / METHOD_FILE).is_file():
        method = str(read_json(folder / METHOD_FILE, "").get("method"))
        check_named(f"the method of {folder}", method, tuple(METHODS))
        settings = index.get("settings") or {}
        check_kinds({"settings": settings}, {"settings": Mapping}, str(folder / WHOLE))
        return Source(method, folder, settings, index.get("base"))
    if index.get("_class_name") == "StableDiffusionPipeline":
        raise InputError(f"{model} is a Stable Diffusion without a method: draw with it by --model base:{model}")
    raise InputError(f"{model} is a {index.get('_class_name')}, of no method known here ({', '.join(METHODS)})")


def embedded_models() -> list[str]:
    """The names of the models that come with the package."""
    methods = sorted(path.parent.name for path in WEIGHTS.glob(f"*/{DELTA}"))
    return [TOYWORLD, *(f"{TOYWORLD}/{name}" for name in methods if name != EMBEDDED), f"base:{TOYWORLD}"]


def models_at(model: str) -> list[str]:
    """The models that a name stands for: itself; of a folder of models, those in it, up to two levels down. Of a
    subject that was tuned, the last kept step.

    Raises:
        InputError: there is no model.
    """
    folder = Path(model)
    own = any((folder / name).is_file() for name in (WHOLE, DELTA))
    if own or not folder.is_dir() or model.startswith((TOYWORLD, BLEND, "base:")):
        find_model(model)
        return [model]
    found = []
    for one in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any((one / name).is_file() for name in (WHOLE, DELTA)):
            found.append(str(one))
        elif steps := kept_steps(one):
            found.append(str([*steps.values()][-1]))
    if not found:
        raise InputError(f"{model} holds no models: give {FORMS}, or a folder of such folders")
    return found


def load_pipeline(model: str | Path, device: str | torch.device | None = None) -> SubjectPipeline:
    """The pipeline of a model; by default on the GPU if there is one.

    Args:
        model: a folder made by `export` (whole or delta), `toyworld` (the embedded BootPIG), `toyworld/METHOD`, or
            `base:NAME` (a folder, hub id or `toyworld`).

    Raises:
        InputError: it is no model, a torn one, one of another base model, or one that holds pickles, which can run
            code when loaded.
    """
    source = find_model(model)
    if source.tuned:
        assert source.folder is not None
        example = next(iter(tuned_subjects(source.folder).values()))
        raise InputError(
            f"{source.folder} holds several subjects: draw them by `generate --model {model} --subjects DIR`, or give "
            f"a subject's step, such as {[*example.values()][-1]}"
        )
    if source.folder is None:
        assert source.base is not None
        backbone = load_backbone(source.base)
        pipeline = pipeline_class("base").from_backbone(backbone, base=source.base, settings=source.settings)
    elif (source.folder / DELTA).is_file():
        pipeline = _load_delta(source.folder)
    else:
        pipeline = _load_whole(source.folder, pipeline_class(source.method))
    pipeline.set_progress_bar_config(disable=None)
    return pipeline.to(device or default_device())


def load_blend(early: Path, late: Path, device: str | torch.device | None = None) -> SubjectPipeline:
    """DreamBlend on two checkpoints of one tuning, as deltas."""
    pipelines = [load_pipeline(folder, "cpu") for folder in (early, late)]
    blend = import_module(METHODS["dreamblend"]).Pipeline.of(*pipelines)
    blend.set_progress_bar_config(disable=None)
    return blend.to(device or default_device())


def load_release(file: Path, base: str) -> SubjectPipeline:
    """A model from a checkpoint of its authors' release, of whatever method.

    Raises:
        InputError: no method knows this file, or it does not fit the base model.
    """
    weights = read_weights(file)
    for package in METHODS.values():
        if find_spec(f"{package}.release") is not None:
            release = import_module(f"{package}.release")
            if release.is_release(weights):
                return release.from_release(weights, load_backbone(base), base)
    raise InputError(
        f"{file} is no checkpoint of a release known here: EZIGen's model.safetensors, or an IP-Adapter whose "
        "image_proj is one linear layer"
    )


def load_module(checkpoint: Path) -> PersonalisationModule:
    """The module of a checkpoint of `fit`, of whatever method, with its EMA weights if it has any."""
    from pig.training.checkpoints import averaged_weights, load_checkpoint

    state = load_checkpoint(checkpoint)
    method = str(state.get("pig_method", "")).lower()
    if method not in METHODS:
        raise InputError(f"{checkpoint} is no checkpoint of a method known here ({', '.join(METHODS)})")
    check_kinds(state, {"state_dict": dict, "hyper_parameters": dict}, str(checkpoint))
    # Names with an underscore are LightningCLI's own.
    told = {name: value for name, value in state["hyper_parameters"].items() if not name.startswith("_")}
    try:
        module = module_class(method)(**told)
    except TypeError as error:
        raise InputError(f"{checkpoint} holds other settings than {method} has: {error}") from error
    module.load_state_dict(averaged_weights(state))
    return module


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load_whole(folder: Path, kind: type[SubjectPipeline]) -> SubjectPipeline:
    pickles = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICKLES)
    if pickles:
        raise InputError(
            f"{folder} holds {pickles[0].relative_to(folder)}, a pickle, which can run any code: only safetensors "
            "are loaded. Convert it where you trust it, or remove it"
        )
    try:
        pipeline = kind.from_pretrained(folder, use_safetensors=True)
    except InputError:
        raise
    except Exception as error:  # of whichever library reads this part of somebody's folder
        raise InputError(f"{folder} is a torn model: {(str(error).strip() or repr(error)).splitlines()[0]}") from error
    if pipeline.kept_apart:
        load_weights(pipeline, folder)
    denoiser = getattr(pipeline, pipeline.denoiser)
    check_backbone(Backbone(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, denoiser, pipeline.scheduler))
    return pipeline


def _load_delta(folder: Path) -> SubjectPipeline:
    delta = read_delta(folder)
    backbone = load_backbone(delta.base)
    found = base_digest(backbone)
    if found != delta.base_digest:
        raise InputError(
            f"{folder} was trained on another base model ({delta.base_digest[:12]}) than {delta.base!r} is now "
            f"({found[:12]})"
        )
    kind = pipeline_class(delta.method)
    try:
        pipeline = kind.from_backbone(backbone, base=delta.base, settings=delta.settings, **delta.options)
    except TypeError as error:
        raise InputError(f"{folder / DELTA} names options that {delta.method} does not have: {error}") from error
    load_weights(pipeline, folder)
    return pipeline
