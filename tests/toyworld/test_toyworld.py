"""The drawn world and the embedded models: what the model card says of them is checked here on smaller sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from transformers import CLIPModel, CLIPTokenizer

from pig.models.backbone import decode_latents, encode_images, load_backbone
from pig.models.encoders import tokenize
from pig.models.names import WEIGHTS
from pig.toyworld import captions, scene
from pig.toyworld.details import EMBLEMS, PATTERNS
from pig.toyworld.stages.unet import UNetStage


def test_size_of_the_world() -> None:
    assert len(scene.CATEGORIES) >= 12
    assert len(scene.BACKGROUNDS) >= 10
    assert len(PATTERNS) >= 7
    assert len(EMBLEMS) >= 6


def test_drawing_follows_from_seeds_at_any_size() -> None:
    subject, worn = scene.make_subject(5), scene.Worn("hat", "red")
    assert subject == scene.make_subject(5)
    for view in ("whole", "cut", "behind"):
        small, again = (scene.draw(subject, "forest", 7, 64, worn=worn, view=view) for _ in range(2))
        assert np.array_equal(small.image, again.image)
        large = scene.draw(subject, "forest", 7, 192, worn=worn, view=view)
        shrunk = large.image.reshape(64, 3, 64, 3, 3).mean((1, 3))
        assert np.abs(shrunk - small.image).mean() < 4
        assert abs(large.mask.mean() - small.mask.mean()) < 2


@pytest.mark.parametrize("category", scene.CATEGORIES)
def test_masks_are_exact(category) -> None:
    """Where the mask is 0 the picture does not depend on the subject; where it is 255, not on the rest."""
    for seed in range(3):
        subject = scene.make_subject(seed, category)
        other = replace(subject, primary=(255, 0, 0), secondary=(0, 255, 0), emblem_colour=(0, 0, 255), pattern="plain")
        a, b = scene.draw(subject, "beach", seed), scene.draw(other, "beach", seed)
        c = scene.draw(subject, "space", seed)
        assert np.array_equal(a.mask, b.mask)
        assert np.array_equal(a.image[a.mask == 0], b.image[a.mask == 0])
        assert np.array_equal(a.image[a.mask == 255], c.image[a.mask == 255])
        edges = np.concatenate([a.mask[0], a.mask[-1], a.mask[:, 0], a.mask[:, -1]])
        assert (edges > 0).mean() == 0  # whole
        assert ((a.mask > 0) & (a.mask < 255)).any()  # antialiased
        for accessory in scene.ACCESSORIES:
            red, blue = (
                scene.draw(subject, "beach", seed, worn=scene.Worn(accessory, colour)) for colour in ("red", "blue")
            )
            assert np.array_equal(red.mask, blue.mask)
            assert np.array_equal(red.image[red.mask == 255], blue.image[red.mask == 255])
            assert np.array_equal(red.image[red.worn == 0], blue.image[red.worn == 0])
            assert (red.image != blue.image).any(-1).sum() > 15  # it can be seen


def test_partial_pictures_show_a_part() -> None:
    """The same pose whole and partial where only something is put in front; about the share named otherwise."""
    shares = []
    for seed in range(40):
        subject = scene.make_subject(seed)
        whole, behind = (scene.draw(subject, "beach", seed, view=view) for view in ("whole", "behind"))
        assert (behind.mask <= whole.mask).all()
        shares.append(behind.mask.sum() / whole.mask.sum())
        cut = scene.draw(subject, "beach", seed, view="cut")
        edges = np.concatenate([cut.mask[0], cut.mask[-1], cut.mask[:, 0], cut.mask[:, -1]])
        assert (edges > 0).any()
        assert cut.mask.sum() > 0
        part = scene.partial_mask(whole, seed)
        assert np.array_equal(part.image, whole.image)
        kept = part.mask.sum() / whole.mask.sum()
        assert ((part.mask == whole.mask) | (part.mask == 0)).all()
        assert 0.2 < kept < 0.98
    low, high = scene.HIDDEN
    assert 1 - high - 0.02 < np.mean(shares) < 1 - low + 0.02


def test_emblem_tells_individuals_apart() -> None:
    """Another emblem of the same individual changes enough pixels of a small picture, in a colour of its own."""
    for seed in range(30):
        subject = scene.make_subject(seed)
        others = [
            scene.draw(replace(subject, emblem=name), "sea", seed).image for name in EMBLEMS if name != subject.emblem
        ]
        own = scene.draw(subject, "sea", seed).image
        assert min((np.abs(own.astype(int) - other).max(-1) > 40).sum() for other in others) >= 3
        for colour in (subject.primary, subject.secondary):
            assert np.linalg.norm(np.subtract(subject.emblem_colour, colour)) >= scene.CONTRAST


def test_training_leaves_the_held_out_combinations_out() -> None:
    scenes = [captions.training_scene(seed) for seed in range(3000)]
    dressed = [one for one in scenes if one.worn is not None]
    assert 0.35 < len(dressed) / len(scenes) < 0.45
    for category in scene.CATEGORIES:
        backgrounds = {one.background for one in scenes if one.subject.category == category}
        assert backgrounds == set(scene.BACKGROUNDS) - {scene.held_out_background(category)}
    for one in dressed:
        assert one.worn is not None
        assert one.worn.accessory != scene.held_out_accessory(one.subject.category)
    for number in range(24):
        plain, worn = (captions.held_out_scene(number, worn=worn) for worn in (False, True))
        assert plain.background == scene.held_out_background(plain.subject.category)
        assert worn.worn is not None
        assert worn.worn.accessory == scene.held_out_accessory(worn.subject.category)


def test_captions_say_what_is_true() -> None:
    torch.manual_seed(0)
    tokenizer = captions.make_tokenizer()
    assert tokenizer.tokenize("sks") == ["sks</w>"]
    seen = set()
    for seed in range(300):
        one = captions.any_scene(seed)
        facts = one.facts()
        assert captions.worn_of(facts.worn) == one.worn
        text, claims = captions.caption_of(facts)
        seen.update(text.split())
        assert claims.worn == facts.worn
        assert all(said in (-1, true) for said, true in zip(claims, facts, strict=True))
        assert (one.worn is not None) == ("wearing" in text)
        pieces = tokenizer.tokenize(text)
        assert all(piece.endswith("</w>") for piece in pieces)  # no word in several pieces
        assert len(pieces) <= 30
    assert "sks" not in seen
    subject = scene.make_subject(3)
    assert scene.caption(scene.object_phrase(subject), "sea", scene.Worn("glasses", "red")) == (
        f"a photo of a {subject.category} wearing red glasses, under water"
    )


def test_accessory_of_what_is_worn() -> None:
    worn = torch.tensor([0, 1, 6, 7, 24])
    assert captions.accessory_of(worn).tolist() == [0, 1, 1, 2, 4]


def test_accessories_are_drawn_more_often_in_training(tmp_path, monkeypatch) -> None:
    """With 1 in 5 dressed and a weight of 2.5, 5 in 13."""
    stage = UNetStage(WEIGHTS / "base", tmp_path)
    facts = torch.zeros(1000, 4, dtype=torch.long)
    facts[::5, 3] = 1
    monkeypatch.setattr(stage, "dataset", lambda: TensorDataset(torch.zeros(1000, 1), torch.ones(1000, 1), facts))
    torch.manual_seed(0)
    dressed = torch.cat([batch[2][:, 3] for batch in stage.train_dataloader()]).float().mean()
    assert dressed.item() == pytest.approx(5 / 13, abs=0.06)


@pytest.mark.parametrize("shipped", [True, False])
def test_tokenizer_knows_the_words_and_spells_the_rest(shipped) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "base/tokenizer") if shipped else captions.make_tokenizer()
    text = "a photo of a red mug, on a city street"
    assert len(tokenizer.tokenize(text)) == 11
    assert tokenizer.tokenize("sks wearing") == ["sks</w>", "wearing</w>"]
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
    scenes = [captions.any_scene(scene.HELD_OUT_SEED + 9000 + i, partial=0.25) for i in range(48)]
    images = captions.render(scenes).float() / 127.5 - 1
    latents = encode_images(backbone.vae, images)
    assert latents.shape == (48, 4, 16, 16)
    assert 0.9 < latents.std() < 1.1
    error = (decode_latents(backbone.vae, latents) - images).square().flatten(1).mean(1)
    assert (10 * torch.log10(4 / error)).mean() > 28


def test_clip_of_the_card() -> None:
    clip = CLIPModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "clip")
    scenes = [captions.any_scene(scene.HELD_OUT_SEED + 9000 + i) for i in range(120)]
    found = captions.agreement(captions.classify(clip, tokenizer, captions.render(scenes)), captions.facts_of(scenes))
    assert min(found["category"], found["background"]) > 0.95
    assert found["accessory"] > 0.9
    assert found["main colour"] > 0.7


def test_text_tower_of_clip_conditions_the_unet() -> None:
    clip = CLIPModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    text_encoder = load_backbone("toyworld").text_encoder
    for name, weight in text_encoder.state_dict().items():
        torch.testing.assert_close(clip.text_model.state_dict()[name.removeprefix("text_model.")], weight, msg=name)
