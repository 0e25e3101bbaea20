"""The call of a pipeline: guidance, seeds, batching, settings, and what users get wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import embedded
from diffusers import StableDiffusionPipeline
from drawing import PROMPTS, count_passes, draw, seeds
from PIL import Image

from benchmarks.sampling import PROMPTS as NAIVE_PROMPTS
from benchmarks.sampling import image_text_guidance, naive
from pig.errors import InputError
from pig.methods.bootpig import BootPIG, BootPIGPipeline
from pig.models.backbone import SCHEDULERS, load_backbone
from pig.sampling.guidance import branch_weights


def test_equation_4() -> None:
    e, im, text = torch.tensor(1.0), torch.tensor(3.0), torch.tensor(7.0)
    assert image_text_guidance(e, im, text, 5.0, 7.5) == 1 + 5 * 2 + 7.5 * 4
    assert image_text_guidance(e, im, text, 1.0, 1.0) == text
    assert image_text_guidance(e, im, text, 0.0, 0.0) == e
    branches = {"uncond": e, "im": im, "text_im": text}
    for etas, needed in {(5.0, 7.5): 3, (3.0, 3.0): 2, (1.0, 2.0): 2, (1.0, 1.0): 1, (0.0, 0.0): 1}.items():
        weights = branch_weights(*etas)
        assert len(weights) == needed
        assert sum(weight * branches[name] for name, weight in weights.items()) == image_text_guidance(
            e, im, text, *etas
        )


def test_saved_and_loaded_gives_the_same_pixels(pipe, cutouts, tmp_path) -> None:
    expected = draw(pipe, PROMPTS[0], cutouts[:1], generator=seeds(1))
    pipe.save_pretrained(tmp_path)
    others = [path.name for path in tmp_path.rglob("*") if path.suffix not in (".json", ".safetensors", "")]
    assert others == ["pipeline.py"]
    again = BootPIGPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, PROMPTS[0], cutouts[:1], generator=seeds(1)), expected)
    assert again.settings().pooling == "softmax"


@pytest.mark.parametrize("references", [1, 3])
def test_an_image_depends_on_its_seed_and_not_on_the_call(pipe, cutouts, references) -> None:
    refs = cutouts[:references]
    together = draw(pipe, PROMPTS, refs, num_images_per_prompt=2, generator=seeds(1, 2, 1, 2))
    alone = draw(pipe, PROMPTS[1], refs, generator=seeds(2))
    torch.testing.assert_close(together[3:], alone, atol=1e-4, rtol=1e-4)
    per_prompt = draw(pipe, PROMPTS, [refs, refs], num_images_per_prompt=2, generator=seeds(1, 2, 1, 2))
    torch.testing.assert_close(per_prompt, together)
    assert (together[0] - together[1]).abs().max() > 0.025


def test_references_matter_and_guidance_weighs_them(pipe, cutouts) -> None:
    one = draw(pipe, PROMPTS[0], cutouts[:1], generator=seeds(1))
    red = Image.new("RGB", (40, 40), (220, 20, 20))
    assert (draw(pipe, PROMPTS[0], [red], generator=seeds(1)) - one).abs().max() > 0.025
    off = {"image_guidance": 0.0, "text_guidance": 0.0}
    both = [draw(pipe, PROMPTS[0], refs, generator=seeds(1), **off) for refs in ([red], cutouts[:1])]
    torch.testing.assert_close(*both)


def test_unguided_unconditional_is_the_plain_base_model(pipe, cutouts) -> None:
    """With both guidances 0 only e_uncond is left: the base UNet without references, sampled by UniPC."""
    from pig.models.backbone import decode_latents, encode_text, load_backbone

    drawn = draw(pipe, PROMPTS[0], cutouts[:1], image_guidance=0.0, text_guidance=0.0, generator=seeds(4))
    base = load_backbone("toyworld")
    base.unet.load_state_dict(pipe.base_unet.state_dict())
    base.scheduler.set_timesteps(3)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for t in base.scheduler.timesteps:
            predicted = base.unet(latents, t, encode_text(base, [""])).sample
            latents = base.scheduler.step(predicted, t, latents).prev_sample
        torch.testing.assert_close(drawn, decode_latents(base.vae, latents) / 2 + 0.5, atol=1e-5, rtol=1e-4)


def test_reference_noise_fixed_timestep_and_caption(cutouts, monkeypatch) -> None:
    module = BootPIG("toyworld", reference_timestep=1, reference_caption="object")
    pipe = module.pipeline()
    calls = count_passes(pipe, monkeypatch)
    draw(pipe, PROMPTS, cutouts[:1], reference_noise="fixed")
    ((_, t, text),) = calls  # one pass serves all steps
    assert t.tolist() == [1, 1]
    with torch.no_grad():
        told = pipe.encode_text(["a photo of a mug", "a photo of a car"])
    torch.testing.assert_close(text, told)
    calls.clear()
    draw(pipe, PROMPTS[0], cutouts[:1])
    assert not torch.equal(calls[0][0], calls[1][0])


def test_sizes(pipe, cutouts) -> None:
    image = pipe(PROMPTS[0], cutouts[:1], height=96, width=64, num_inference_steps=2).images[0]
    assert image.size == (64, 96)
    with pytest.raises(InputError, match="size 64x60: width and height must be multiples of 8"):
        pipe(PROMPTS[0], cutouts[:1], height=60, width=64)


def test_mistakes_are_named(pipe, cutouts, monkeypatch) -> None:
    for none in ([], [[], []]):
        with pytest.raises(InputError, match="without references"):
            pipe(PROMPTS, none)
    with pytest.raises(InputError, match="equally many"):
        pipe(PROMPTS, [cutouts[:1], cutouts[:2]])
    with pytest.raises(InputError, match="2 prompts but reference lists for 3"):
        pipe(PROMPTS, [cutouts[:1]] * 3)
    with pytest.raises(InputError, match="at least one"):
        pipe(PROMPTS, cutouts[:1], num_images_per_prompt=0)
    for wrong, message in {
        ("image_guidance", -1.0): "image_guidance must be between 0 and 1000, got -1.0",
        ("text_guidance", float("nan")): "text_guidance must be between 0 and 1000, got nan",
        ("strength", 1.5): "strength must be between 0 and 1, got 1.5",
        ("guidance_rescale", -0.1): "guidance_rescale must be between 0 and 1",
        ("guidance_interval", (0.7, 0.2)): "guidance_interval",
        ("guidance_interval", (0, 9)): "guidance_interval_end must be between 0 and 1",
        ("num_inference_steps", 0): "num_inference_steps must be at least 1",
        ("num_inference_steps", 2.5): "num_inference_steps must be a whole number, got 2.5",
        ("num_inference_steps", 1001): "num_inference_steps must be between 1 and 1000",
        ("reference_every", 0): "reference_every must be at least 1",
        ("deep_every", 0): "deep_every must be at least 1",
        ("pooling", "max"): "pooling 'max' is none of softmax, argmax, mean, concat",
        ("reference_noise", "none"): "reference_noise 'none' is none of fresh, fixed",
        ("scheduler", "euler"): "scheduler 'euler' is none of unipc, ddim",
        ("strenght", 1.0): "'strenght' is no control of this method; it has: num_inference_steps",
        ("reference_caption", "x"): "reference_caption 'x' is none of caption, object",
    }.items():
        with pytest.raises(InputError, match=message):
            pipe(PROMPTS[0], cutouts[:1], **dict([wrong]))
    with pytest.raises(InputError, match=r"1000000 references each need about .* GiB, .* are free"):
        pipe(PROMPTS[0], cutouts[:1] * 1_000_000)


def test_photographs_of_any_shape_run(pipe, tmp_path: Path) -> None:
    pictures = [
        Image.new("L", (300, 40), 90),
        Image.new("CMYK", (17, 90), (10, 200, 30, 0)),
        Image.new("RGBA", (50, 50), (9, 9, 200, 128)),
        Image.new("RGB", (4, 4)),
    ]
    images = draw(pipe, PROMPTS[0], pictures)
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()


@pytest.mark.parametrize("images", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_pipeline_draws_what_the_naive_way_draws(cutouts, images) -> None:
    """`benchmarks/sampling.py` keeps the release's way: image by image, reference by reference, branch by branch."""
    module = BootPIG("toyworld", reference_caption="object")
    torch.manual_seed(0)
    for parameter in module.trainable().values():
        parameter.data += 0.02 * torch.randn_like(parameter)
    pipe = module.pipeline()
    pipe.set_progress_bar_config(disable=True)
    expected = naive(pipe, cutouts[:2], steps=2, seeds=list(range(images)))
    found = pipe(
        NAIVE_PROMPTS,
        cutouts[:2],
        num_inference_steps=2,
        num_images_per_prompt=images,
        image_guidance=5.0,
        text_guidance=1.5,
        reference_noise="fixed",
        generator=seeds(*list(range(images)) * len(NAIVE_PROMPTS)),
        output_type="pt",
    ).images
    torch.testing.assert_close(found, expected / 2 + 0.5, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_strength_0_is_the_base_model_with_guidance_as_diffusers_draws_it(pipe, cutouts, steps) -> None:
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer")}
    plain_unet = load_backbone("toyworld").unet
    plain_unet.load_state_dict(pipe.base_unet.state_dict())
    scheduler = copy.deepcopy(pipe.scheduler)
    base = StableDiffusionPipeline(
        **parts, unet=plain_unet, scheduler=scheduler, safety_checker=None, feature_extractor=None
    )
    base.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "negative_prompt": "a red thing", "guidance_rescale": 0.3}
    expected = base(PROMPTS[0], guidance_scale=3.0, generator=seeds(5), output_type="pt", **options).images
    found = draw(pipe, PROMPTS[0], cutouts, text_guidance=3.0, strength=0.0, generator=seeds(5), **options)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_strength_goes_all_the_way(pipe, cutouts) -> None:
    drawn = [
        draw(pipe, PROMPTS[0], cutouts, strength=strength, generator=seeds(1))
        for strength in (0.0, 0.001, 0.5, 0.999, 1.0)
    ]
    whole = (drawn[4] - drawn[0]).abs().mean()
    assert (drawn[1] - drawn[0]).abs().mean() < 0.1 * whole
    assert (drawn[3] - drawn[4]).abs().mean() < 0.1 * whole
    assert (drawn[2] - drawn[0]).abs().mean() > 0.1 * whole


def test_negative_prompt_pooling_caption_and_rescale_matter(pipe, cutouts) -> None:
    usual = draw(pipe, PROMPTS[0], cutouts, generator=seeds(1))
    for change in (
        {"negative_prompt": "a photo of a mug"},
        {"pooling": "mean"},
        {"reference_caption": "object"},
        {"guidance_rescale": 0.7},
    ):
        assert (draw(pipe, PROMPTS[0], cutouts, generator=seeds(1), **change) - usual).abs().max() > 0.005, change
    same = draw(pipe, PROMPTS[0], cutouts, generator=seeds(1), pooling="softmax", reference_caption="caption")
    assert torch.equal(same, usual)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unipc", "ddim", "dpm++"])
def test_schedulers_draw_the_same_thing_in_many_steps(cutouts, name) -> None:
    pipe = embedded()
    options = {"image_guidance": 2.0, "text_guidance": 1.5, "generator": seeds(1), "num_inference_steps": 40}
    usual = draw(pipe, PROMPTS[0], cutouts[:1], reference_noise="fixed", **options)
    options |= {"generator": seeds(1), "scheduler": name}
    found = draw(pipe, PROMPTS[0], cutouts[:1], reference_noise="fixed", **options)
    assert (found - usual).abs().mean() < 0.05
    assert type(pipe.scheduler_of(pipe.settings(scheduler=name))) is SCHEDULERS[name][0]
    assert type(pipe.scheduler) is SCHEDULERS["unipc"][0]  # the model's own stays


def test_callback_sees_every_step_may_change_the_latents_and_may_cancel(pipe, cutouts) -> None:
    seen = []

    def look(pipe, step, t, given):
        seen.append((step, int(t), given["latents"].shape))
        return given

    usual = draw(pipe, PROMPTS[0], cutouts[:1], generator=seeds(1), callback_on_step_end=look)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    blank = draw(
        pipe,
        PROMPTS[0],
        cutouts[:1],
        generator=seeds(1),
        callback_on_step_end=lambda pipe, step, t, given: {"latents": torch.zeros_like(given["latents"])},
    )
    assert (blank - usual).abs().max() > 0.025
    seen.clear()

    def cancel(pipe, step, t, given):
        pipe._interrupt = step == 1
        return look(pipe, step, t, given)

    stopped = draw(pipe, PROMPTS[0], cutouts[:1], num_inference_steps=30, callback_on_step_end=cancel)
    assert len(seen) == 2
    assert stopped.shape == (1, 3, 64, 64)
    assert torch.equal(draw(pipe, PROMPTS[0], cutouts[:1], generator=seeds(1)), usual)
