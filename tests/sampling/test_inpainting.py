"""Subject-driven inpainting: what stays and what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import embedded
from PIL import Image, ImageFilter

from benchmarks.editing import BOX, box_mask, toy_scene
from pig.errors import InputError
from pig.methods.bootpig import BootPIGPipeline
from pig.models.encoders import DinoEncoder

GUIDANCE = {"image_guidance": 5.0, "text_guidance": 1.5}


@pytest.fixture(scope="module")
def pipe() -> BootPIGPipeline:
    return embedded()


@pytest.mark.slow
def test_the_subject_appears_in_the_mask_and_nothing_changes_outside(pipe) -> None:
    dino, gains = DinoEncoder("toyworld"), []
    outside = np.asarray(box_mask()) == 0
    for number in (0, 3, 6, 7):
        picture, cutout, prompt, _ = toy_scene(number)
        drawn = pipe(
            prompt,
            [cutout],
            image=picture,
            mask_image=box_mask(),
            num_inference_steps=20,
            generator=[torch.Generator().manual_seed(0)],
            **GUIDANCE,
        ).images[0]
        difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(picture.convert("RGB")))
        assert difference[outside].max() == 0
        assert difference[~outside].mean() > 10
        before, after, wanted = dino.images([picture.crop(BOX), drawn.crop(BOX), cutout])
        gains.append(float(after @ wanted - before @ wanted))
    assert np.mean(gains) > 0.25, gains


@pytest.mark.parametrize("scheduler", ["unipc", "ddim", "dpm++"])
def test_soft_masks_mix_and_every_scheduler_keeps_the_rest(pipe, scheduler) -> None:
    picture, cutout, prompt, _ = toy_scene(6)
    mask = box_mask().filter(ImageFilter.GaussianBlur(4))
    options = {"num_inference_steps": 4, "scheduler": scheduler, **GUIDANCE}
    drawn = pipe(prompt, [cutout], image=picture, mask_image=mask, **options).images[0]
    soft, rgb = np.asarray(mask), np.asarray(picture.convert("RGB")).astype(int)
    difference = np.abs(np.asarray(drawn) - rgb)
    assert difference[soft == 0].max() == 0
    faint = (soft > 0) & (soft < 40)
    assert difference[faint].max() <= 40 + 1  # at most the mask's share of 255
    assert difference[soft > 200].mean() > difference[faint].mean()


@pytest.mark.slow
def test_photographs_of_any_size_run_several_prompts_and_images(pipe) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (120, 200, 3), dtype=np.uint8))
    _, cutout, prompt, _ = toy_scene(6)
    mask = box_mask((40, 30, 130, 100), picture.size)
    drawn = pipe(
        [prompt, "a photo of a car, in space"],
        [cutout],
        image=picture,
        mask_image=mask,
        num_images_per_prompt=2,
        num_inference_steps=2,
    ).images
    assert [one.size for one in drawn] == [(200, 120)] * 4
    keep = np.asarray(mask) == 0
    for one in drawn:
        assert np.array_equal(np.asarray(one)[keep], np.asarray(picture)[keep])


def test_mistakes_are_named(pipe) -> None:
    picture, cutout, prompt, _ = toy_scene(6)
    for options, message in [
        ({"image": picture}, "both the picture .* and its mask"),
        ({"image": picture, "mask_image": box_mask(size=(32, 64))}, r"mask is \(32, 64\), the picture \(64, 64\)"),
        ({"image": picture, "mask_image": Image.new("L", (64, 64))}, "black all over"),
        ({"image": picture, "mask_image": box_mask(), "height": 32}, "keeps the picture's size"),
        ({"image": picture.resize((60, 64)), "mask_image": box_mask(size=(60, 64))}, "multiples of 8"),
    ]:
        with pytest.raises(InputError, match=message):
            pipe(prompt, [cutout], **options)
