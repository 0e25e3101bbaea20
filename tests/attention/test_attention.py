"""Reference Self-Attention: the identities of BootPIG's Eq. 2, 3 and 5-8, on real UNets."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import tiny_two_unet
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from pig.attention.install import self_attention_layers
from pig.attention.merged import MergedReferences
from pig.attention.products import self_attention
from pig.attention.reference import pool_references, reference_self_attention
from pig.methods.bootpig import TwoUNet

POOLINGS = ("softmax", "argmax", "mean", "concat")


def encode(net: TwoUNet, inputs: dict[str, torch.Tensor], references: slice = slice(None)) -> dict[str, torch.Tensor]:
    return net.encode_reference(inputs["reference"][:, references], inputs["timesteps"], inputs["text"])


def predict(net: TwoUNet, inputs: dict[str, torch.Tensor], references: object = None, **more: object) -> torch.Tensor:
    return net(inputs["latents"], inputs["timesteps"], inputs["text"], references, **more)


@pytest.mark.parametrize("grad", [False, True])
def test_without_references_bit_equal_to_the_plain_unet(base_unet, inputs, grad) -> None:
    plain = copy.deepcopy(base_unet)
    net = TwoUNet(base_unet, copy.deepcopy(base_unet))
    with torch.set_grad_enabled(grad):
        expected = plain(inputs["latents"], inputs["timesteps"], inputs["text"]).sample
        assert torch.equal(predict(net, inputs), expected)


def plain_loops(attn: Attention, f: torch.Tensor, f_ref: torch.Tensor) -> torch.Tensor:
    """Eq. 3 one query at a time."""
    keys, values = torch.cat([f, f_ref], 1) @ attn.to_k.weight.T, torch.cat([f, f_ref], 1) @ attn.to_v.weight.T
    queries, d = f @ attn.to_q.weight.T, attn.to_q.weight.shape[0] // attn.heads
    out = torch.zeros_like(queries)
    for b in range(f.shape[0]):
        for head in range(attn.heads):
            part = slice(head * d, (head + 1) * d)
            for n in range(f.shape[1]):
                weights = (keys[b, :, part] @ queries[b, n, part] / math.sqrt(d)).softmax(0)
                out[b, n, part] = weights @ values[b, :, part]
    return out @ attn.to_out[0].weight.T + attn.to_out[0].bias


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("references", [1, 4])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("images", [1, 3])
@torch.no_grad()
def test_sampling_in_one_batch_equals_branch_by_branch(base_unet, pooling, references, groups, images) -> None:
    """Projected once, merged by log sums, three branches at once: the same as each branch alone by Eq. 3."""
    net = TwoUNet(base_unet, tiny_like(base_unet), pooling=pooling, reference_key_scale=1.1)
    generator = torch.Generator().manual_seed(0)
    count = groups * images
    latents = torch.randn(count, 4, 8, 8, generator=generator)
    text, empty = torch.randn(count, 5, 16, generator=generator), torch.randn(1, 5, 16, generator=generator)
    t = torch.full((count,), 500)
    reference = torch.randn(groups, references, 4, 8, 8, generator=generator)
    features = net.encode_reference(reference, t[:groups], text[:groups])

    each = {name: f.repeat_interleave(images, 0) for name, f in features.items()}
    empty = empty.expand_as(text)
    expected = [net(latents, t, empty), net(latents, t, empty, each), net(latents, t, text, each)]
    projected = MergedReferences(features, plain=count, branches=2, first_layer=net.layers[0])
    found, _ = net.sample(latents.repeat(3, 1, 1, 1), t.repeat(3), torch.cat([empty, empty, text]), projected)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("references", [1, 4])
@pytest.mark.parametrize("dropped", [0, 1, 3])
@torch.no_grad()
def test_sampling_with_references_dropped_per_sample(base_unet, inputs, pooling, references, dropped) -> None:
    """Samples at the head of the batch without references, the others with their own: as in training."""
    net = TwoUNet(base_unet, tiny_like(base_unet), pooling=pooling)
    reference = torch.randn(3, references, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = inputs["timesteps"]
    features = net.encode_reference(reference, t, inputs["text"])
    kept = {name: f[dropped:] for name, f in features.items()}
    expected = predict(net, inputs, kept, kept=torch.arange(dropped, 3))
    given = None
    if dropped < 3:
        given = MergedReferences(kept, plain=dropped)  # no `first_layer`: these are no branches of the same latents
    found, _ = net.sample(inputs["latents"], t, inputs["text"], given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def tiny_like(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same architecture with other weights."""
    other = copy.deepcopy(unet)
    torch.manual_seed(7)
    for parameter in other.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize("grad", [False, True])
def test_rsa_is_equation_3_and_rsa_of_itself_is_sa(grad) -> None:
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8)
    f, f_ref = torch.randn(2, 6, 16), torch.randn(2, 9, 16)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(reference_self_attention(attn, f, f_ref), plain_loops(attn, f, f_ref))
        torch.testing.assert_close(reference_self_attention(attn, f, f), self_attention(attn, f))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("key_scale", [1.0, 1.1])
def test_dropped_samples_equal_plain_self_attention(inputs, pooling, key_scale) -> None:
    net = tiny_two_unet(pooling=pooling, reference_key_scale=key_scale)
    references, plain = encode(net, inputs), predict(net, inputs)
    one = {name: f[1:2] for name, f in references.items()}
    mixed = predict(net, inputs, one, kept=torch.tensor([1]))
    kept = predict(net, inputs, references)
    torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], kept[1], atol=1e-5, rtol=1e-4)
    assert (kept - plain).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_one_reference_is_rsa_and_order_does_not_matter(inputs, pooling) -> None:
    net, single = tiny_two_unet(pooling=pooling), tiny_two_unet(pooling="concat")
    one = encode(net, inputs, slice(1))
    torch.testing.assert_close(predict(net, inputs, one), predict(single, inputs, one))
    two = encode(net, inputs)
    swapped = {name: f.flip(1) for name, f in two.items()}
    torch.testing.assert_close(predict(net, inputs, two), predict(net, inputs, swapped), atol=1e-5, rtol=1e-4)


def test_pooling_against_loops() -> None:
    torch.manual_seed(0)
    o, o_i = torch.randn(2, 5, 8), torch.randn(2, 3, 5, 8)
    for b in range(2):
        for n in range(5):
            norms = torch.tensor([(o_i[b, i, n] - o[b, n]).square().sum().sqrt() for i in range(3)])
            p = norms.exp() / norms.exp().sum()  # Eq. 7
            expected = o[b, n] + sum(p[i] * (o_i[b, i, n] - o[b, n]) for i in range(3))  # Eq. 8
            torch.testing.assert_close(pool_references(o, o_i, "softmax")[b, n], expected)
            torch.testing.assert_close(pool_references(o, o_i, "argmax")[b, n], o_i[b, norms.argmax(), n])
    torch.testing.assert_close(pool_references(o, o_i, "mean"), o_i.mean(1))


def test_features_of_one_sample_serve_all(inputs) -> None:
    net = tiny_two_unet()
    t, text = torch.full((1,), 500), inputs["text"][:1]
    one = net.encode_reference(inputs["reference"][:1], t, text)
    many = {name: f.expand(3, -1, -1, -1) for name, f in one.items()}
    torch.testing.assert_close(predict(net, inputs, one), predict(net, inputs, many))


def test_key_scale_changes_keys_only() -> None:
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8)
    f, f_ref = torch.randn(1, 4, 16), torch.randn(1, 4, 16)
    scaled = copy.deepcopy(attn)
    # k(1.1 f_ref) of the reference part only: put the factor into the keys by hand.
    keys = torch.cat([attn.to_k(f), attn.to_k(1.1 * f_ref)], 1)
    values = torch.cat([attn.to_v(f), attn.to_v(f_ref)], 1)
    q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (attn.to_q(f), keys, values))
    expected = scaled.to_out[0](((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(reference_self_attention(attn, f, f_ref, 1.1 * f_ref), expected)


def test_reference_pass_matches_the_full_unet(base_unet, inputs) -> None:
    """Stopping at the last `attn1` and collecting changes no feature: hooks on the untouched UNet see the same."""
    seen: dict[str, torch.Tensor] = {}
    plain = copy.deepcopy(base_unet)
    for name in self_attention_layers(plain):
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    plain(inputs["reference"][:, 0], inputs["timesteps"], inputs["text"])
    net = TwoUNet(copy.deepcopy(base_unet), base_unet)
    features = encode(net, inputs, slice(1))
    assert list(features) == net.layers == list(seen)
    for name in net.layers:
        torch.testing.assert_close(features[name][:, 0], seen[name], atol=1e-5, rtol=1e-4)


def test_mistakes_are_named(base_unet, inputs) -> None:
    with pytest.raises(ValueError, match="two instances"):
        TwoUNet(base_unet, base_unet)
    net = TwoUNet(base_unet, copy.deepcopy(base_unet))
    features = encode(net, inputs)
    missing = features.pop(net.layers[2]) is not None and net.layers[2]
    with pytest.raises(ValueError, match=str(missing)):
        predict(net, inputs, features)
    with pytest.raises(ValueError, match="pooling 'max'"):
        tiny_two_unet(pooling="max")
    with pytest.raises(ValueError, match=r"\(B, K, 4, h, w\)"):
        net.encode_reference(inputs["latents"], inputs["timesteps"], inputs["text"])


def test_sd21_base_true_configuration() -> None:
    config = {
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    }
    with torch.device("meta"):
        net = TwoUNet(UNet2DConditionModel(**config), UNet2DConditionModel(**config))
    groups = net.trainable_parameters()
    assert len(net.layers) == 16
    assert round(sum(p.numel() for p in net.base_unet.parameters()) / 1e6, 1) == 865.9
    assert round(sum(p.numel() for p in groups["rsa"].values()) / 1e6, 2) == 49.57
    assert round(sum(p.numel() for p in groups["reference_unet"].values()) / 1e6, 1) == 863.3
