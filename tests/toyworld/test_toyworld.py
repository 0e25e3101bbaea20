"""The drawn world and the embedded models: what the model card says of them is checked here on smaller sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from pig.models.backbone import decode_latents, encode_images, load_backbone
from pig.models.encoders import tokenize
from pig.models.names import WEIGHTS
from pig.toyworld import scene
from pig.toyworld.captions import classify, facts_of, make_tokenizer, random_scenes


def test_size_of_the_world() -> None:
    assert len(scene.CATEGORIES) >= 12
    assert len(scene.BACKGROUNDS) >= 10
    assert len(scene.PATTERNS) >= 7


def test_drawing_follows_from_seeds_at_any_size() -> None:
    subject = scene.make_subject(5)
    assert subject == scene.make_subject(5)
    small, again = scene.draw(subject, "forest", 7, 64), scene.draw(subject, "forest", 7, 64)
    assert np.array_equal(small.image, again.image)
    large = scene.draw(subject, "forest", 7, 192)
    shrunk = large.image.reshape(64, 3, 64, 3, 3).mean((1, 3))
    assert np.abs(shrunk - small.image).mean() < 4
    assert abs(large.mask.mean() - small.mask.mean()) < 2


@pytest.mark.parametrize("category", scene.CATEGORIES)
def test_masks_are_exact(category) -> None:
    """Where the mask is 0 the picture does not depend on the subject; where it is 255, not on the background."""
    for seed in range(3):
        subject, other = scene.make_subject(seed, category), scene.make_subject(seed, category)
        recoloured = scene.Subject(category, subject.shape, "red", (255, 0, 0), (0, 255, 0), "plain")
        a, b = scene.draw(subject, "beach", seed), scene.draw(recoloured, "beach", seed)
        c = scene.draw(other, "space", seed)
        assert np.array_equal(a.mask, b.mask)
        assert np.array_equal(a.image[a.mask == 0], b.image[a.mask == 0])
        assert np.array_equal(a.image[a.mask == 255], c.image[a.mask == 255])
        assert 0.08 < (a.mask > 127).mean() < 0.5
        edges = np.concatenate([a.mask[0], a.mask[-1], a.mask[:, 0], a.mask[:, -1]])
        assert (edges > 0).mean() < 0.1
        assert ((a.mask > 0) & (a.mask < 255)).any()  # antialiased


def test_captions_never_tell_the_identity() -> None:
    subject = scene.make_subject(3)
    assert scene.caption(scene.object_phrase(subject), "sea") == f"a photo of a {subject.category}, under water"
    assert scene.object_phrase(subject, with_colour=True) == f"{subject.colour} {subject.category}"
    for category in scene.CATEGORIES:
        backgrounds = {scene.training_background(category, n) for n in range(20)}
        assert backgrounds == set(scene.BACKGROUNDS) - {scene.held_out_background(category)}


@pytest.mark.parametrize("shipped", [True, False])
def test_tokenizer_knows_the_words_and_spells_the_rest(shipped) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "base/tokenizer") if shipped else make_tokenizer()
    text = "a photo of a red mug, on a city street"
    assert len(tokenizer.tokenize(text)) == 11
    for word in [*scene.CATEGORIES, *scene.PALETTE, *" ".join(scene.BACKGROUNDS.values()).split()]:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert tokenizer.decode(tokenizer("a backpack in the jungle").input_ids, skip_special_tokens=True) == (
        "a backpack in the jungle"
    )
    ids = tokenize(tokenizer, [text, ""])
    assert ids.shape == (2, 32)
    assert ids.max() == tokenizer.eos_token_id == len(tokenizer) - 1


def test_vae_of_the_card() -> None:
    backbone = load_backbone("toyworld")
    images = random_scenes(48, first_seed=scene.HELD_OUT_SEED + 9000)[0].float() / 127.5 - 1
    latents = encode_images(backbone.vae, images)
    assert latents.shape == (48, 4, 16, 16)
    assert 0.9 < latents.std() < 1.1
    error = (decode_latents(backbone.vae, latents) - images).square().flatten(1).mean(1)
    assert (10 * torch.log10(4 / error)).mean() > 28


def test_clip_of_the_card() -> None:
    clip = CLIPModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "clip")
    images, subjects, background = random_scenes(120, first_seed=scene.HELD_OUT_SEED + 9000)
    facts = torch.tensor([facts_of(s, b) for s, b in zip(subjects, background, strict=True)])
    category, place = (classify(clip, tokenizer, images) == facts[:, :2]).float().mean(0)
    assert category > 0.95
    assert place > 0.95


def test_text_tower_of_clip_conditions_the_unet() -> None:
    clip = CLIPModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    text_encoder = load_backbone("toyworld").text_encoder
    for name, weight in text_encoder.state_dict().items():
        torch.testing.assert_close(clip.text_model.state_dict()[name.removeprefix("text_model.")], weight, msg=name)
