"""EZIGen against its equations (arXiv 2409.08091, section 3.2 and 3.3), written plainly here."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import MethodType
from typing import Any

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel
from torch import Tensor

from pig.attention.adapters import ScaledReferences
from pig.attention.install import transformer_blocks
from pig.data.subjects import read_subjects
from pig.errors import InputError
from pig.methods.ezigen import EZIGenNet
from pig.methods.ezigen import pipeline as ezigen
from pig.methods.ezigen.module import EZIGen
from pig.methods.ezigen.pipeline import EZIGenSettings, going_on

PROMPTS = ["a photo of a mug, on a beach", "a photo of a mug, in space"]


def changed(net: EZIGenNet) -> EZIGenNet:
    """As after training."""
    torch.manual_seed(3)
    for parameter in net.adapter_parameters().values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


def plain_unet(unet: UNet2DConditionModel, net: EZIGenNet, features: dict[str, Tensor], double: bool) -> Any:
    """The UNet with Eq. 4 in each block, from the weights of `net`; features: block -> (B, k, N, C)."""
    weights = net.adapter_parameters()

    def forward(block: Any, x: Tensor, *_: Any, encoder_hidden_states: Tensor, **__: Any) -> Tensor:
        start = f"{block.own}."
        w = {key.removeprefix(start): one for key, one in weights.items() if key.startswith(start)}
        h = x + block.attn1(block.norm1(x))
        c = torch.nn.functional.layer_norm(h, h.shape[-1:], w["norm.weight"], w["norm.bias"], 1e-5)
        keys = torch.cat([c, *(w["scale"] * f for f in features[block.own].unbind(1))], dim=1)
        heads, out = block.attn1.heads, []
        q, k, v = c @ w["to_q.weight"].T, keys @ w["to_k.weight"].T, keys @ w["to_v.weight"].T
        width = q.shape[-1] // heads
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
            out.append(scores.softmax(-1) @ v[..., part])
        a = torch.cat(out, -1) @ w["to_out.0.weight"].T + w["to_out.0.bias"]
        h = h + a + (c if double else 0)
        h = h + block.attn2(block.norm2(h), encoder_hidden_states)
        return h + block.ff(block.norm3(h))

    for name in transformer_blocks(unet):
        block = unet.get_submodule(name)
        block.own, block.forward = name, MethodType(forward, block)
    return unet


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_outputs_features_and_gradients_are_those_of_the_equations(base_unet, inputs, double, count) -> None:
    plain = copy.deepcopy(base_unet)
    net = changed(EZIGenNet(base_unet, double_residual=double))
    reference, text = inputs["reference"][:, :count], inputs["text"]
    told = torch.randn(3, count, 5, 16, generator=torch.Generator().manual_seed(5))
    features = net.encode_reference(reference, inputs["timesteps"], told)

    seen: dict[str, list[Tensor]] = {name: [] for name in transformer_blocks(plain)}
    hooks = [
        plain.get_submodule(f"{name}.norm1").register_forward_hook(lambda _, __, out, name=name: seen[name].append(out))
        for name in seen
    ]
    for j in range(count):
        plain(reference[:, j], inputs["timesteps"], told[:, j])
    for hook in hooks:
        hook.remove()
    assert list(features) == list(transformer_blocks(plain))
    for name, f in features.items():
        torch.testing.assert_close(f, torch.stack(seen[name], 1), atol=1e-5, rtol=1e-5)

    expected = plain_unet(plain, net, features, double)(inputs["latents"], inputs["timesteps"], text).sample
    wanted = torch.autograd.grad(expected.square().mean(), list(net.adapter_parameters().values()))
    found = net(inputs["latents"], inputs["timesteps"], text, features)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    gradients = torch.autograd.grad(found.square().mean(), list(net.adapter_parameters().values()))
    for name, ours, theirs in zip(net.adapter_parameters(), gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3, msg=name)


def test_names_start_and_absence(base_unet, inputs) -> None:
    plain = copy.deepcopy(base_unet)
    net = EZIGenNet(base_unet)
    names = ("norm.weight", "norm.bias", "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
    names += ("to_out.0.bias", "scale")
    assert set(net.adapter_parameters()) == {f"{block}.{name}" for block in transformer_blocks(plain) for name in names}
    for block in transformer_blocks(plain):
        own, attn1 = net.adapter_parameters(), plain.get_submodule(block).attn1
        assert torch.equal(own[f"{block}.to_q.weight"], attn1.to_q.weight)
        assert torch.equal(own[f"{block}.norm.weight"], plain.get_submodule(block).norm1.weight)
        assert own[f"{block}.scale"] == 1
    given = (inputs["latents"], inputs["timesteps"], inputs["text"])
    assert torch.equal(net(*given), plain(*given).sample)
    assert "fuser" not in " ".join(net.unet.state_dict())
    with pytest.raises(ValueError, match="adapters are of another UNet"):
        EZIGenNet(tiny_unet(), adapters=type(net.adapters)({"a": 8}, {"a": 2}))


def test_sampling_in_one_batch_equals_branch_by_branch(base_unet, inputs) -> None:
    """Projected once, merged by log sums: the same as each branch alone by Eq. 4."""
    net = changed(EZIGenNet(base_unet))
    with torch.no_grad():
        t = torch.full((3,), 500)
        told = inputs["text"][:, None].expand(-1, 2, -1, -1)
        features = net.encode_reference(inputs["reference"], torch.ones(3).long(), told)
        text, empty = inputs["text"], torch.zeros_like(inputs["text"])
        z = inputs["latents"]
        expected = [net(z, t, empty), net(z, t, empty, features), net(z, t, text, features)]
        context = ScaledReferences(features, plain=3, branches=2)
        for _ in range(2):  # the second time with what the first has projected
            found = net(z.repeat(3, 1, 1, 1), t.repeat(3), torch.cat([empty, empty, text]), context)
            torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-4)
        off = replace(context, adapter_scale=0.0)
        found = net(z.repeat(3, 1, 1, 1), t.repeat(3), torch.cat([empty, empty, text]), off)
        torch.testing.assert_close(found[6:], net(z, t, text), atol=1e-6, rtol=1e-5)


def test_a_dropped_sample_has_no_reference_tokens(base_unet, inputs) -> None:
    net = changed(EZIGenNet(base_unet))
    told = inputs["text"][:, None]
    features = net.encode_reference(inputs["reference"][:, :1], inputs["timesteps"], told)
    kept = torch.tensor([0, 2])
    given = (inputs["latents"], inputs["timesteps"], inputs["text"])
    some = net(*given, {name: f[kept] for name, f in features.items()}, kept=kept)
    every = net(*given, features)
    torch.testing.assert_close(some[kept], every[kept], atol=1e-5, rtol=1e-4)
    alone = plain_unet(copy.deepcopy(base_unet), net, {name: f[:, :0] for name, f in features.items()}, False)
    torch.testing.assert_close(some[1:2], alone(*given).sample[1:2], atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing(inputs) -> None:
    found = []
    for checkpointing in (False, True):
        net = changed(EZIGenNet(tiny_unet()).train())
        if checkpointing:
            net.enable_gradient_checkpointing()
        net.unet.requires_grad_(False)
        told = inputs["text"][:, None]
        with torch.no_grad():
            features = net.encode_reference(inputs["reference"][:, :1], inputs["timesteps"], told)
        net(inputs["latents"], inputs["timesteps"], inputs["text"], features).square().mean().backward()
        found.append({name: one.grad for name, one in net.adapter_parameters().items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_who_goes_on() -> None:
    settings = EZIGenSettings(min_loops=3, max_loops=10)
    assert going_on([0, 1], [1.0, 1.0], 2, settings) == [0, 1]  # not before min_loops
    assert going_on([0, 2, 5], [0.98, 0.99, 1.0], 3, settings) == [0]


@pytest.mark.parametrize(
    ("given", "similar_from", "loops"),
    [
        ({}, None, 10),  # never alike: max_loops
        ({}, 1, 3),  # at once: min_loops
        ({}, 5, 5),
        ({"min_loops": 0, "max_loops": 4}, None, 4),
        ({"loops": 2}, None, 2),
        ({"loops": 0}, None, 0),
        ({"transfer_everywhere": True}, None, 0),
        ({"adapter_scale": 0.0}, None, 0),
    ],
)
def test_number_of_loops(toy_data, monkeypatch, given, similar_from, loops) -> None:
    """By similarities that are given: picture 1 of two follows the rule, picture 0 never converges."""
    pipe, transfers, asked = EZIGen("toyworld").pipeline(), [], []

    def seen(latents: Tensor) -> Tensor:
        asked.append(len(latents))
        number = len(asked) - 1  # 0: before the first loop
        found = torch.nn.functional.one_hot(torch.full((len(latents),), number % 7), 7).float()
        if similar_from is not None and number >= similar_from and len(latents) == 2:
            found[1] = torch.ones(7)
        if similar_from is not None and number >= similar_from - 1 and len(latents) == 2:
            found[1] = torch.ones(7)
        return found

    transfer = pipe._transfer

    def counted(latents: Tensor, pictures: list[int], *rest: Any) -> Tensor:
        transfers.append(list(pictures))
        return transfer(latents, pictures, *rest)

    monkeypatch.setattr(pipe, "_seen", seen)
    monkeypatch.setattr(pipe, "_transfer", counted)
    cutouts = read_subjects(toy_data / "subjects")[6].references(1)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pipe(PROMPTS, cutouts, class_noun="mug", num_inference_steps=2, generator=generators, **given)
    assert sum(1 in pictures for pictures in transfers) == loops
    if similar_from is not None:  # the other one goes on alone
        assert len(transfers) == 10
        assert transfers[-1] == [0]


def test_layout_is_the_base_model_and_transfer_is_not(toy_data) -> None:
    pipe = EZIGen("toyworld").pipeline()
    cutouts = read_subjects(toy_data / "subjects")[6].references(1)

    def draw(**given: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        told = {"num_inference_steps": 5, "output_type": "latent", "generator": generator, "loops": 0, **given}
        return pipe(PROMPTS[0], cutouts, class_noun="mug", **told).images

    base = draw(adapter_scale=0.0)
    assert torch.equal(draw(layout_share=1.0), base)
    assert not torch.allclose(draw(layout_share=0.6), base)
    assert torch.equal(draw(layout_share=0.0), draw(transfer_everywhere=True))
    assert not torch.allclose(draw(image_guidance=3.0), draw())
    for name in ("unipc", "ddim", "dpm++"):
        assert draw(scheduler=name, loops=2).isfinite().all()
    assert not torch.allclose(draw(loops=1), draw(loops=1, renoise_timestep=900))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_loops": 5, "max_loops": 4}, "min_loops=5 is above max_loops=4"),
        ({"layout_share": 1.5}, "layout_share must be between 0 and 1"),
        ({"similarity_stop": 2.0}, "similarity_stop must be between -1 and 1"),
        ({"loops": 1.5}, "loops must be a whole number"),
        ({"transfer_everywhere": 1}, "transfer_everywhere must be true or false"),
    ],
)
def test_controls_out_of_their_range(given, message) -> None:
    with pytest.raises(InputError, match=message):
        EZIGenSettings.given({}, given)
    with pytest.raises(InputError, match="reference_timestep must be in"):
        EZIGen("toyworld", reference_timestep=1000)


def test_the_stop_rule_in_place_of_a_models_own_loops() -> None:
    own = {"loops": 3, "text_guidance": 1.5}
    assert EZIGenSettings.given(own, {}).loops == 3
    chosen = EZIGenSettings.given(own, {"loops": None, "text_guidance": None, "negative_prompt": None})
    assert (chosen.loops, chosen.text_guidance, chosen.negative_prompt) == (None, 1.5, "")
    assert EZIGenSettings.given(own, chosen.as_json()) == chosen  # as `generate` hands them on


def test_the_stop_rules_clip_is_named_where_it_is_missing(toy_data, monkeypatch) -> None:
    pipe = EZIGen("toyworld").pipeline()
    pipe.register_to_config(clip="nowhere/no-clip")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cutouts = read_subjects(toy_data / "subjects")[6].references(1)
    with pytest.raises(InputError, match=r"(?s)nowhere/no-clip.*loops"):
        pipe(PROMPTS[0], cutouts, num_inference_steps=5)
    assert ezigen.CLIP == "openai/clip-vit-base-patch32"
