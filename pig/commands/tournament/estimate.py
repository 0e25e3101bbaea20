"""What a tournament will take: hours of a GPU by counted FLOPs, disk, downloads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from pig.commands.tournament import plan
from pig.commands.tournament.config import Method, Tournament
from pig.costs import SD21, flops_of
from pig.data.subjects import read_subjects
from pig.errors import InputError
from pig.methods import load_pipeline, pipeline_class
from pig.mistakes import read_config
from pig.models.backbone import load_backbone, vae_scale
from pig.models.names import TOYWORLD
from pig.sampling.pipeline import SubjectPipeline
from pig.training.costs import flops_per_sample
from pig.training.module import PersonalisationModule

# Dense bf16 TFLOP/s by the makers' data sheets, and the share of it that trainings of such UNets reach.
GPUS = {"RTX 4090": 165, "A100": 312, "H100": 989}
UTILISATION = 0.35
COUNTED_STEPS = 5  # of a picture
IDS = ("base", "image_encoder", "clip", "dino", "detector", "sam", "model")  # keys of configs that may name a hub's id


def unet_flops(unet: UNet2DConditionModel) -> int:
    """Of a forward pass for one sample; on the meta device."""
    config = unet.config
    with torch.device("meta"):
        size = config.sample_size
        latents, text = torch.empty(1, 4, size, size), torch.empty(1, 77, config.cross_attention_dim)
        return flops_of(lambda: unet(latents, torch.zeros((), dtype=torch.long), text))


def toy_module(method: Method) -> PersonalisationModule | None:
    """The method on the toy world's models, on which its passes are counted; None where it has no config for them."""
    file = Path(method.config).with_name("toyworld.yaml")
    if not file.is_file():
        return None
    told = read_config(str(file))
    path, _, name = told["model"]["class_path"].rpartition(".")
    return getattr(import_module(path), name)(**told["model"]["init_args"])


def passes_of_sample(module: PersonalisationModule) -> float:
    """How many forward passes of the UNet a training sample costs."""
    resolution = module.backbone.unet.config.sample_size * vae_scale(module.vae)
    pictures: Any = SimpleNamespace(resolution=resolution, encoded=lambda: [None])
    return flops_per_sample(module, pictures) / toy_unit(module.backbone.unet)


def passes_of_picture(pipeline: SubjectPipeline, steps: int) -> float:
    """How many a picture of so many steps costs, from one reference; counted in a few steps, reading included."""
    pipeline.set_progress_bar_config(disable=True)
    references = [Image.new("RGBA", (64, 64), (255, 255, 255, 200))] if pipeline.reads_references else []
    told: dict[str, Any] = {
        "class_noun": "mug",
        "num_inference_steps": COUNTED_STEPS,
        "generator": torch.Generator().manual_seed(0),
    }
    flops = flops_of(lambda: pipeline("a photo of a mug", references, **told))
    return flops / toy_unit(pipeline.unet) * steps / COUNTED_STEPS


def toy_unit(unet: UNet2DConditionModel) -> int:
    with torch.device("meta"):
        return unet_flops(UNet2DConditionModel.from_config(unet.config))


def toy_pipeline(method: Method, module: PersonalisationModule | None) -> SubjectPipeline | None:
    if method.kind == "base":
        return load_pipeline(f"base:{TOYWORLD}", "cpu")
    if module is not None and method.kind == "blended":
        settings = {"identifier": module.hparams["identifier"]}
        return pipeline_class("dreamblend").from_backbone(load_backbone(TOYWORLD), base=TOYWORLD, settings=settings)
    return None if module is None else module.pipeline()


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


def number_in(words: Sequence[str], flag: str, default: int) -> int:
    given = [word.partition("=")[2] for word in words if word.startswith(f"--{flag}=")]
    return int(given[-1]) if given and given[-1].isdigit() else default


def estimate(config: Tournament) -> list[tuple[str, str]]:
    """(what, how much), for the full-size UNet."""
    with torch.device("meta"):
        unit = unet_flops(UNet2DConditionModel(**SD21))
    rows = [("UNet, a forward pass", f"{unit / 1e12:.2f} TFLOP")]
    try:
        subjects = read_subjects(config.path(config.subjects))
    except InputError:
        subjects = []
    drawing = config.split(config.drawing)
    pictures = sum(len(one.prompts) for one in subjects) * number_in(drawing, "images_per_prompt", 4)
    steps = number_in(drawing, "steps", 50)
    of_samples, of_pictures, sets = {}, {}, 0
    total = dict.fromkeys(("training", "tuning", "pictures"), 0.0)
    for name, method in config.methods.items():
        _, source = config.weights_of(name)
        module = toy_module(source) if source.config else None
        pipeline = toy_pipeline(method, module)
        of_samples[name] = None if module is None else passes_of_sample(module)
        of_pictures[name] = None if pipeline is None else passes_of_picture(pipeline, steps)
        costs = [
            "not counted" if of is None else f"{of:,.1f} passes, {of * unit / 1e12:,.0f} TFLOP"
            for of in (of_samples[name], of_pictures[name])
        ]
        rows.append((f"{name}: a sample", costs[0])) if method.config else None
        rows.append((f"{name}: a picture of {steps} steps", costs[1]))
    for one in plan.entries(config):
        method = config.methods[one.method]
        # With equal time, all cost what the one does that they are compared with.
        of_sample = of_samples[config.against if one.budget == plan.TIME else one.method] or 0.0
        if method.kind == "trained":
            total["training"] += of_sample * unit * config.samples
        elif method.kind == "tuned":
            total["tuning"] += of_sample * unit * tuning_samples(config, method) * len(subjects)
        drawn = len(plan.conditions(config, one))
        sets += drawn
        total["pictures"] += (of_pictures[one.method] or 0.0) * unit * pictures * drawn
    whole = sum(total.values())
    parts = ", ".join(f"{name} {flops / 1e18:.2f}" for name, flops in total.items())
    rows.append((f"{pictures * sets:,} pictures in {sets} sets; all", f"{whole / 1e18:.2f} EFLOP ({parts})"))
    for gpu, peak in GPUS.items():
        hours = whole / (peak * 1e12 * UTILISATION) / 3600
        rows.append((f"  on one {gpu}", f"{hours:,.0f} hours, at {UTILISATION:.0%} of {peak} TFLOP/s in bf16"))
    if not subjects:
        rows.append(
            ("not counted", f"tuning and pictures: the subjects are not there yet: {config.path(config.subjects)}")
        )
    rows.append(("not counted", "making the data, trials, scores"))
    rows.append(("downloads, unless cached", ", ".join(hub_ids(config)) or "none"))
    return rows


def tuning_samples(config: Tournament, method: Method) -> int:
    """Of a subject's tuning."""
    told, words = read_config(method.config), config.split(method.words)
    return config.batch_size(method) * number_in(words, "trainer.max_steps", told["trainer"].get("max_steps", 0))
