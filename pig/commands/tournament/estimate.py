"""What a tournament will take at full size: hours of a GPU by counted FLOPs, disk, downloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pig.commands.tournament import plan
from pig.commands.tournament.checks import source_of
from pig.commands.tournament.config import Method, Tournament, last
from pig.costs import SD21, SD21_VAE, flops_of
from pig.data.subjects import read_subjects
from pig.errors import InputError
from pig.methods import load_pipeline, pipeline_class
from pig.mistakes import read_config, values_of
from pig.models.backbone import load_backbone, vae_scale
from pig.models.names import TOYWORLD
from pig.sampling.pipeline import SubjectPipeline
from pig.sampling.settings import controls
from pig.training.costs import flops_per_sample
from pig.training.module import PersonalisationModule
from pig.training.tuned import TunedModule

# Dense bf16 TFLOP/s by the makers' data sheets, and the share of it that trainings of such UNets reach.
GPUS = {"RTX 4090": 165, "A100": 312, "H100": 989}
UTILISATION = 0.35
# Bytes on disk of each trained weight. Of a method that is trained once: its exported weights (half precision), and its
# last checkpoint with the optimizer's two moments. Of a tuned one: each kept step, in half precision or not.
TRAINED_BYTES, TUNED_BYTES = 2 + 3 * 4, {True: 2, False: 4}
COUNTED_STEPS = (3, 6)  # of a picture
LIKE_THE_FULL = ("gradient_checkpointing",)  # a training's settings that change what a sample costs
IDS = ("base", "image_encoder", "clip", "dino", "detector", "sam", "model")  # keys of configs that may name a hub's id


def unet_flops(unet: UNet2DConditionModel, tokens: int = 77, size: int | None = None) -> int:
    """Of a forward pass for one sample with a text of so many tokens; on the meta device. size: a side of the latents,
    by default that of the config."""
    config = unet.config
    with torch.device("meta"):
        size = size or config.sample_size
        latents, text = torch.empty(1, 4, size, size), torch.empty(1, tokens, config.cross_attention_dim)
        return flops_of(lambda: unet(latents, torch.zeros((), dtype=torch.long), text))


def toy_module(method: Method) -> PersonalisationModule | None:
    """The method on the toy world's models, on which its passes are counted; None where it has no config for them."""
    file, told = Path(method.config), read_config(method.config)
    variant = file.stem.partition("_")[2]
    beside = [file.with_name(name) for name in (f"toyworld_{variant}.yaml", "toyworld.yaml")]
    found = next((one for one in beside if one.is_file()), None)
    if found is None:
        return None
    toy = read_config(str(found))["model"]
    path, _, name = toy["class_path"].rpartition(".")
    given = {key: told["model"]["init_args"][key] for key in LIKE_THE_FULL if key in told["model"]["init_args"]}
    return getattr(import_module(path), name)(**{**toy["init_args"], **given})


@dataclass(frozen=True)
class Passes:
    """How much of each network some work takes: forward passes of the UNet (all else that it does but the VAE's counted
    as such), pictures encoded and decoded by the VAE."""

    unet: float
    encoded: float
    decoded: float

    def up_to(self, later: Passes, share: float) -> Passes:
        """On the line from this one to `later`, whose share is 1."""
        return Passes(*(a + (b - a) * share for a, b in zip(astuple(self), astuple(later), strict=True)))

    def flops(self, full: Passes) -> float:
        """full: FLOPs of one pass of each."""
        return sum(count * each for count, each in zip(astuple(self), astuple(full), strict=True))


def vae_flops(vae: AutoencoderKL, size: int) -> tuple[int, int]:
    """Of encoding and of decoding a picture of so many pixels a side. vae: on the meta device."""
    side = size // vae_scale(vae)
    with torch.device("meta"):
        pixels, latents = torch.empty(1, 3, size, size), torch.empty(1, vae.config.latent_channels, side, side)
        return flops_of(lambda: vae.encoder(pixels)), flops_of(lambda: vae.decoder(latents))


def passes_of(work: Callable[[], int], vae: AutoencoderKL) -> Passes:
    """Of work that returns its FLOPs, on the toy world's networks. vae: that it encodes and decodes with."""
    calls = {"encoder": 0, "decoder": 0}

    def note(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            calls[name] += len(args[0])

        return hook

    hooks = [getattr(vae, name).register_forward_pre_hook(note(name)) for name in calls]
    try:
        flops = work()
    finally:
        for one in hooks:
            one.remove()
    toy = toy_units()
    rest = flops - calls["encoder"] * toy.encoded - calls["decoder"] * toy.decoded
    return Passes(rest / toy.unet, calls["encoder"], calls["decoder"])


def passes_of_sample(module: PersonalisationModule) -> Passes:
    """Of a training sample."""
    resolution = module.backbone.unet.config.sample_size * vae_scale(module.vae)
    pictures: Any = SimpleNamespace(resolution=resolution, encoded=lambda: [None])
    if isinstance(module, TunedModule):  # which does not encode its pictures again
        return Passes(flops_per_sample(module, pictures) / toy_units().unet, 0, 0)
    return passes_of(lambda: flops_per_sample(module, pictures), module.vae)


def passes_of_picture(pipeline: SubjectPipeline, references: int, steps: int, settings: Mapping[str, Any]) -> Passes:
    """Of a picture of so many steps; counted in two small numbers of steps, reading included."""
    pipeline.set_progress_bar_config(disable=True)
    cutouts = [Image.new("RGBA", (64, 64), (255, 255, 255, 200))] * references if pipeline.reads_references else []

    def counted(count: int) -> Passes:
        told: dict[str, Any] = {"class_noun": "mug", "generator": torch.Generator().manual_seed(0), **settings}
        draw = partial(pipeline, "a photo of a mug", cutouts, num_inference_steps=count, **told)
        return passes_of(lambda: flops_of(draw), pipeline.vae)

    few, more = COUNTED_STEPS
    return counted(few).up_to(counted(more), (steps - few) / (more - few))


@cache
def toy_units() -> Passes:
    """FLOPs of a forward pass of the toy world's UNet, and of encoding and decoding a picture."""
    toy = load_backbone(TOYWORLD)
    with torch.device("meta"):
        unet, vae = (type(one).from_config(one.config) for one in (toy.unet, toy.vae))
    size = unet.config.sample_size * vae_scale(vae)
    return Passes(unet_flops(unet, toy.tokenizer.model_max_length), *vae_flops(vae, size))


def toy_pipeline(method: Method, module: PersonalisationModule | None) -> SubjectPipeline | None:
    if method.kind == "base":
        return load_pipeline(f"base:{TOYWORLD}", "cpu")
    if module is not None and method.kind == "blended":
        settings = {"identifier": module.hparams["identifier"]}
        return pipeline_class("dreamblend").from_backbone(load_backbone(TOYWORLD), base=TOYWORLD, settings=settings)
    return None if module is None else module.pipeline()


def settings_of(pipeline: type[SubjectPipeline], source: Method, words: Sequence[str]) -> dict[str, Any]:
    """Controls that the full-size config, and words of `generate`, set."""
    told = read_config(source.config)["model"]["init_args"] if source.config else {}
    for word in words:
        name, given, value = word.removeprefix("--").partition("=")
        told[name] = yaml.safe_load(value) if given else True
    names = {one.name for one in controls(pipeline.Settings)} - {"num_inference_steps", "identifier", "scheduler"}
    return {name: value for name, value in told.items() if name in names}


def hub_ids(config: Tournament) -> list[str]:
    """Models that the configs name and that are not on this disk: hub ids, which are downloaded, and files, which you
    must provide."""
    trees = [read_config(config.scorer), {"base": config.base.removeprefix("base:")}]
    trees += [read_config(file) for file, _ in chains_of_data(config)]
    for line in (*config.data, config.drawing, config.scoring):
        words = config.split(line)
        trees += [{name: value} for name in IDS for value in values_of(words, f"--{name}")]
    base = config.base.removeprefix("base:")
    trees += [{"model": one} for name in config.methods for one in further_models(config, name, base)]
    for method in config.methods.values():
        if method.config:
            told = read_config(method.config)
            for word in config.split(method.words):
                if word.startswith("--model."):
                    name, _, value = word.removeprefix("--model.").partition("=")
                    told["model"]["init_args"][name] = value
            if last([*config.split(config.fit), *config.split(method.words)], "trainer.limit_val_batches") == "0":
                told["trainer"].pop("callbacks")  # which load networks to validate by
            trees.append(told)
    found = {name for tree in trees for name in _named(tree)}
    return sorted(name for name in found if name != TOYWORLD and not Path(name).exists())


def further_models(config: Tournament, name: str, base: str) -> tuple[str, ...]:
    """That a method loads to draw, with the words of its own and of its trials."""
    kind = pipeline_class(source_of(config, name).method)
    _, source = config.weights_of(name)
    found: dict[str, None] = {}
    for trial in config.methods[plan.tried(config, name)].trials or [""]:
        words = plan.words_of(config, name, config.split(trial))
        found |= dict.fromkeys(kind.further_models(base, settings_of(kind, source, words)))
    return tuple(found)


def chains_of_data(config: Tournament) -> Iterator[tuple[str, list[str]]]:
    """The config of each chain of data generation, and its overrides."""
    for line in config.data:
        words = config.split(line)
        if words[:1] == ["data_gen"] and len(words) > 1 and words[1].endswith(".yaml"):
            yield words[1], [word for word in words[2:] if "=" in word]


def flops_of_data(config: Tournament, unet: UNet2DConditionModel, vae: AutoencoderKL) -> float:
    """Of the pictures that data generation draws; without captions and masks, and without pictures drawn again."""
    total = 0.0
    for file, over in chains_of_data(config):
        told = OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(over))
        images = {"per_caption": 1, "size": 512, "steps": 25, **told.images}  # the defaults of data generation
        pictures = told.captions.count * images["per_caption"]
        _, decoding = vae_flops(vae, images["size"])
        total += pictures * (images["steps"] * 2 * unet_flops(unet, size=images["size"] // 8) + decoding)
    return total


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
        unet, vae = UNet2DConditionModel(**SD21), AutoencoderKL(**SD21_VAE)
    full, size = Passes(unet_flops(unet), *vae_flops(vae, unet.config.sample_size * 8)), unet.num_parameters()
    rows = [
        ("UNet, a forward pass", f"{full.unet / 1e12:.2f} TFLOP"),
        ("VAE, encoding; decoding a picture", f"{full.encoded / 1e12:.2f}; {full.decoded / 1e12:.2f} TFLOP"),
    ]
    left_out = ["captions, masks and rejected pictures of the data, and its disk", "trials", "scores"]
    try:
        prompts = Path(config.path(config.prompts)) if config.prompts else None
        subjects = read_subjects(config.path(config.subjects), prompts)
    except InputError as error:
        subjects = []
        left_out.append(f"tunings and pictures: {error}")
    pictures = sum(len(one.prompts) for one in subjects) * config.images_per_prompt()
    of_samples: dict[str, float] = {}  # FLOPs
    weights: dict[str, float] = {}  # trained ones
    of_pictures: dict[tuple[str, str], float] = {}  # of a method under a condition
    for name, method in tqdm(config.methods.items(), desc="counting FLOPs on small models", leave=False):
        _, source = config.weights_of(name)
        module = toy_module(source) if source.config else None
        pipeline = toy_pipeline(method, module)
        if method.config and module is not None:
            a_sample = passes_of_sample(module)
            of_samples[name] = a_sample.flops(full)
            trained = sum(one.numel() for one in module.trainable().values())
            weights[name] = trained / module.backbone.unet.num_parameters() * size
            rows.append((f"{name}: a sample", cost(a_sample, full)))
        if pipeline is None:
            left_out.append(name)
            continue
        entry = next(one for one in plan.entries(config) if one.method == name)
        words = config.split(method.drawn)
        steps = config.number("steps", config.number("num_inference_steps", 50, words), words)
        counted: dict[tuple[int, str], Passes] = {}  # whole and partial pictures cost the same
        for given in plan.conditions(config, entry):
            references = config.number("references_per_subject", 1, given.words)
            settings = settings_of(type(pipeline), source, [*words, *given.words])
            key = (references, str(settings))
            if key not in counted:
                counted[key] = passes_of_picture(pipeline, references, steps, settings)
            of_pictures[name, given.name] = counted[key].flops(full)
            rows.append((f"{name}: a picture" + (f", {given.name}" if given.name else ""), cost(counted[key], full)))
    total, sets = {"data": flops_of_data(config, unet, vae), "training": 0.0, "tuning": 0.0, "pictures": 0.0}, 0
    priors: dict[str, dict[str, Any]] = {}  # by their folder
    for one in plan.entries(config):
        method = config.methods[one.method]
        # With equal time, all cost what the one does that they are compared with.
        of_sample = of_samples.get(config.against if one.budget == plan.TIME else one.method, 0.0)
        if method.kind == "trained":
            total["training"] += of_sample * config.samples
        elif method.kind == "tuned":
            total["tuning"] += of_sample * tuning_samples(config, method) * len(subjects)
            if prior := config.prior_of(method):
                priors[prior["folder"]] = prior
        for given in plan.conditions(config, one):
            sets += 1
            total["pictures"] += of_pictures.get((one.method, given.name), 0.0) * pictures
    classes = len({subject.class_noun for subject in subjects})
    for prior in priors.values():  # methods and seeds may share their class pictures
        total["tuning"] += classes * prior["count"] * Passes(prior["steps"] * 2, 0, 1).flops(full)
    whole = sum(total.values())
    parts = ", ".join(f"{name} {flops / 1e18:.2f}" for name, flops in total.items())
    rows.append((f"{pictures * sets:,} pictures in {sets} sets; all", f"{whole / 1e18:.2f} EFLOP ({parts})"))
    for gpu, peak in GPUS.items():
        hours = whole / (peak * 1e12 * UTILISATION) / 3600
        rows.append((f"  on one {gpu}", f"{hours:,.0f} hours, at {UTILISATION:.0%} of {peak} TFLOP/s in bf16"))
    models = sum(
        weights.get(one.method, 0.0) * bytes_of_weight(config, one, len(subjects)) for one in plan.entries(config)
    )
    most = pictures * sets * 3 * (unet.config.sample_size * 8) ** 2
    rows.append(("on disk", f"{models / 1e9:,.0f} GB of models, at most {most / 1e9:,.0f} GB of pictures"))
    rows.append(("not counted", "; ".join(left_out)))
    rows.append(("needed: downloads, files", ", ".join(hub_ids(config)) or "none"))
    return rows


def cost(passes: Passes, full: Passes) -> str:
    pictures = {"encoded": passes.encoded, "decoded": passes.decoded}
    told = [f"{passes.unet:,.1f} passes", *(f"{count:.0f} {what}" for what, count in pictures.items() if count)]
    return f"{', '.join(told)}: {passes.flops(full) / 1e12:,.1f} TFLOP"


def bytes_of_weight(config: Tournament, entry: plan.Entry, subjects: int) -> int:
    """On disk, of each trained weight of an entry, which draws with weights of its own."""
    method = config.methods[entry.method]
    if method.kind == "tuned":
        said = last(config.split(method.words), "model.save_half")
        half = read_config(method.config)["model"]["init_args"].get("save_half", False) if said is None else said
        return TUNED_BYTES[half in (True, "true")] * len(config.kept_steps(method)) * subjects
    return TRAINED_BYTES


def tuning_samples(config: Tournament, method: Method) -> int:
    """Of a subject's tuning, class pictures among them."""
    return config.batch_size(method) * max(config.kept_steps(method)) * (2 if config.prior_of(method) else 1)
