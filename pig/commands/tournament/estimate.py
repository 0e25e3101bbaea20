"""What a tournament will take: hours of a GPU by counted FLOPs, disk, downloads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from pig.commands.tournament import plan
from pig.commands.tournament.config import Method, Tournament
from pig.costs import SD21, flops_of
from pig.data.subjects import read_subjects
from pig.errors import InputError
from pig.mistakes import read_config
from pig.models.names import TOYWORLD
from pig.training.costs import flops_per_sample
from pig.training.module import PersonalisationModule

# Dense bf16 TFLOP/s by the makers' data sheets, and the share of it that trainings of such UNets reach.
GPUS = {"RTX 4090": 165, "A100": 312, "H100": 989}
UTILISATION = 0.35
IDS = ("base", "image_encoder", "clip", "dino", "detector", "sam", "model")  # keys of configs that may name a hub's id


def unet_flops(unet: UNet2DConditionModel) -> int:
    """Of a forward pass for one sample; on the meta device."""
    config = unet.config
    with torch.device("meta"):
        size = config.sample_size
        latents, text = torch.empty(1, 4, size, size), torch.empty(1, 77, config.cross_attention_dim)
        return flops_of(lambda: unet(latents, torch.zeros((), dtype=torch.long), text))


def passes_of(method: Method) -> float | None:
    """How many forward passes of the UNet a training sample costs, counted on the toy world's models; None where the
    method has no config for them."""
    file = Path(method.config).with_name("toyworld.yaml")
    if not file.is_file():
        return None
    told = read_config(str(file))
    path, _, name = told["model"]["class_path"].rpartition(".")
    module: PersonalisationModule = getattr(import_module(path), name)(**told["model"]["init_args"])
    pictures: Any = SimpleNamespace(resolution=told["data"]["init_args"]["resolution"], encoded=lambda: [None])
    of_sample = flops_per_sample(module, pictures)
    with torch.device("meta"):
        unit = unet_flops(UNet2DConditionModel.from_config(module.backbone.unet.config))
    return of_sample / unit


def hub_ids(config: Tournament) -> list[str]:
    """Names in the configs that are no files here: what will be downloaded, if it is not in the cache yet."""
    trees = [read_config(config.scorer), {"base": config.base.removeprefix("base:")}]
    trees += [read_config(word) for line in config.data for word in config.split(line) if word.endswith(".yaml")]
    for method in config.methods.values():
        if method.config:
            told = read_config(method.config)
            for word in config.split(method.words):
                if word.startswith("--model."):
                    name, _, value = word.removeprefix("--model.").partition("=")
                    told["model"]["init_args"][name] = value
            trees.append(told)
    found = {name for tree in trees for name in _named(tree)}
    return sorted(name for name in found if name != TOYWORLD and not Path(name).exists())


def _named(tree: Any) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name in IDS and isinstance(value, str) and tree.get("captioner") != "chat":  # which a server has
                yield value
            yield from _named(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _named(value)


def estimate(config: Tournament) -> list[tuple[str, str]]:
    """(what, how much), for the full-size UNet."""
    with torch.device("meta"):
        unit = unet_flops(UNet2DConditionModel(**SD21))
    trained = [one for one in plan.entries(config) if config.methods[one.method].kind == "trained"]
    passes = {name: passes_of(method) for name, method in config.methods.items() if method.kind == "trained"}
    rows = [("UNet, a forward pass", f"{unit / 1e12:.2f} TFLOP")]
    own = passes[config.against]
    total = 0.0
    for one in trained:
        # With equal time, all cost what the one does that they are compared with.
        count = own if one.budget == plan.TIME else passes[one.method]
        total += (count or 0.0) * unit * config.samples
    for name, of in passes.items():
        cost = "not counted" if of is None else f"{of:.1f} passes, {of * unit / 1e12:.1f} TFLOP"
        rows.append((f"{name}, a sample", cost))
    rows.append((f"{len(trained)} trainings of {config.samples} samples", f"{total / 1e18:.2f} EFLOP"))
    for gpu, peak in GPUS.items():
        hours = total / (peak * 1e12 * UTILISATION) / 3600
        rows.append((f"  on one {gpu}", f"{hours:,.0f} hours, at {UTILISATION:.0%} of {peak} TFLOP/s in bf16"))
    drawn = sum(len(plan.conditions(config, one)) for one in plan.entries(config))
    try:
        prompts = sum(len(one.prompts) for one in read_subjects(config.path(config.subjects)))
        rows.append(("pictures", f"{prompts * drawn:,} of each seed, in {drawn} sets; not in these hours"))
    except InputError:
        rows.append(("pictures", f"{drawn} sets; the subjects are not there yet: {config.path(config.subjects)}"))
    rows.append(("downloads, unless cached", ", ".join(hub_ids(config)) or "none"))
    return rows
