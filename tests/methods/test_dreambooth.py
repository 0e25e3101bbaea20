"""DreamBooth against diffusers' recipe, and its LoRA in plain diffusers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from pig import diffusion
from pig.commands.export import export
from pig.data.schema import Batch
from pig.data.subject_training import ClassPictures, SubjectDataModule, SubjectDataset
from pig.errors import InputError
from pig.methods import load_pipeline
from pig.methods.dreambooth.module import DreamBooth
from pig.methods.dreambooth.pipeline import DreamBoothPipeline
from pig.models.backbone import align, base_digest, load_backbone
from pig.models.encoders import tokenize
from pig.models.lora import Lora
from pig.models.names import WEIGHTS
from pig.sampling.delta import save_delta
from pig.training.tuned import TOLD, draw_class_pictures

PROMPT = "a photo of a sks mug, on a beach"
SETTINGS = {"text_guidance": 3.0}
DIGEST = base_digest(load_backbone("toyworld"))


@pytest.fixture(scope="module")
def prior(tmp_path_factory) -> ClassPictures:
    wanted = ClassPictures(str(tmp_path_factory.mktemp("class")), count=3, steps=2)
    draw_class_pictures("toyworld", DIGEST, "mug", wanted, SETTINGS, torch.device("cpu"))
    return wanted


def data_of(toy_data: Path, prior: ClassPictures | None, size: int = 2) -> SubjectDataModule:
    return SubjectDataModule(str(toy_data / "subjects/mug_006"), resolution=64, batch_size=size, prior=prior, seed=3)


def first_batch(data: SubjectDataModule) -> Batch:
    return next(iter(data.train_dataloader()))


def tuned(**told: Any) -> DreamBooth:
    return DreamBooth("toyworld", identifier="sks", text_guidance=3.0, **told)


def moved(module: DreamBooth) -> DreamBooth:
    """As after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for one in module.trainable().values():
            one += 0.02 * torch.randn(one.shape, generator=generator)
    return module


def recipe(batch: Batch, unet: nn.Module, prior_weight: float) -> Tensor:
    """diffusers' `train_dreambooth.py`, one step up to the loss: pictures of the subject, then those of the class."""
    backbone = load_backbone("toyworld")
    scheduler = DDPMScheduler.from_config(backbone.scheduler.config)
    of_class = batch.of_class or [False] * len(batch.keys)
    order = [*(i for i, prior in enumerate(of_class) if not prior), *(i for i, prior in enumerate(of_class) if prior)]
    prompts = ["a photo of a mug" if of_class[i] else "a photo of a sks mug" for i in order]
    pixels = batch.target[order]
    latents = torch.cat([backbone.vae.encode(one[None]).latent_dist.mode() for one in pixels]).detach()
    latents = latents * backbone.vae.config.scaling_factor
    noise, u = diffusion.draw(batch.seeds[order], latents.shape, uniforms=1)
    timesteps = (u[:, 0] * scheduler.config.num_train_timesteps).long()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    text = backbone.text_encoder(tokenize(backbone.tokenizer, prompts))[0].detach()
    predicted = unet(noisy, timesteps, text).sample
    target = scheduler.get_velocity(latents, noise, timesteps)
    if not any(of_class):
        return F.mse_loss(predicted, target, reduction="mean")
    (predicted, predicted_prior), (target, target_prior) = predicted.chunk(2), target.chunk(2)
    prior_loss = F.mse_loss(predicted_prior, target_prior, reduction="mean")
    return F.mse_loss(predicted, target, reduction="mean") + prior_weight * prior_loss


@pytest.mark.parametrize("lora", [None, Lora(rank=3, alpha=6)], ids=["full", "lora"])
@pytest.mark.parametrize("weight", [None, 1.0, 0.3], ids=["no prior", "prior", "less prior"])
def test_a_step_is_that_of_diffusers_recipe(toy_data, prior, lora, weight) -> None:
    batch = first_batch(data_of(toy_data, None if weight is None else prior))
    module = moved(tuned(lora=lora, prior_weight=1.0 if weight is None else weight))
    unet = load_backbone("toyworld").unet
    if lora is None:
        unet.load_state_dict(module.net.unet.state_dict())
        theirs = dict(unet.named_parameters())
    else:
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=3, lora_alpha=6, init_lora_weights="gaussian", target_modules=targets))
        theirs = {name: one for name, one in unet.named_parameters() if one.requires_grad}
        ours = dict(module.net.unet.named_parameters())
        with torch.no_grad():
            for name, one in theirs.items():
                one.copy_(ours[name])
    unet.train()
    expected = recipe(batch, unet, weight or 0.0)
    found = module.losses(batch, training=True)[0].mean()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    expected.backward()
    found.backward()
    ours = {name.removeprefix("net.unet."): one for name, one in module.trainable().items()}
    assert ours.keys() == theirs.keys()
    for name, one in theirs.items():
        torch.testing.assert_close(ours[name].grad, one.grad, atol=1e-6, rtol=1e-4)
        ours[name].grad = one.grad.clone()  # Adam's first step is the gradient's sign: rounding must not decide it
    optimizer = torch.optim.AdamW(theirs.values(), lr=5e-6, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    for one in (optimizer, module.configure_optimizers()):
        one.step()
    for name, one in theirs.items():
        torch.testing.assert_close(ours[name], one, atol=1e-6, rtol=1e-6)


def test_exact_set_of_trainable_names(toy_data) -> None:
    unet = load_backbone("toyworld").unet
    assert set(tuned().trainable()) == {f"net.unet.{name}" for name, _ in unet.named_parameters()}
    layers = [name for name, one in unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert {layer.rpartition(".transformer_blocks")[0] != "" for layer in layers} == {True}
    wanted = {f"net.unet.{layer}.lora_{x}.default.weight" for layer in layers for x in "AB"}
    assert set(tuned(lora=Lora()).trainable()) == wanted
    both = tuned(lr_text_encoder=1e-6)
    assert both.groups.keys() == {"unet", "text_encoder"}
    assert set(both.groups["text_encoder"]) == {
        f"text_encoder.{name}" for name, _ in both.text_encoder.named_parameters()
    }
    both.losses(first_batch(data_of(toy_data, None)), training=True)[0].mean().backward()
    for name, one in both.trainable().items():
        assert one.grad is not None, name
    with pytest.raises(InputError, match="text encoder stays frozen"):
        tuned(lora=Lora(), lr_text_encoder=1e-6)


def plain_diffusers() -> StableDiffusionPipeline:
    plain = StableDiffusionPipeline.from_pretrained(WEIGHTS / "base", safety_checker=None, dtype=torch.float32)
    for part in plain.components.values():
        if isinstance(part, nn.Module):
            align(part)
    plain.set_progress_bar_config(disable=True)
    return plain


def draw(pipeline: Any, prompt: str = PROMPT, **told: Any) -> Tensor:
    told = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", **told}
    return torch.as_tensor(pipeline(prompt, generator=torch.Generator().manual_seed(1), **told).images)


@pytest.fixture(scope="module")
def base_pictures() -> Tensor:
    return draw(plain_diffusers())


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [4, 8])
def test_the_lora_in_plain_diffusers_gives_the_same_pixels(base_pictures, tmp_path, alpha) -> None:
    pipeline = moved(tuned(lora=Lora(rank=4, alpha=alpha))).pipeline()
    expected = draw(pipeline)
    save_delta(pipeline, tmp_path / "delta")
    pipeline.save_pretrained(tmp_path / "whole")
    for folder in ("delta", "whole"):
        plain = plain_diffusers()
        plain.load_lora_weights(tmp_path / folder)
        assert torch.equal(draw(plain), expected)
        assert torch.equal(draw(load_pipeline(tmp_path / folder, "cpu")), expected)
    assert not torch.allclose(expected, base_pictures, atol=0.05)
    # The whole folder's own parts are the base model's, and the pipeline goes on with its LoRA.
    own = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", safety_checker=None, dtype=torch.float32)
    own.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(own), base_pictures, atol=1e-4, rtol=0)
    assert torch.equal(draw(pipeline), expected)


@pytest.mark.parametrize("alpha", [4, 8])
def test_the_lora_in_kohyas_format(tmp_path, alpha) -> None:
    pipeline = moved(tuned(lora=Lora(rank=4, alpha=alpha))).pipeline()
    save_delta(pipeline, tmp_path / "delta")
    export(tmp_path / "mug.safetensors", model=str(tmp_path / "delta"), format="kohya")
    found = load_file(tmp_path / "mug.safetensors")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    assert found[f"{name}.lora_down.weight"].shape[0] == 4
    assert {float(one) for key, one in found.items() if key.endswith(".alpha")} == {float(alpha)}
    plain = plain_diffusers()
    plain.load_lora_weights(tmp_path, weight_name="mug.safetensors")
    torch.testing.assert_close(draw(plain), draw(pipeline), atol=2e-3, rtol=0)  # diffusers folds alpha into the weights
    whole = moved(tuned()).pipeline()
    save_delta(whole, tmp_path / "full")
    for wrong, message in (
        ({"model": str(tmp_path / "full"), "out": tmp_path / "x.safetensors"}, "is for a LoRA"),
        ({"model": str(tmp_path / "delta"), "out": tmp_path / "x"}, "writes one file"),
        ({"model": str(tmp_path / "delta"), "out": tmp_path / "x.safetensors", "delta": True}, "without --delta"),
    ):
        with pytest.raises(InputError, match=message):
            export(**wrong, format="kohya")


def test_a_tuned_text_encoder_is_kept(toy_data, tmp_path) -> None:
    pipeline = moved(tuned(lr_text_encoder=1e-6)).pipeline()
    expected = draw(pipeline)
    save_delta(pipeline, tmp_path / "delta", half=False)
    pipeline.save_pretrained(tmp_path / "whole")
    for folder in ("delta", "whole"):
        assert torch.equal(draw(load_pipeline(tmp_path / folder, "cpu")), expected)


def test_the_identifier_stands_before_the_noun(prior) -> None:
    pipeline = moved(tuned()).pipeline()
    by_hand = draw(pipeline)
    assert torch.equal(draw(pipeline, "a photo of a mug, on a beach", class_noun="mug"), by_hand)
    with pytest.raises(InputError, match="where shall the identifier stand"):
        pipeline("a photo of a mug")
    with pytest.raises(InputError, match="is 3 tokens"):
        DreamBooth("toyworld", identifier="zwx")
    with pytest.warns(UserWarning, match="'mug' is a common word"):
        DreamBooth("toyworld", identifier="mug")


def test_class_pictures_are_drawn_once(prior, tmp_path) -> None:
    files = prior.files("mug")
    before = [file.read_bytes() for file in files]
    untouched = files[0].stat().st_mtime_ns
    draw_class_pictures("toyworld", DIGEST, "mug", prior, SETTINGS, torch.device("cpu"))
    assert files[0].stat().st_mtime_ns == untouched
    files[1].unlink()
    draw_class_pictures("toyworld", DIGEST, "mug", prior, SETTINGS, torch.device("cpu"))
    assert [file.read_bytes() for file in files] == before
    with pytest.raises(InputError, match=r"drawn with text_guidance=3\.0, now 5"):
        draw_class_pictures("toyworld", DIGEST, "mug", prior, {"text_guidance": 5.0}, torch.device("cpu"))
    with pytest.raises(InputError, match="drawn with base_digest="):  # another model of the same name
        draw_class_pictures("toyworld", "0" * 64, "mug", prior, SETTINGS, torch.device("cpu"))
    told = json.loads((prior.of("mug") / TOLD).read_text())
    twice = ClassPictures(str(tmp_path / "twice"), count=6, steps=2)
    draw_class_pictures("toyworld", DIGEST, "mug", twice, SETTINGS, torch.device("cpu"))
    assert json.loads((twice.of("mug") / TOLD).read_text())["flops"] == 2 * told["flops"] > 0 < told["seconds"]
    strange = ClassPictures(str(tmp_path), count=1)
    strange.of("mug").mkdir()
    (strange.of("mug") / "mine.png").write_bytes(before[0])
    with pytest.raises(InputError, match="holds pictures, but no class.json"):
        draw_class_pictures("toyworld", DIGEST, "mug", strange, SETTINGS, torch.device("cpu"))


def test_order_of_pictures(toy_data, prior) -> None:
    """Every picture once in each pass, in an order of its own; the same from any step on; shared by processes."""
    data = data_of(toy_data, prior, size=1)
    dataset = data.train_dataloader().dataset
    names = [path.name for path in data.subject.images]
    steps = [dataset._batch(step) for step in range(4 * len(names))]
    assert all(batch.of_class == [False, True] for batch in steps)
    shown = [batch.keys[0].partition("/")[2] for batch in steps]
    passes = [shown[at : at + len(names)] for at in range(0, len(shown), len(names))]
    assert all(sorted(one) == sorted(names) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert len({seed for batch in steps for seed in batch.seeds.tolist()}) == 2 * len(steps)
    dataset.start(epoch=0, first_batch=5)
    assert next(iter(dataset)).keys == steps[5].keys
    halves = [
        SubjectDataset(data.subject, prior.files("mug"), batch_size=1, resolution=64, seed=3, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    assert [half._batch(7).keys for half in halves] == [[key] for key in steps[7].keys]


def test_pipeline_is_of_the_method(toy_data) -> None:
    module = tuned()
    pipeline = module.pipeline()
    assert isinstance(pipeline, DreamBoothPipeline)
    assert pipeline.unet is module.net.unet
    assert copy.deepcopy(pipeline.config.settings) == {"identifier": "sks", "text_guidance": 3.0}


def test_regularised_maps(toy_data, prior) -> None:
    """At the base model nothing is added; behind it, the distance of the subject's maps, and of no class picture's."""
    batch = first_batch(data_of(toy_data, prior))
    plain, regularised = tuned(), tuned(attention_regularisation=0.7)
    assert plain.base_unet is None
    assert not set(regularised.trainable()) ^ set(plain.trainable())
    for one in (plain, regularised):
        one.eval()
    (expected, _), (found, _) = (one.losses(batch, training=True) for one in (plain, regularised))
    torch.testing.assert_close(found, expected)
    (expected, _), (found, _) = (moved(one).losses(batch, training=True) for one in (plain, regularised))
    added = (found - expected).detach()
    assert batch.of_class == [False, True, False, True]
    assert bool((added[::2] > 1e-4).all())
    torch.testing.assert_close(added[1::2], torch.zeros(2), atol=1e-6, rtol=0)
    (double, _) = moved(tuned(attention_regularisation=1.4)).losses(batch, training=True)
    torch.testing.assert_close((double.detach() - expected.detach())[::2], 2 * added[::2], atol=1e-4, rtol=1e-3)
    found.mean().backward()
    assert all(one.grad is None for one in regularised.base_unet.parameters())
