"""Sampling: guidance, seeds, batching, saving and loading, and what users get wrong. Real toy models, few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.sampling import PROMPTS as NAIVE_PROMPTS
from benchmarks.sampling import naive
from pig.data.subjects import read_subjects
from pig.errors import InputError
from pig.methods.bootpig import BootPIG
from pig.pipelines import BootPIGPipeline
from pig.pipelines.guidance import image_text_guidance

PROMPTS = ["a photo of a mug, on a beach", "a photo of a car, in space"]


@pytest.fixture(scope="module")
def pipe() -> BootPIGPipeline:
    """Base and Reference UNet that differ, as after training."""
    module = BootPIG("toyworld")
    torch.manual_seed(0)
    for parameter in module.trainable().values():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return module.pipeline()


@pytest.fixture(scope="module")
def cutouts(toy_data) -> list[Image.Image]:
    return read_subjects(toy_data / "subjects")[6].references(3)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipe: BootPIGPipeline, prompt, references, **options) -> torch.Tensor:
    return pipe(prompt, references, output_type="pt", num_inference_steps=3, **options).images


def test_equation_4() -> None:
    e, im, text = torch.tensor(1.0), torch.tensor(3.0), torch.tensor(7.0)
    assert image_text_guidance(e, im, text, 5.0, 7.5) == 1 + 5 * 2 + 7.5 * 4
    assert image_text_guidance(e, im, text, 1.0, 1.0) == text
    assert image_text_guidance(e, im, text, 0.0, 0.0) == e


def test_saved_and_loaded_gives_the_same_pixels(pipe, cutouts, tmp_path) -> None:
    expected = draw(pipe, PROMPTS[0], cutouts[:1], generator=seeds(1))
    pipe.save_pretrained(tmp_path)
    weights = [path.suffix for path in tmp_path.rglob("*") if path.suffix not in (".json", "")]
    assert set(weights) == {".safetensors"}
    again = BootPIGPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, PROMPTS[0], cutouts[:1], generator=seeds(1)), expected)
    assert again.config.pooling == "softmax"


@pytest.mark.parametrize("references", [1, 3])
def test_an_image_depends_on_its_seed_and_not_on_the_call(pipe, cutouts, references) -> None:
    refs = cutouts[:references]
    together = draw(pipe, PROMPTS, refs, num_images_per_prompt=2, generator=seeds(1, 2, 1, 2))
    alone = draw(pipe, PROMPTS[1], refs, generator=seeds(2))
    torch.testing.assert_close(together[3:], alone, atol=1e-4, rtol=1e-4)
    per_prompt = draw(pipe, PROMPTS, [refs, refs], num_images_per_prompt=2, generator=seeds(1, 2, 1, 2))
    torch.testing.assert_close(per_prompt, together)
    assert (together[0] - together[1]).abs().max() > 0.05


def test_references_matter_and_guidance_weighs_them(pipe, cutouts) -> None:
    one = draw(pipe, PROMPTS[0], cutouts[:1], generator=seeds(1))
    red = Image.new("RGB", (40, 40), (220, 20, 20))
    assert (draw(pipe, PROMPTS[0], [red], generator=seeds(1)) - one).abs().max() > 0.05
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
        torch.testing.assert_close(drawn, decode_latents(base.vae, latents), atol=1e-5, rtol=1e-4)


def test_reference_noise_fixed_timestep_and_caption(cutouts) -> None:
    module = BootPIG("toyworld", reference_timestep=1, reference_caption="object")
    pipe = module.pipeline()
    calls = []
    encode = pipe.model.encode_reference
    pipe.model.encode_reference = lambda z, t, text: calls.append((z, t, text)) or encode(z, t, text)
    draw(pipe, PROMPTS, cutouts[:1], reference_noise="fixed")
    assert len(calls) == 3
    for z, t, text in calls:
        assert t.tolist() == [1, 1]
        assert torch.equal(z, calls[0][0])
        assert torch.equal(text, calls[0][2])
    with torch.no_grad():
        told = pipe._encode_text(["a photo of a mug", "a photo of a car"])
    torch.testing.assert_close(calls[0][2], told)
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
    for none in ({"num_images_per_prompt": 0}, {"num_inference_steps": 0}):
        with pytest.raises(InputError, match="at least one"):
            pipe(PROMPTS, cutouts[:1], **none)
    with pytest.raises(InputError, match="guidance must be at least 0"):
        pipe(PROMPTS[0], cutouts[:1], image_guidance=-1)
    with pytest.raises(InputError, match=r"1000000 references .* need about .* GiB, .* are free"):
        pipe(PROMPTS[0], cutouts[:1] * 1_000_000)


def test_photographs_of_any_shape_run(pipe, tmp_path: Path) -> None:
    pictures = [
        Image.new("L", (300, 40), 90),
        Image.new("CMYK", (17, 90), (10, 200, 30, 0)),
        Image.new("RGBA", (50, 50), (9, 9, 200, 128)),
        Image.new("RGB", (1, 1)),
    ]
    images = draw(pipe, PROMPTS[0], pictures)
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()


@pytest.mark.parametrize("images", [1, 2])
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
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
