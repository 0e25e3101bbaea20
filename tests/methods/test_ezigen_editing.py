"""EZIGen: editing (arXiv 2409.08091, section 3.4), the pictures of its loops, and the weights of its release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from trying import refused

from benchmarks import ezigen as bench
from pig import cli
from pig.attention.install import transformer_blocks
from pig.commands import drawing
from pig.data.subjects import read_subjects
from pig.data.transforms import to_tensor
from pig.errors import InputError
from pig.methods import load_pipeline, load_release
from pig.methods.ezigen import pipeline as ezigen
from pig.methods.ezigen.module import EZIGen
from pig.methods.ezigen.pipeline import EZIGenPipeline
from pig.models.backbone import encode_images, load_backbone, make_scheduler
from pig.sampling.inversion import invert
from pig.sampling.references import reference_noise

PROMPT = "a photo of a mug, on a beach"


@pytest.fixture(scope="module")
def pipe() -> EZIGenPipeline:
    module = EZIGen("toyworld")
    torch.manual_seed(0)
    for parameter in module.trainable().values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module.pipeline()


@pytest.fixture(scope="module")
def cutouts(toy_data) -> list[Image.Image]:
    return read_subjects(toy_data / "subjects")[6].references(1)


@pytest.fixture(scope="module")
def hole(toy_data) -> dict[str, Image.Image]:
    image = Image.open(read_subjects(toy_data / "subjects")[0].images[0]).convert("RGB")
    mask = Image.new("L", image.size)
    mask.paste(255, (16, 24, 48, 60))
    return {"image": image, "mask_image": mask}


def edit(pipe: EZIGenPipeline, cutouts: list[Image.Image], hole: dict[str, Image.Image], **given: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    told = {"num_inference_steps": 5, "output_type": "pt", "generator": generator, "loops": 1, **given}
    return pipe(PROMPT, cutouts, class_noun="mug", **hole, **told)


def test_outside_of_the_mask_no_pixel_changes(pipe, cutouts, hole) -> None:
    found = edit(pipe, cutouts, hole, loops=2, num_images_per_prompt=2, output_type="np").images
    source, mask = np.asarray(hole["image"]) / 255, np.asarray(hole["mask_image"]) > 0
    for one in found:
        assert np.abs(one - source)[~mask].max() < 1e-6
        assert np.abs(one - source)[mask].mean() > 0.01
    assert np.abs(found[0] - found[1])[mask].mean() > 0.01  # an ancestral sampler, and noise of their own


@pytest.mark.parametrize("loops", [1, 2])
def test_editing_against_the_paper_written_plainly(pipe, cutouts, hole, loops) -> None:
    """DDIM, five steps of which two are transfer, guidance 2 with features in both branches."""
    found = edit(pipe, cutouts, hole, loops=loops, scheduler="ddim", output_type="latent").images
    scheduler = make_scheduler("ddim", pipe.scheduler.config)
    assert isinstance(scheduler, DDIMScheduler)
    scheduler.set_timesteps(5)
    timesteps, net = scheduler.timesteps[3:], pipe.network
    text, empty = pipe.encode_text([PROMPT]), pipe.encode_text([""])
    with torch.no_grad():
        z_0 = encode_images(pipe.vae, to_tensor(hole["image"])[None])

        def plain(z: Tensor, t: Tensor, step: int) -> Tensor:
            return net(z, t.view(1), empty)

        references = read_plainly(pipe, cutouts)
        background = invert(plain, z_0, scheduler, timesteps)
        mask = torch.nn.functional.max_pool2d((to_tensor(hole["mask_image"].convert("RGB"))[None, :1] + 1) / 2, 4)
        latents = z_0
        for _ in range(loops):
            latents = invert(plain, latents, scheduler, timesteps)[int(timesteps[0])]
            for number, t in enumerate(timesteps):
                e, e_text = (net(latents, t.view(1), one, references) for one in (empty, text))
                latents = scheduler.step(e + 2 * (e_text - e), t, latents).prev_sample
                known = background[int(timesteps[number + 1])] if number + 1 < len(timesteps) else z_0
                latents = mask * latents + (1 - mask) * known
    assert torch.allclose(found, latents, atol=2e-4)
    assert not torch.allclose(found, z_0.expand_as(found), atol=0.1)


@pytest.mark.parametrize("scheduler", ["ddim", "unipc", "ddpm"])
def test_loops_against_the_paper_written_plainly(pipe, cutouts, scheduler) -> None:
    """Layout by text in three of five steps, transfer in the last two; then twice noised again to t of step 3."""
    told = {"num_inference_steps": 5, "text_guidance": 3.0, "loops": 2, "output_type": "latent", "scheduler": scheduler}
    found = pipe(PROMPT, cutouts, class_noun="mug", generator=torch.Generator().manual_seed(1), **told).images
    net, generator, references = pipe.network, torch.Generator().manual_seed(1), read_plainly(pipe, cutouts)
    text, empty = pipe.encode_text([PROMPT]), pipe.encode_text([""])
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    with torch.no_grad():
        for loop in range(3):
            sampler = make_scheduler(scheduler, pipe.scheduler.config)
            sampler.set_timesteps(5)
            if loop:
                a = sampler.alphas_cumprod[int(sampler.timesteps[3])]
                latents = a.sqrt() * latents + (1 - a).sqrt() * torch.randn(1, 4, 16, 16, generator=generator)
            if loop and hasattr(sampler, "set_begin_index"):
                sampler.set_begin_index(3)
            for step in range(3 if loop else 0, 5):
                t, there = sampler.timesteps[step], references if step >= 3 else None
                e, e_text = (net(latents, t.view(1), one, there) for one in (empty, text))
                own = {"generator": generator} if scheduler == "ddpm" else {}
                latents = sampler.step(e + 3 * (e_text - e), t, latents, **own).prev_sample
    torch.testing.assert_close(found, latents, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "what", ["one pass, transfer everywhere", pytest.param("layout 60 %, one pass", marks=pytest.mark.slow)]
)
def test_the_benchmarks_naive_way_draws_the_same(pipe, cutouts, what) -> None:
    """`benchmarks/ezigen.py` keeps the release's way, image by image."""
    told = {"class_noun": "mug", "text_guidance": bench.GUIDANCE, "num_inference_steps": 5, "output_type": "pt"}
    seeds = [torch.Generator().manual_seed(0) for _ in bench.PROMPTS]
    ours = pipe(bench.PROMPTS, cutouts, generator=seeds, **told, **{"loops": 0, **bench.WHATS[what]}).images
    naive = bench.naive(pipe, cutouts, what, 5, [0]) / 2 + 0.5
    torch.testing.assert_close(naive, ours, atol=2e-3, rtol=1e-2)


def read_plainly(pipe: EZIGenPipeline, cutouts: list[Image.Image]) -> dict[str, Tensor]:
    z_ref = pipe.encode_references(cutouts, 64)
    a = pipe.scheduler.alphas_cumprod[1]
    noised = a.sqrt() * z_ref + (1 - a).sqrt() * reference_noise(z_ref.shape, 0)
    told = pipe.encode_text(["a photo of a mug"])
    return pipe.network.encode_reference(noised[None], torch.tensor([1]), told[:, None])


def test_what_editing_needs(pipe, cutouts, hole) -> None:
    for given in ({"loops": 0}, {"layout_share": 1.0}):
        with pytest.raises(InputError, match="editing needs a transfer"):
            edit(pipe, cutouts, hole, **given)
    assert not torch.allclose(
        edit(pipe, cutouts, hole, editing_guidance=5.0).images, edit(pipe, cutouts, hole, text_guidance=5.0).images
    )
    base = edit(pipe, cutouts, hole, adapter_scale=0.0).images  # by text alone, in loops all the same
    assert not torch.allclose(base, edit(pipe, cutouts, hole).images)


def test_photographs_of_any_size(pipe, cutouts) -> None:
    source = np.random.default_rng(0).integers(0, 255, (120, 200, 3), dtype=np.uint8)
    mask = Image.new("L", (200, 120))
    mask.paste(255, (40, 30, 130, 100))
    drawn = edit(pipe, cutouts, {"image": Image.fromarray(source), "mask_image": mask}, output_type="pil").images[0]
    assert drawn.size == (200, 120)
    assert np.array_equal(np.asarray(drawn)[np.asarray(mask) == 0], source[np.asarray(mask) == 0])


def test_the_picture_of_each_loop(pipe, cutouts) -> None:
    told = {"num_inference_steps": 5, "class_noun": "mug", "num_images_per_prompt": 2, "loops": 2}
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    drawn = pipe(PROMPT, cutouts, generator=seeds, keep_loops=True, **told)
    assert [len(versions) for versions in drawn.loops] == [3, 3]
    for image, versions in zip(drawn.images, drawn.loops, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(versions[-1]))
        assert not np.array_equal(np.asarray(versions[0]), np.asarray(versions[1]))
    told |= {"loops": 0, "num_images_per_prompt": 1}
    first = pipe(PROMPT, cutouts, generator=[torch.Generator().manual_seed(0)], **told)
    assert first.loops is None
    apart = np.asarray(first.images[0]).astype(int) - np.asarray(drawn.loops[0][0])
    assert np.abs(apart).max() <= 2  # another batch size rounds otherwise
    with pytest.raises(InputError, match="base draws without loops"):
        load_pipeline("base:toyworld")(PROMPT, num_inference_steps=1, keep_loops=True)
    assert pipe.steps_of(pipe.settings(num_inference_steps=50, loops=3)) == 50 + 3 * 20
    assert pipe.steps_of(pipe.settings(num_inference_steps=50)) == 50 + 10 * 20
    assert pipe.steps_of(pipe.settings(num_inference_steps=50, transfer_everywhere=True)) == 50
    with pytest.raises(InputError, match="num_inference_steps=1000 are too many"):
        pipe(PROMPT, cutouts, num_inference_steps=1000)


@pytest.mark.parametrize("given", [{}, {"transfer_everywhere": True}, {"adapter_scale": 0.0}, {"layout_share": 0.99}])
def test_steps_are_counted_before(pipe, cutouts, hole, given) -> None:
    seen: list[int] = []

    def count(pipeline: Any, step: int, t: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        return given

    for pictures in ({}, hole):
        seen.clear()
        told = {"num_inference_steps": 5, "loops": 2, "class_noun": "mug", "output_type": "latent", **given}
        pipe(PROMPT, cutouts, callback_on_step_end=count, **pictures, **told)
        settings = pipe.settings(num_inference_steps=5, loops=2, **given)
        assert len(seen) == pipe.steps_of(settings, edits=bool(pictures)), (given, bool(pictures))


def test_who_stays_keeps_what_is_its_own(pipe, toy_data, monkeypatch) -> None:
    """Two subjects; the first leaves after one loop: the second is drawn as it is alone."""
    subjects = read_subjects(toy_data / "subjects")
    references = [subjects[6].references(2), subjects[0].references(2)]
    prompts, nouns = [PROMPT, "a photo of a car, in space"], ["mug", "car"]
    told = {"num_inference_steps": 5, "max_loops": 2, "min_loops": 0, "output_type": "latent", "image_guidance": 3.0}

    def seeds(*numbers: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    monkeypatch.setattr(ezigen, "going_on", lambda active, *_: active[1:] if len(active) > 1 else active)
    monkeypatch.setattr(pipe, "_seen", lambda latents: latents.flatten(1))
    together = pipe(prompts, references, class_noun=nouns, generator=seeds(1, 2), **told).images
    second = pipe(prompts[1], references[1], class_noun="car", generator=seeds(2), **told).images
    first = pipe(PROMPT, references[0], class_noun="mug", generator=seeds(1), **{**told, "max_loops": 1}).images
    torch.testing.assert_close(together, torch.cat([first, second]), atol=1e-4, rtol=1e-4)


def test_an_interrupted_loop_leaves_the_finished_picture(pipe, cutouts) -> None:
    told = {"num_inference_steps": 5, "loops": 2, "class_noun": "mug", "output_type": "latent"}
    count = iter(range(100))

    def stop(pipeline: Any, step: int, t: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        pipeline._interrupt = next(count) == 7  # the first step of the second loop
        return given

    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    found = pipe(PROMPT, cutouts, generator=seeds[0], callback_on_step_end=stop, **told).images
    assert torch.equal(found, pipe(PROMPT, cutouts, generator=seeds[1], **{**told, "loops": 1}).images)


def test_references_are_projected_once(pipe, cutouts, hole, monkeypatch) -> None:
    layer, shapes = next(iter(pipe.adapters.by_block().values())), []
    hook = layer.to_k.register_forward_hook(lambda _, given, __: shapes.append(given[0].shape))
    seeds = [torch.Generator().manual_seed(one) for one in range(3)]
    told = {"num_inference_steps": 5, "loops": 2, "num_images_per_prompt": 3, "generator": seeds}
    pipe(PROMPT, cutouts, class_noun="mug", **told, **hole)
    hook.remove()
    assert [tuple(shape[:2]) for shape in shapes if len(shape) == 4] == [(1, 1)]


def release_of(unet: UNet2DConditionModel, seed: int) -> dict[str, Tensor]:
    """A checkpoint with the release's names: the whole UNet, adapters in it, one scale for each block."""
    torch.manual_seed(seed)
    weights = {name: one.detach().clone() for name, one in unet.named_parameters()}
    for block in transformer_blocks(unet):
        attn1 = unet.get_submodule(f"{block}.attn1")
        for name, one in attn1.named_parameters():
            weights[f"{block}.adapter.{name}"] = torch.randn_like(one)
        for name in ("weight", "bias"):
            weights[f"{block}.adapter_norm.{name}"] = torch.randn(attn1.to_q.in_features)
    weights["learnable_weights"] = torch.rand(len(transformer_blocks(unet)))
    return weights


def test_the_releases_checkpoint(tmp_path, capsys) -> None:
    unet = load_backbone("toyworld").unet
    weights = release_of(unet, 5)
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    out = tmp_path / "model"
    cli.run(["export", "--from_release", str(file), "--base", "toyworld", "--delta", "--out", str(out)])
    told = json.loads((out / "delta.json").read_text())
    assert (told["method"], told["options"]["double_residual"]) == ("ezigen", True)
    pipe = load_pipeline(out, "cpu")
    own = pipe.network.adapter_parameters()
    for number, block in enumerate(transformer_blocks(unet)):
        assert torch.equal(own[f"{block}.to_out.0.bias"], weights[f"{block}.adapter.to_out.0.bias"])
        assert torch.equal(own[f"{block}.norm.weight"], weights[f"{block}.adapter_norm.weight"])
        assert own[f"{block}.scale"] == weights["learnable_weights"][number]
    assert (pipe.settings().max_loops, pipe.settings().renoise_timestep) == (9, 400)
    assert all(layer.double_residual for layer in pipe.adapters.by_block().values())

    block = list(transformer_blocks(unet))[1]
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({**weights, f"{block}.adapter.to_q.weight": torch.ones(3, 3)}, "has shape (3, 3)"),
        ({**weights, "learnable_weights": torch.ones(16)}, "learnable_weights has shape (16,)"),
        (
            {**weights, "conv_in.bias": weights["conv_in.bias"] + 1},
            "conv_in.bias is missing, or not that of the base model",
        ),
        ({name: one for name, one in weights.items() if name != f"{block}.adapter.to_k.weight"}, "1 names differ"),
        ({**weights, "conv_in.bias": weights["conv_in.bias"] * float("nan")}, "conv_in.bias is missing, or not that"),
        (
            {name: one for name, one in weights.items() if name != "conv_in.bias"},
            "conv_in.bias is missing, or not that",
        ),
        ({"conv_in.bias": weights["conv_in.bias"]}, "no checkpoint of a release known here"),
    ]
    for given, message in wrong:
        save_file(given, file)
        with pytest.raises(InputError) as caught:
            load_release(file, "toyworld")
        assert message in str(caught.value)
    file.write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(InputError, match="no safetensors file"):
        load_release(file, "toyworld")


def test_from_the_command_line(toy_data, tmp_path, monkeypatch, capsys, pipe) -> None:
    model, reference = tmp_path / "model", tmp_path / "mug.png"
    pipe.save_pretrained(model)
    read_subjects(toy_data / "subjects")[6].references(1)[0].save(reference)
    source, mask, small = tmp_path / "source.png", tmp_path / "mask.png", tmp_path / "small.png"
    Image.new("RGB", (64, 64), "green").save(source)
    Image.new("L", (64, 64), 255).save(mask)
    Image.new("L", (32, 32), 255).save(small)
    words = ["generate", "--model", str(model), "--references", str(reference), "--prompt", PROMPT, "--steps", "2"]
    words += ["--images_per_prompt", "1"]
    edits = [*words, "--image", str(source), "--mask", str(mask)]
    for more, message in (
        ([*words, "--min_loops", "5", "--max_loops", "4"], "min_loops=5 is above max_loops=4"),
        ([*words, "--layout_share", "1.5"], "layout_share must be between 0 and 1"),
        ([*words, "--image", str(source)], "inpainting needs both --image and --mask"),
        ([*words, "--image", str(source), "--mask", str(small)], "they must be of one size"),
        ([*edits, "--loops", "0"], "editing needs a transfer"),
    ):
        assert message in refused(monkeypatch, capsys, *more, "--out", tmp_path / "no")
        assert not (tmp_path / "no").exists()
    out = tmp_path / "edited"
    cli.run([*edits, "--loops", "1", "--save_loops", "--out", str(out)])
    versions = sorted((out / drawing.LOOPS).rglob("*.png"))
    assert [one.relative_to(out).as_posix() for one in versions] == [f"loops/references/0/0/0{i}.png" for i in (0, 1)]
    assert versions[1].read_bytes() == Path(next((out / "references").rglob("*.png"))).read_bytes()
    words = ["generate", "--model", "base:toyworld", "--prompt", "x", "--save_loops", "--out", out]
    assert "draws without loops" in refused(monkeypatch, capsys, *words)
