"""What every method promises, over the registry: a new method passes this or is not one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUIET, generate
from diffusers import StableDiffusionPipeline
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from pig import cli, methods
from pig.commands.export import export
from pig.data.modules import PersonalisationData, TripletDataModule
from pig.data.subject_training import ClassPictures, SubjectDataModule
from pig.data.subjects import read_subjects
from pig.data.transforms import ReferenceAugmentation
from pig.errors import InputError
from pig.evaluation.benchmark import Photographs, evaluate
from pig.methods import METHODS, load_module, load_pipeline, pipeline_class
from pig.methods.dreambooth.pipeline import DreamBoothSettings
from pig.models.backbone import SCHEDULERS, base_digest, load_backbone
from pig.sampling.pipeline import SubjectPipeline
from pig.training.memory import memory_table
from pig.training.module import PersonalisationModule
from pig.training.tuned import draw_class_pictures

TOY = "toy_method"  # of this folder: what CONTRIBUTING's recipe gives
TRAINED = [*(name for name in METHODS if hasattr(import_module(METHODS[name]), "Module")), TOY]
PROMPTS = ["a photo of a mug, on a beach", "a photo of a mug, in space"]
PROMISING = [name for name in METHODS if pipeline_class(name).without_references is not None]


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    """The one line of the registry."""
    monkeypatch.setitem(methods.METHODS, TOY, TOY)


# `sks` is three tokens of the toy's vocabulary.
OPTIONS: dict[str, dict[str, Any]] = {method: {"identifier": "sks"} for method in ("dreambooth", "instantbooth")}
TUNED = ("dreambooth", "textual_inversion")


def make_module(method: str) -> PersonalisationModule:
    return methods.module_class(method)("toyworld", **OPTIONS.get(method, {}))  # type: ignore[call-arg]


def make_pipeline(method: str) -> SubjectPipeline:
    """Untrained."""
    if method == "dreamblend":  # early and late alike
        settings = {"identifier": "sks"}
        return pipeline_class(method).from_backbone(load_backbone("toyworld"), base="toyworld", settings=settings)
    return load_pipeline("base:toyworld", "cpu") if method == "base" else make_module(method).pipeline()


def data_of(toy_data: Path, method: str) -> PersonalisationData:
    """Of four samples a step."""
    if method in TUNED:
        prior = ClassPictures(str(toy_data / "class_pictures"), count=2, steps=1) if method == "dreambooth" else None
        size = 2 if prior else 4
        if prior:
            told = {"text_guidance": DreamBoothSettings.text_guidance}
            draw_class_pictures(
                "toyworld", base_digest(load_backbone("toyworld")), "mug", prior, told, torch.device("cpu")
            )
        return SubjectDataModule(str(toy_data / "subjects/mug_006"), resolution=64, batch_size=size, prior=prior)
    seen = ReferenceAugmentation(background="black") if method == "instantbooth" else None
    return TripletDataModule(str(toy_data / "triplets"), batch_size=4, resolution=64, num_workers=0, augmentation=seen)


def fit(module: PersonalisationModule, toy_data: Path, steps: int, folder: Path, resume: Path | None = None) -> Path:
    """Checkpoint of the last step."""
    quiet = {**QUIET, "enable_checkpointing": True}
    keep = ModelCheckpoint(folder, filename=f"{steps}", every_n_train_steps=steps, save_top_k=-1)
    trainer = Trainer(max_steps=steps, callbacks=[keep], gradient_clip_val=1.0, default_root_dir=folder, **quiet)
    trainer.fit(module, data_of(toy_data, module.method), ckpt_path=resume, weights_only=True)
    return folder / f"{steps}.ckpt"


def mostly_slow(known: list[str]) -> list[Any]:
    """One method and CONTRIBUTING's in the gate, the others with the slow tests."""
    return [one if one in ("bootpig", TOY) else pytest.param(one, marks=pytest.mark.slow) for one in known]


@pytest.fixture(scope="module")
def trained(toy_data, tmp_path_factory) -> Callable[[str], Path]:
    """The checkpoint of a method after two steps."""

    @cache
    def checkpoint(method: str) -> Path:
        return fit(make_module(method), toy_data, 2, tmp_path_factory.mktemp(method))

    return checkpoint


@pytest.fixture(scope="module")
def cutouts(toy_data) -> list[Image.Image]:
    return read_subjects(toy_data / "subjects")[6].references(2)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipeline: SubjectPipeline, prompt: Any, cutouts: list[Image.Image], **more: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, cutouts, class_noun="mug", num_inference_steps=3, output_type="pt", **more).images


@pytest.mark.parametrize("method", TRAINED)
def test_each_trainable_parameter_gets_a_gradient_and_no_frozen_one(toy_data, method) -> None:
    module = make_module(method)
    batch = next(iter(data_of(toy_data, method).train_dataloader()))
    torch.manual_seed(0)
    with torch.no_grad():  # as in training: a layer that starts as none would hide what lies behind it
        for parameter in module.trainable().values():
            parameter += 0.01 * torch.randn_like(parameter)
    loss, t = module.losses(batch, training=True)
    assert loss.shape == t.shape == (4,)
    loss.mean().backward()
    trainable = module.trainable()
    assert set(trainable) == {name for of in module.trainable_groups().values() for name in of}
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().max() > 0)) == (name in trainable), name


@pytest.mark.parametrize("method", TRAINED)
def test_memory_is_counted_without_training(toy_data, method) -> None:
    module = make_module(method)
    rows = memory_table(module, data_of(toy_data, method))
    assert rows["gradients"] == sum(one.nbytes for one in module.trainable().values())
    assert rows["activations"] > 0


@pytest.mark.parametrize("method", mostly_slow(TRAINED))
def test_whole_and_delta_draw_the_same_pixels_as_the_module(trained, cutouts, tmp_path, method) -> None:
    expected = draw(load_module(trained(method)).pipeline(), PROMPTS[0], cutouts, generator=seeds(1))
    export(tmp_path / "whole", checkpoint=trained(method))
    export(tmp_path / "delta", checkpoint=trained(method), delta=True)
    export(tmp_path / "again", model=str(tmp_path / "whole"), delta=True)
    export(tmp_path / "back", model=str(tmp_path / "delta"))
    for name in ("whole", "delta", "again", "back"):
        pipeline = load_pipeline(tmp_path / name, "cpu")
        assert pipeline.method == method
        assert torch.equal(draw(pipeline, PROMPTS[0], cutouts, generator=seeds(1)), expected), name
        suffixes = {path.suffix for path in (tmp_path / name).rglob("*") if path.is_file()}
        assert suffixes <= {".json", ".safetensors", ".txt", ".md", ".py"}
    size = {name: sum(path.stat().st_size for path in (tmp_path / name).rglob("*.*")) for name in ("whole", "delta")}
    assert size["delta"] < (0.9 if method == "dreambooth" else 0.6) * size["whole"]  # all of the UNet


@pytest.mark.parametrize("method", mostly_slow(TRAINED))
def test_a_resumed_run_equals_an_uninterrupted_one(toy_data, trained, tmp_path, method) -> None:
    torch.manual_seed(1)  # whatever else is drawn by chance must not matter
    whole = torch.load(fit(make_module(method), toy_data, 4, tmp_path / "whole"), weights_only=True)
    resumed = fit(make_module(method), toy_data, 4, tmp_path / "resumed", resume=trained(method))
    again = torch.load(resumed, weights_only=True)
    assert whole["state_dict"].keys() == again["state_dict"].keys()
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, again["state_dict"][name]), name


@pytest.mark.parametrize("method", mostly_slow([*METHODS, TOY]))
def test_a_seed_gives_the_same_picture_whatever_the_batch(cutouts, method) -> None:
    pipeline = make_pipeline(method)
    together = draw(pipeline, PROMPTS, cutouts, num_images_per_prompt=2, generator=seeds(1, 2, 1, 2))
    alone = draw(pipeline, PROMPTS[1], cutouts, generator=seeds(2))
    torch.testing.assert_close(together[3:], alone, atol=1e-4, rtol=1e-4)
    own = seeds(2)  # goes on behind the noise that the drawing would have taken from it
    latents = torch.randn(1, 4, 16, 16, generator=own[0])
    assert torch.equal(draw(pipeline, PROMPTS[1], cutouts, latents=latents, generator=own), alone)
    told = {"class_noun": "mug", "num_inference_steps": 1}
    (pictures,) = pipeline(PROMPTS[0], cutouts, output_type="np", return_dict=False, **told)
    assert pictures.shape == (1, 64, 64, 3)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    ancestral = {"scheduler": "ddpm", "num_images_per_prompt": 2}
    one, two = (draw(pipeline, PROMPTS[0], cutouts, generator=seeds(3, 4), **ancestral) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.allclose(one[0], one[1])


@pytest.mark.parametrize("scheduler", ["unipc", "ddpm"])
@pytest.mark.parametrize("method", PROMISING)
def test_without_references_diffusers_own_pipeline(cutouts, method, scheduler) -> None:
    """Bit for bit, guidance included."""
    base = load_pipeline("base:toyworld", "cpu")
    pipeline = base if method == "base" else make_module(method).pipeline()
    parts = {name: getattr(base, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    sampler = base.scheduler_of(base.settings(scheduler=scheduler))
    plain = StableDiffusionPipeline(
        **parts, scheduler=sampler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    plain.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    expected = plain(PROMPTS[0], generator=torch.Generator().manual_seed(1), **told).images
    own = {**told, **(pipeline.without_references or {}), "scheduler": scheduler}
    found = pipeline(PROMPTS[0], cutouts, class_noun="mug", generator=torch.Generator().manual_seed(1), **own).images
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", mostly_slow([*METHODS, TOY]))
def test_every_sampler_may_run_twice_and_in_part(cutouts, method) -> None:
    """`denoise` begins afresh each time, whatever the sampler remembers of its last run, and counts its steps on."""
    pipeline = make_pipeline(method)
    for scheduler in SCHEDULERS:
        seen: list[tuple[int, int]] = []
        given = {"num_inference_steps": 4, "scheduler": scheduler, "output_type": "latent"}
        draw_, branches = pipeline.draw, pipeline.branches

        def twice(noise, call, condition, settings, draw_=draw_, seen=seen):
            first = draw_(noise, call, condition, settings)
            seen.clear()
            return pipeline.denoise(first, call, condition, settings, first=2)

        def watched(latents, t, step, *rest, branches=branches, seen=seen):
            seen.append((step, int(t)))
            return branches(latents, t, step, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "draw", twice)
            patch.setattr(pipeline, "branches", watched)
            pipeline.set_progress_bar_config(disable=True)
            found = pipeline(PROMPTS[0], cutouts, class_noun="mug", generator=seeds(1), **given).images
        assert found.isfinite().all()
        timesteps = pipeline.scheduler_of(pipeline.settings(num_inference_steps=4, scheduler=scheduler)).timesteps
        assert seen == [(2, int(timesteps[2])), (3, int(timesteps[3]))], scheduler


@pytest.mark.parametrize("method", mostly_slow([*METHODS, TOY]))
def test_shared_controls_reach_the_picture(cutouts, method) -> None:
    pipeline = make_pipeline(method)
    usual = draw(pipeline, PROMPTS[0], cutouts, generator=seeds(1), text_guidance=3.0)
    for change in (
        {"text_guidance": 5.0},
        {"guidance_scale": 5.0},
        {"negative_prompt": "a red car"},
        {"guidance_rescale": 0.8},
        {"guidance_interval": (0.9, 1.0)},
        {"scheduler": "ddim"},  # no method's own
    ):
        given = {"text_guidance": 3.0, **change}
        if "guidance_scale" in change:
            del given["text_guidance"]
        assert not torch.equal(draw(pipeline, PROMPTS[0], cutouts, generator=seeds(1), **given), usual), change
    for wrong, message in (
        ({"generator": seeds(1, 2)}, "2 generators for 1 pictures"),
        ({"class_noun": ["a", "b"]}, "1 prompts but 2 class nouns"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents must be"),
        ({"text_guidance": 3.0, "guidance_scale": 5.0}, "are the same control"),
        ({"guidance_interval": 1.0}, "two shares of the steps"),
        ({"callback_on_step_end_tensor_inputs": ["text"]}, "`latents` and nothing else"),
        ({"output_type": "jpg"}, "output_type 'jpg' is none of"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline(PROMPTS[0], cutouts, **wrong)


def test_the_recipe_from_the_command_line(toy_data, tmp_path, monkeypatch, capsys) -> None:
    """fit with the memory table, validation scores and samples, all of a method that the house has never heard of."""
    config = tmp_path / "toy_method.yaml"
    config.write_text(
        f"""
trainer:
  accelerator: cpu
  max_steps: 2
  val_check_interval: 2
  num_sanity_val_steps: 0
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: pig.training.callbacks.EMA
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: "{tmp_path}/kept", filename: two, every_n_train_steps: 2}}
    - class_path: pig.training.callbacks.SubjectSamples
      init_args: {{subjects: "{toy_data}/subjects", clip: toyworld, dino: toyworld, max_subjects: 1, steps: 1}}
model:
  class_path: toy_method.Module
  init_args: {{base: toyworld}}
data:
  class_path: pig.data.modules.TripletDataModule
  init_args: {{shards: "{toy_data}/triplets", val_shards: "{toy_data}/val", batch_size: 4, resolution: 64}}
"""
    )
    monkeypatch.setattr(sys, "argv", ["pig.cli", "fit", "--config", str(config), "--print-memory"])
    cli.main()
    assert "memory in each process" in capsys.readouterr().out
    assert list(tmp_path.rglob("samples/*.png"))
    module = load_module(tmp_path / "kept/two.ckpt")
    assert module.method == TOY


@pytest.mark.parametrize("method", mostly_slow(["base", *TRAINED]))
def test_generate_and_evaluate(toy_data, trained, tmp_path, method) -> None:
    model = "base:toyworld"
    if method in TRAINED:
        export(tmp_path / "model", checkpoint=trained(method), delta=True)
        model = str(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    lines = (toy_data / "subjects/prompts_and_classes.txt").read_text().splitlines()
    kept = [line for line in lines if "format" not in line or "beach" in line or "space" in line]
    prompts.write_text("\n".join(line for line in kept if not line.startswith(("boat", "boot", "car", "cat", "fish"))))
    out, given = tmp_path / "images", {"subjects": toy_data / "subjects", "prompts": prompts}
    generate(out, model, **given, images_per_prompt=1, steps=1)
    line = json.loads((out / "manifest.jsonl").read_text().splitlines()[0])
    assert line["method"] == method
    assert line["settings"]["num_inference_steps"] == 1
    evaluate(out, tmp_path / "scores", Photographs(**given))
    result = json.loads((tmp_path / "scores/results.json").read_text())
    assert "dino" in json.dumps(result)


@pytest.mark.parametrize("method", [*METHODS, TOY])
def test_one_list_of_controls(method) -> None:
    """Each has a help and a default that its own check takes; the call's signature shows all."""
    import inspect

    from pig.sampling.settings import controls

    kind = pipeline_class(method)
    assert kind.method == method
    kind.Settings()
    shown = inspect.signature(kind.__call__).parameters
    for one in controls(kind.Settings):
        assert len(one.help) > 10
        assert shown[one.name].default == one.default
    with pytest.raises(InputError, match="'typo' is no control"):
        kind.Settings.given({}, {"typo": 1})
