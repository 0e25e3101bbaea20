"""Textual Inversion: one embedding is learnt, and plain diffusers draws with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import QUIET
from diffusers import DDPMScheduler, StableDiffusionPipeline
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor, nn

from pig import diffusion
from pig.data.subject_training import ClassPictures, SubjectDataModule
from pig.errors import InputError
from pig.methods import load_pipeline
from pig.methods.textual_inversion.module import TEMPLATES, TextualInversion
from pig.models.backbone import align, encode_images, load_backbone
from pig.models.encoders import tokenize
from pig.models.names import WEIGHTS
from pig.sampling.delta import save_delta


@pytest.fixture(scope="module")
def data(toy_data: Path) -> SubjectDataModule:
    return SubjectDataModule(str(toy_data / "subjects/mug_006"), resolution=64, batch_size=3, seed=3)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> TextualInversion:
    module = TextualInversion("toyworld", lr=1e-2, text_guidance=3.0)
    Trainer(max_steps=2, default_root_dir=tmp_path_factory.mktemp("fit"), **QUIET).fit(module, data)
    return module.to(memory_format=torch.contiguous_format)


def draw(pipeline: Any, prompt: str, **told: Any) -> Tensor:
    told = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", **told}
    return torch.as_tensor(pipeline(prompt, generator=torch.Generator().manual_seed(1), **told).images)


def test_one_embedding_is_trained_and_begins_as_the_noun(data, tmp_path) -> None:
    module = TextualInversion("toyworld")
    (name,) = module.trainable()
    assert name == "text_encoder.embeddings.token_embedding.embedding"
    backbone = load_backbone("toyworld")
    words = backbone.text_encoder.get_input_embeddings().weight
    Trainer(max_steps=1, default_root_dir=tmp_path, limit_train_batches=0, **QUIET).fit(module, data)
    (mug,) = backbone.tokenizer("mug", add_special_tokens=False).input_ids
    assert torch.equal(module.net.word.embedding, words[mug])
    # As long as it is the noun's, so are the pictures.
    plain = load_pipeline("base:toyworld", "cpu")
    expected = draw(plain, "a photo of a mug, on a beach")
    pipeline = module.to(memory_format=torch.contiguous_format).pipeline()
    assert torch.equal(draw(pipeline, "a photo of a <subject>, on a beach"), expected)
    assert torch.equal(draw(pipeline, "a photo of a mug, on a beach", class_noun="mug"), expected)


def test_a_step_is_that_of_diffusers_recipe(data) -> None:
    """The loss and the gradient of the new row, of an embedding matrix one row longer."""
    module = TextualInversion("toyworld")
    batch = next(iter(data.train_dataloader()))
    backbone = load_backbone("toyworld")
    scheduler = DDPMScheduler.from_config(backbone.scheduler.config)
    backbone.tokenizer.add_tokens(["<subject>"])
    backbone.text_encoder.resize_token_embeddings(len(backbone.tokenizer))
    matrix = backbone.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        matrix[-1] = module.net.word.embedding
    texts = [TEMPLATES[seed % len(TEMPLATES)].format("<subject>") for seed in batch.seeds.tolist()]
    latents = encode_images(backbone.vae, batch.target)
    noise, u = diffusion.draw(batch.seeds, latents.shape, uniforms=1)
    timesteps = (u[:, 0] * 1000).long()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    text = backbone.text_encoder(tokenize(backbone.tokenizer, texts))[0]
    expected = F.mse_loss(
        backbone.unet(noisy, timesteps, text).sample, scheduler.get_velocity(latents, noise, timesteps)
    )
    found = module.losses(batch, training=True)[0].mean()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    expected.backward()
    found.backward()
    torch.testing.assert_close(module.net.word.embedding.grad, matrix.grad[-1], atol=1e-6, rtol=1e-5)


def test_plain_diffusers_draws_the_same_pixels(trained, tmp_path) -> None:
    pipeline = trained.pipeline()
    expected = draw(pipeline, "a photo of a mug, on a beach", class_noun="mug")
    save_delta(pipeline, tmp_path / "delta")
    pipeline.save_pretrained(tmp_path / "whole")
    (embedding,) = load_file(tmp_path / "delta/learned_embeds.safetensors").items()
    assert embedding[0] == "<subject>"
    plain = StableDiffusionPipeline.from_pretrained(WEIGHTS / "base", safety_checker=None, dtype=torch.float32)
    whole = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", safety_checker=None, dtype=torch.float32)
    for one, folder in ((plain, "delta"), (whole, "whole")):
        one.load_textual_inversion(tmp_path / folder, weight_name="learned_embeds.safetensors")
        for part in one.components.values():
            if isinstance(part, nn.Module):
                align(part)
        one.set_progress_bar_config(disable=True)
        assert torch.equal(draw(one, "a photo of a <subject>, on a beach"), expected)
        again = load_pipeline(tmp_path / folder, "cpu")
        assert torch.equal(draw(again, "a photo of a <subject>, on a beach"), expected)
    assert torch.equal(draw(pipeline, "a photo of a <subject>, on a beach"), expected)  # saving has left it as it was


def test_bad_input(toy_data, tmp_path) -> None:
    prior = ClassPictures(str(tmp_path), count=1)
    data = SubjectDataModule(str(toy_data / "subjects/mug_006"), resolution=64, prior=prior)
    with pytest.raises(InputError, match="has no class pictures"):
        Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET).fit(TextualInversion("toyworld"), data)
    for told, message in (
        ({"token": "subject"}, "a word in angle brackets"),
        ({"token": "<|endoftext|>"}, "a word in angle brackets"),
        ({"templates": ["a photo"]}, "each text needs one"),
        ({"lr": float("nan")}, "model.lr must be"),
        ({"save_at": [0]}, "steps count from 1"),
    ):
        with pytest.raises(InputError, match=message):
            TextualInversion("toyworld", **told)
