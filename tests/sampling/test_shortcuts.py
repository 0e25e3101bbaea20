"""What is left out, and what is kept from call to call."""

from __future__ import annotations

import pytest
import torch
from conftest import embedded
from drawing import PROMPTS, count_passes, draw, seeds
from PIL import Image

from pig.methods.bootpig import BootPIG, BootPIGPipeline
from pig.models.deep_cache import full_pass, shallow_pass
from pig.sampling.references import ReferenceCache


def test_prompts_too_long_are_warned_of_with_what_was_cut(pipe, cutouts, caplog) -> None:
    limit = pipe.tokenizer.model_max_length - 2
    words = "a photo of a mug, on a beach"
    while len(pipe.tokenizer(words, add_special_tokens=False).input_ids) <= limit:
        words += " and a mug"
    draw(pipe, PROMPTS[0], cutouts[:1], num_inference_steps=1)
    assert "too long" not in caplog.text
    draw(pipe, words + " in space", cutouts[:1], num_inference_steps=1)
    assert "its end is not read" in caplog.text
    assert "space'" in caplog.text


@pytest.mark.slow
def test_reference_cache_changes_no_pixel_and_is_never_stale(pipe, cutouts, monkeypatch) -> None:
    def draws(refs=cutouts[:2], prompt=PROMPTS[0], **options):
        return draw(pipe, prompt, refs, generator=seeds(1), **options)

    usual = draws()
    calls = count_passes(pipe, monkeypatch)
    monkeypatch.setattr(pipe, "reference_cache", ReferenceCache(2**30))
    expected_passes = 0
    for options, passes in [
        ({}, 3),
        ({}, 0),
        ({"image_guidance": 2.0, "strength": 0.5}, 0),
        ({"refs": cutouts[:1]}, 3),
        ({"refs": cutouts[1::-1]}, 3),
        ({"prompt": PROMPTS[1]}, 3),
        ({"prompt": PROMPTS}, 0),
        ({"reference_caption": "object"}, 3),
        ({"reference_noise": "fixed"}, 2),  # the first step's noise is the fixed one's
        ({"height": 96}, 3),
        ({"num_inference_steps": 2}, 1),  # its second t is another
    ]:
        found = draws(**options) if options.get("prompt") is not PROMPTS else draw(pipe, PROMPTS, cutouts[:2])
        expected_passes += passes
        assert len(calls) == expected_passes, options
        if not options:
            assert torch.equal(found, usual)
    weight = next(pipe.reference_unet.parameters())
    kept = weight.detach().clone()
    weight.data.copy_(kept.flip(0))  # the same numbers in another order
    changed = draws()
    assert len(calls) == expected_passes + 3
    assert not torch.equal(changed, usual)
    weight.data.copy_(kept)
    assert torch.equal(draws(), usual)
    assert len(calls) == expected_passes + 3


def test_reference_cache_keeps_its_limit(pipe, cutouts, monkeypatch) -> None:
    calls = count_passes(pipe, monkeypatch)
    cache = ReferenceCache(2**30)
    monkeypatch.setattr(pipe, "reference_cache", cache)
    draw(pipe, PROMPTS[0], cutouts[:1])
    per_step = cache.bytes // 3
    pipe.reference_cache = cache = ReferenceCache(2 * per_step)
    draw(pipe, PROMPTS[0], cutouts[:1])
    assert (len(cache), cache.bytes) == (2, 2 * per_step)
    calls.clear()
    draw(pipe, PROMPTS[0], cutouts[:1])
    assert len(calls) == 1  # the first steps are kept: a call larger than the cache does not sweep itself out
    draw(pipe, PROMPTS[0], cutouts[1:2])  # another subject takes the place of the older one
    calls.clear()
    draw(pipe, PROMPTS[0], cutouts[1:2])
    assert (len(calls), len(cache), cache.bytes) == (1, 2, 2 * per_step)
    pipe.reference_cache = cache = ReferenceCache(2**30)
    draw(pipe, [PROMPTS[0], PROMPTS[0].upper()], cutouts[:1])  # to the tokenizer these are one prompt
    assert (len(cache), cache.bytes) == (3, 3 * per_step)
    pipe.reference_cache = cache = ReferenceCache(per_step - 1)
    draw(pipe, PROMPTS[0], cutouts[:1])
    assert (len(cache), cache.bytes) == (0, 0)


def test_guidance_only_in_an_interval(pipe, cutouts) -> None:
    sizes = []
    hook = pipe.base_unet.conv_in.register_forward_hook(lambda layer, given, found: sizes.append(len(found)))
    options = {"generator": seeds(1), "num_inference_steps": 4}
    inside = draw(pipe, PROMPTS[0], cutouts, guidance_interval=(0.25, 0.75), **options)
    assert sizes == [1, 3, 3, 1]
    sizes.clear()
    nowhere = draw(pipe, PROMPTS[0], cutouts, guidance_interval=(1.0, 1.0), **{**options, "generator": seeds(1)})
    plain = {"image_guidance": 1.0, "text_guidance": 1.0, "generator": seeds(1)}
    assert torch.equal(nowhere, draw(pipe, PROMPTS[0], cutouts, **{**options, **plain}))
    assert sizes == [1] * 8
    hook.remove()
    assert (inside - nowhere).abs().max() > 0.005


def test_references_read_every_other_step(pipe, cutouts, monkeypatch) -> None:
    calls = count_passes(pipe, monkeypatch)
    draw(pipe, PROMPTS[0], cutouts, num_inference_steps=5, reference_every=2)
    pipe.scheduler.set_timesteps(5)
    assert [int(t) for _, t, _ in calls] == pipe.scheduler.timesteps[::2].tolist()


@pytest.mark.parametrize(("interval", "full"), [((0.0, 1.0), 3), ((0.2, 0.8), 4)])
def test_deep_features_every_other_step_and_when_the_branches_change(pipe, cutouts, interval, full) -> None:
    deep_runs = []
    hook = pipe.base_unet.mid_block.register_forward_hook(lambda layer, given, found: deep_runs.append(1))
    options = {"num_inference_steps": 5, "guidance_interval": interval}
    usual = draw(pipe, PROMPTS[0], cutouts, generator=seeds(1), **options)
    assert len(deep_runs) == 5
    found = draw(pipe, PROMPTS[0], cutouts, generator=seeds(1), deep_every=2, **options)
    hook.remove()
    assert len(deep_runs) == 5 + full
    assert 0 < (found - usual).abs().mean() < 0.15


@torch.no_grad()
def test_a_shallow_pass_with_its_own_deep_features_is_the_full_pass(base_unet, inputs) -> None:
    given = (inputs["latents"], inputs["timesteps"], inputs["text"], None)
    full, deep = full_pass(base_unet, *given)
    torch.testing.assert_close(shallow_pass(base_unet, *given, deep), full)


def test_references_may_be_files_and_pairs_with_masks(pipe, cutouts, tmp_path) -> None:
    photo, mask = cutouts[0].convert("RGB"), cutouts[0].getchannel("A")
    photo.save(tmp_path / "a.png")
    mask.save(tmp_path / "a.mask.png")
    # White paint on nothing, as paint programs save it.
    painted = Image.merge("LA", (Image.new("L", mask.size, 255), mask)).convert("RGBA")
    usual = draw(pipe, PROMPTS[0], [cutouts[0]], generator=seeds(1))
    for given in (cutouts[0], [(photo, mask)], [(photo, painted)], tmp_path / "a.png", [str(tmp_path / "a.png")]):
        torch.testing.assert_close(draw(pipe, PROMPTS[0], given, generator=seeds(1)), usual, atol=1e-2, rtol=0)
    asked = []
    segment = lambda image, noun: asked.append(image) or mask  # noqa: E731
    found = draw(pipe, PROMPTS, [photo], generator=seeds(1, 2), segment=segment)
    torch.testing.assert_close(found[:1], usual, atol=1e-2, rtol=0)
    assert len(asked) == 1


def test_a_model_brings_its_own_guidance(cutouts, tmp_path) -> None:
    pipe = BootPIG("toyworld", image_guidance=2.0, text_guidance=1.5).pipeline()
    pipe.save_pretrained(tmp_path)
    pipe = BootPIGPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    named = {"image_guidance": 2.0, "text_guidance": 1.5}
    expected = draw(pipe, PROMPTS[0], cutouts[:1], generator=seeds(1), **named)
    assert torch.equal(draw(pipe, PROMPTS[0], cutouts[:1], generator=seeds(1)), expected)
    assert embedded().settings().text_guidance == 1.5
    assert BootPIG("toyworld").pipeline().settings().text_guidance == 7.5


@pytest.mark.parametrize("pooling", ["softmax", "argmax", "mean", "concat"])
@pytest.mark.parametrize(
    ("references", "images"),
    [(4, 1), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, 1), (1, 3), (4, 3)))],
)
def test_the_cache_on_equals_the_cache_off(pipe, cutouts, monkeypatch, pooling, references, images) -> None:
    refs, options = (cutouts * 2)[:references], {"num_images_per_prompt": images, "num_inference_steps": 2}

    def draws() -> torch.Tensor:
        return draw(pipe, PROMPTS, refs, pooling=pooling, generator=seeds(*range(2 * images)), **options)

    off = draws()
    monkeypatch.setattr(pipe, "reference_cache", ReferenceCache(2**30))
    torch.testing.assert_close(draws(), off)
    calls = count_passes(pipe, monkeypatch)
    torch.testing.assert_close(draws(), off)
    assert not calls
