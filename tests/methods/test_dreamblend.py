"""DreamBlend: word maps, and the gradient step towards them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor

from pig.attention.maps import distance, layers_of, maps_bytes, recording
from pig.cli import run
from pig.errors import InputError
from pig.methods import load_blend, load_pipeline
from pig.methods.dreamblend import DreamBlendPipeline
from pig.methods.dreambooth.module import DreamBooth
from pig.models.backbone import load_backbone
from pig.sampling.delta import save_delta

PROMPTS = ["a photo of a mug, on a beach", "a photo of a mug, in space"]


def tuned(seed: int) -> DreamBooth:
    module = DreamBooth("toyworld", identifier="sks", text_guidance=3.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in module.trainable().values():
            one += 0.01 * torch.randn(one.shape, generator=generator) * one.abs().mean()
    return module


@pytest.fixture(scope="module")
def blend() -> DreamBlendPipeline:
    pipeline = DreamBlendPipeline.of(tuned(1).pipeline(), tuned(2).pipeline())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def same(blend) -> DreamBlendPipeline:
    """Early and late are one."""
    late = blend.tuned_parts[1]
    pipeline = DreamBlendPipeline.of(late, late)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipeline: Any, prompts: Any = PROMPTS[0], generator: Any = None, **told: Any) -> Tensor:
    told = {"class_noun": "mug", "num_inference_steps": 4, "output_type": "latent", "scheduler": "ddim", **told}
    return pipeline(prompts, generator=generator or seeds(1), **told).images


def test_maps_are_those_of_plain_attention() -> None:
    """Against diffusers' own processor, which computes the probabilities; and the pass itself is untouched."""
    unet = load_backbone("toyworld").unet
    text = torch.randn(3, 24, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = unet(latents, torch.tensor([500] * 3), text).sample
    with recording(unet, last=2) as maps:
        found = unet(latents, torch.tensor([500] * 3), text).sample
    assert torch.equal(found, expected)
    seen: list[Tensor] = []

    class Watched(AttnProcessor):
        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **more: Any) -> Any:
            if encoder_hidden_states is not None:
                query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
                query, key = attn.head_to_batch_dim(query), attn.head_to_batch_dim(key)
                seen.append(attn.get_attention_scores(query, key).unflatten(0, (len(hidden_states), -1)))
            return super().__call__(attn, hidden_states, encoder_hidden_states, **more)

    unet.set_attn_processor(Watched())
    unet(latents, torch.tensor([500] * 3), text)
    assert len(seen) == len(maps) == 11
    for one, other in zip(maps.values(), seen, strict=True):
        torch.testing.assert_close(one, other[-2:], atol=5e-5, rtol=0)  # layers behind it see other rounding
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:-1]))
    total = sum(one.half().nbytes for one in maps.values()) // 2
    assert maps_bytes(unet, layers_of(unet, coarse=False), (16, 16), 24) == total
    coarse = layers_of(unet, coarse=True)
    assert set(coarse) < set(maps)
    assert max(maps[name].shape[2] for name in coarse) < max(one.shape[2] for one in maps.values())


def test_the_gradient_against_finite_differences() -> None:
    unet = load_backbone("toyworld").unet.double()
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 24, unet.config.cross_attention_dim, generator=generator, dtype=torch.float64)
    latents, other = (torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    words = torch.ones(2, 24, dtype=torch.bool)
    words[1, 3:] = False
    t = torch.tensor([700, 700])

    def maps_at(latents: Tensor) -> dict[str, Tensor]:
        with recording(unet, last=2) as maps:
            unet(latents, t, text)
        return dict(maps)

    with torch.no_grad():
        goal = maps_at(other)

    def loss(latents: Tensor) -> Tensor:
        return distance(maps_at(latents), goal, words)

    moved = latents.clone().requires_grad_()
    by_hand = torch.zeros(2, dtype=torch.float64)
    for name, one in maps_at(latents).items():
        for sample in range(2):
            for word in range(24):
                if words[sample, word]:
                    by_hand[sample] += (one - goal[name])[sample, :, :, word].square().mean(0).sum().detach()
    torch.testing.assert_close(loss(moved), by_hand)
    (gradient,) = torch.autograd.grad(loss(moved).sum(), moved)
    direction = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
    h = 1e-5
    with torch.no_grad():
        slope = (loss(latents + h * direction) - loss(latents - h * direction)) / (2 * h)
    expected = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope, expected, atol=1e-6, rtol=1e-5)


def test_step_size_0_is_the_late_checkpoint(blend) -> None:
    expected = draw(blend.tuned_parts[1])
    assert torch.equal(draw(blend, step_size=0.0), expected)
    assert torch.equal(draw(blend, guided_share=0.0), expected)
    assert not torch.equal(draw(blend, step_size=0.05), expected)


def test_early_equal_to_late_changes_nothing(same) -> None:
    expected = draw(same.tuned_parts[1])
    # But for rounding: the early pass has the branch without text beside it in its batch.
    torch.testing.assert_close(draw(same, step_size=0.05), expected, atol=1e-3, rtol=0)


def test_the_early_network_may_take_the_first_steps(blend) -> None:
    early, late = blend.tuned_parts
    assert torch.equal(draw(blend, step_size=0.0, early_share=1.0), draw(early))
    half = draw(blend, step_size=0.0, early_share=0.5)
    assert not torch.equal(half, draw(early))
    assert not torch.equal(half, draw(late))


def test_guidance_brings_the_maps_nearer(blend) -> None:
    """After the first step's gradient, as a small step along it must."""
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    seen: dict[float, Tensor] = {}
    for size in (0.0, 0.001):
        distances: list[Tensor] = []
        original = blend.branches

        def watched(
            latents: Tensor,
            t: Tensor,
            step: int,
            names: Any,
            condition: Any,
            settings: Any,
            original: Any = original,
            distances: list[Tensor] = distances,
        ) -> Tensor:
            if condition.early_until == 0 and step == 0:
                maps = []
                for unet, given in ((blend.early_unet, start), (blend.unet, latents)):
                    with recording(unet, last=1) as one:
                        unet(given, t.expand(1), condition.text["text_im"])
                    maps.append(dict(one))
                distances.append(distance(maps[1], maps[0], condition.words))
            return original(latents, t, step, names, condition, settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blend, "branches", watched)
            draw(blend, latents=start, step_size=size)
        (seen[size],) = distances
    assert seen[0.001] < seen[0.0]


def test_pictures_of_a_batch_are_guided_apart(blend) -> None:
    together = draw(blend, PROMPTS, seeds(1, 2), step_size=0.05)
    torch.testing.assert_close(together[1:], draw(blend, PROMPTS[1], seeds(2), step_size=0.05), atol=1e-3, rtol=1e-3)


def test_words_and_levels_matter(blend) -> None:
    usual = draw(blend, step_size=0.05)
    for told in ({"words": "subject"}, {"words": "not_identifier"}, {"coarse": True}, {"guided_share": 0.5}):
        assert not torch.equal(draw(blend, step_size=0.05, **told), usual), told


def test_the_gradient_is_checkpointed_where_memory_is_short(blend, monkeypatch) -> None:
    """As if the first pass with a gradient found no memory: the same pictures, with a warning."""
    expected, attempts, original = draw(blend, step_size=0.05), [], DreamBlendPipeline._gradient

    def short(self: DreamBlendPipeline, *given: Any) -> Tensor:
        attempts.append(self.unet.is_gradient_checkpointing)
        if not attempts[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *given)

    monkeypatch.setattr(DreamBlendPipeline, "_gradient", short)
    try:
        with pytest.warns(UserWarning, match="memory is short"):
            torch.testing.assert_close(draw(blend, step_size=0.05), expected)
        assert attempts == [False, True, True, True, True]
    finally:
        blend.unet.disable_gradient_checkpointing()


def test_bad_steps(tmp_path) -> None:
    """Of the command line, before anything is drawn."""
    for step in (5, 10):
        save_delta(tuned(step).pipeline(), tmp_path / f"tuned/mug_000/step-{step:06d}")
    picture = tmp_path / "subjects/mug_000/00.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGBA", (64, 64), "red").save(picture)
    (tmp_path / "subjects/prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\nmug_000,mug\n\nPrompts\n\nObject Prompts\n\nprompt_list = [\n"
        "'a photo of a {0} {1}, on a beach'.format(unique_token, class_token),\n]\n"
    )
    words = ["generate", f"--model=dreamblend:{tmp_path / 'tuned'}", f"--subjects={tmp_path / 'subjects'}"]
    words += [f"--out={tmp_path / 'out'}"]
    for told, message in {
        ("--early=10", "--late=5"): "--early 10 is later than --late 5",
        ("--early=7",): "--early 7 was not kept of mug_000; there are: 5, 10",
        ("--step=5",): "--step is for a folder made by `tune`",
    }.items():
        with pytest.raises(InputError, match=message):
            run([*words, *told])
    assert not (tmp_path / "out").exists()
    run([*words, "--early=5", "--late=10", "--steps=2", "--images_per_prompt=1"])
    drawn = np.asarray(Image.open(tmp_path / "out/mug_000/0/0.png"))
    expected = load_blend(*(tmp_path / f"tuned/mug_000/step-{step:06d}" for step in (5, 10)), "cpu")(
        PROMPTS[0], class_noun="mug", num_inference_steps=2, generator=seeds(0)
    )
    assert np.array_equal(drawn, np.asarray(expected.images[0]))
    with pytest.raises(InputError, match="--early is not for attention"):
        run(
            ["attention", f"--out={tmp_path / 'a.png'}", "--prompt", PROMPTS[0], f"--references={picture}", "--early=5"]
        )


def test_bad_input(blend, monkeypatch) -> None:
    monkeypatch.setattr("pig.methods.dreamblend.pipeline.maps_bytes", lambda *_: 2**50)
    with pytest.raises(InputError, match="maps of 1 pictures and 4 steps take"):
        draw(blend)
    with pytest.raises(InputError, match="does not hold its class noun"):
        draw(blend, "a photo of a cat")
    tuned_text = DreamBooth("toyworld", identifier="sks", lr_text_encoder=1e-6).pipeline()
    with pytest.raises(InputError, match="one text encoder for both"):
        DreamBlendPipeline.of(tuned_text, copy.copy(tuned_text))
    with pytest.raises(InputError, match="dreamblend:FOLDER, made by `tune`"):
        load_pipeline("dreamblend:toyworld", "cpu")
