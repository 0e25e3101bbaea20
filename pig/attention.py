"""Reference Self-Attention (BootPIG, arXiv 2401.13974, section 3.2) as diffusers attention processors.

The only file that touches attention processors. Notation: f = input of a self-attention layer `attn1` (after its
LayerNorm), (B, N, C); f_ref = the same layer's input in the Reference UNet; K = references per sample; H = heads.
All state travels in arguments (`cross_attention_kwargs`); the processors themselves hold settings only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

Pooling = Literal["softmax", "argmax", "mean", "concat"]


@dataclass(frozen=True)
class References:
    """What the Base UNet's `attn1` layers attend to besides their own input.

    features: layer name -> (B, K, N, C), or (1, K, N, C) to serve all samples.
    kept: (B',) long, the samples that the features belong to, which then are (B', K, N, C); the others get plain
        self-attention. None: the features are of all samples.
    """

    features: Mapping[str, Tensor]
    kept: Tensor | None = None


@dataclass(frozen=True)
class ProjectedReferences:
    """The same for sampling: keys and values of the references, projected once a step for all branches and images.

    keys, values: layer name -> (P, K, H, M, d); each of the P groups serves equally many samples.
    plain, branches: `plain` samples at the head of the batch attend to no reference; then (branches, P, images).
    alike_at: the layer up to which nothing has told the branches (and the plain samples) apart: their latents and t
        are the same, and text enters behind it. What it computes serves them all.
    pooling: how the references are merged; None: as the layer was installed.
    strength: 0, as without references, to 1, Eq. 3 and 8.
    """

    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    plain: int = 0
    branches: int = 1
    alike_at: str | None = None
    pooling: Pooling | None = None
    strength: float = 1.0


class LastLayerReachedError(Exception):
    """Ends the Reference UNet's forward pass: what lies behind its last `attn1` input serves nobody."""


def self_attention(attn: Attention, f: Tensor) -> Tensor:
    """SA(f), Eq. 2: (B, N, C) -> (B, N, C)."""
    return _output(attn, _attend(*(_heads(attn, project(f)) for project in (attn.to_q, attn.to_k, attn.to_v))))


def reference_self_attention(attn: Attention, f: Tensor, f_ref: Tensor, f_ref_key: Tensor | None = None) -> Tensor:
    """RSA(f, f_ref) = W_o softmax(q(f) [k(f); k(f_ref)]^T / sqrt(d)) [v(f); v(f_ref)], Eq. 3.

    The same W_q, W_k, W_v, W_o serve both parts. f: (B, N, C); f_ref: (B or 1, M, C) -> (B, N, C).
    f_ref_key: what enters the keys instead of f_ref.
    """
    k_ref = _heads(attn, attn.to_k(f_ref if f_ref_key is None else f_ref_key))
    v_ref = _heads(attn, attn.to_v(f_ref))
    q, k, v = (_heads(attn, project(f)) for project in (attn.to_q, attn.to_k, attn.to_v))  # (B, H, N, d)
    k = torch.cat([k, k_ref.expand(len(k), -1, -1, -1)], dim=2)  # (B, H, N + M, d)
    v = torch.cat([v, v_ref.expand(len(v), -1, -1, -1)], dim=2)
    return _output(attn, _attend(q, k, v))


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v and log sum exp(q k^T / sqrt(d)): (B, H, N, d) and (B, H, N). Not for training."""
    if q.device.type in ("cpu", "meta"):
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype in (torch.float16, torch.bfloat16):
        o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    else:
        o, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return o, lse[..., : q.shape[2]]  # some kernels pad it


def merge(o: Tensor, lse: Tensor, o_ref: Tensor, lse_ref: Tensor) -> Tensor:
    """Attention to two sets of keys from the attention to each: a convex combination, weighted by their sums of exp."""
    return o.lerp(o_ref, (lse_ref - lse).sigmoid()[..., None].to(o.dtype))


def pool_references(o: Tensor, o_i: Tensor, pooling: Pooling) -> Tensor:
    """Merge the outputs of K references, section 3.6. o: (B, N, C), Eq. 5; o_i: (B, K, N, C), Eq. 6 -> (B, N, C)."""
    if pooling == "mean":
        return o_i.mean(dim=1)
    difference = o_i - o[:, None]
    n = difference.float().norm(dim=-1, keepdim=True)  # (B, K, N, 1)
    if pooling == "softmax":
        p = n.softmax(dim=1)  # Eq. 7
    else:
        p = F.one_hot(n.squeeze(-1).argmax(dim=1), o_i.shape[1]).movedim(-1, 1)[..., None]
    return o + (p * difference).sum(dim=1).to(o.dtype)  # Eq. 8


def slow_backward(x: Tensor) -> bool:
    """On CPUs the bf16 backward pass of scaled_dot_product_attention takes twice as long as plain products."""
    half = torch.is_autocast_enabled("cpu") or (x.dtype is torch.bfloat16 and x.device.type == "cpu")
    return half and x.device.type in ("cpu", "meta") and torch.is_grad_enabled()


def _heads(attn: Attention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, N, C) -> (B, H, N, d)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, all (B, H, N, d)."""
    if slow_backward(q):
        # A few samples at a time: what fits into no cache costs twice the time.
        size = max(1, 2**22 // (q.shape[1] * q.shape[2] * k.shape[2]))
        parts = zip(q.split(size), k.split(size), v.split(size), strict=True)
        o = [((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v for q, k, v in parts]
        return torch.cat(o) if len(o) > 1 else o[0]
    return F.scaled_dot_product_attention(q, k, v)


def _output(attn: Attention, x: Tensor) -> Tensor:
    linear, dropout = attn.to_out
    return dropout(linear(x.transpose(1, 2).flatten(2)))  # (B, H, N, d) -> (B, N, C)


class ReferenceAttnProcessor(AttnProcessor2_0):
    """The Base UNet's `attn1`: RSA where references are given, diffusers' own self-attention where not."""

    def __init__(self, name: str, pooling: Pooling, key_scale: float) -> None:
        super().__init__()
        self.name, self.pooling, self.key_scale = name, pooling, key_scale

    def project(self, attn: Attention, f_ref: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (P, K, H, M, d) of reference features (P, K, M, C)."""
        f_ref = f_ref.to(attn.to_k.weight.dtype)
        f_ref_key = f_ref * self.key_scale if self.key_scale != 1 else f_ref
        k, v = attn.to_k(f_ref_key), attn.to_v(f_ref)
        k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(2, 3) for x in (k, v))
        return k, v

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        references: References | ProjectedReferences | None = None,
    ) -> Tensor:
        if references is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if isinstance(references, ProjectedReferences):
            return self.sample(attn, hidden_states, references)
        if self.name not in references.features:
            raise ValueError(f"the references hold no features for layer {self.name!r}")
        f, f_ref = hidden_states, references.features[self.name].to(hidden_states.dtype)
        if len(f_ref) not in ((1, len(f)) if references.kept is None else (len(references.kept),)):
            raise ValueError(f"{self.name}: references of {len(f_ref)} samples for a batch of {len(f)}")

        f_ref_key = f_ref * self.key_scale if self.key_scale != 1 else f_ref
        if references.kept is not None:
            # RSA(f, f) = SA(f): doubling all keys changes no softmax average. So a dropped sample stays in the batch.
            own = f[:, None].expand(-1, f_ref.shape[1], -1, -1)
            scaled = f_ref_key is not f_ref
            f_ref = own.index_copy(0, references.kept, f_ref)
            f_ref_key = own.index_copy(0, references.kept, f_ref_key) if scaled else f_ref

        if self.pooling == "concat":
            return reference_self_attention(attn, f, f_ref.flatten(1, 2), f_ref_key.flatten(1, 2))
        o_i = [
            reference_self_attention(attn, f, r, r_key)
            for r, r_key in zip(f_ref.unbind(1), f_ref_key.unbind(1), strict=True)
        ]
        if len(o_i) == 1:
            return o_i[0]
        return pool_references(self_attention(attn, f), torch.stack(o_i, dim=1), self.pooling)

    def sample(self, attn: Attention, f: Tensor, references: ProjectedReferences) -> Tensor:
        """RSA with no product done twice: the self part once, each reference part once, merged by their log sums.

        Equal to the above but for rounding, at (1 + K) N^2 in place of (1 + 2 K) N^2.
        """
        keys, values = references.keys[self.name], references.values[self.name]  # (P, K, H, M, d)
        pooling = self.pooling if references.pooling is None else references.pooling
        plain, branches = references.plain, references.branches
        alike = self.name == references.alike_at
        if alike:
            f, plain, branches = f[plain : plain + (len(f) - plain) // branches], 0, 1
        q, k, v = (_heads(attn, project(f)) for project in (attn.to_q, attn.to_k, attn.to_v))  # (B, H, N, d)
        o, lse = attend_with_lse(q, k, v)
        o_self, lse_self = o[plain:], lse[plain:]

        # All samples of a group ask the same keys: as one long sequence of queries, so that no key is copied.
        asked = q[plain:].unflatten(0, (branches, len(keys), -1)).permute(1, 3, 0, 2, 4, 5)
        # asked: (P, H, branches, images, N, d)

        def attend(keys: Tensor, values: Tensor) -> Tensor:
            """keys, values: (P, H, M, d) -> (B - plain, H, N, d), the self part merged in."""
            o_ref, lse_ref = attend_with_lse(asked.flatten(2, 4), keys, values)
            o_ref = o_ref.view(asked.shape).permute(2, 0, 3, 1, 4, 5).flatten(0, 2)
            lse_ref = lse_ref.reshape(asked.shape[:-1]).permute(2, 0, 3, 1, 4).flatten(0, 2)
            return merge(o_self, lse_self, o_ref, lse_ref)

        if pooling == "concat":
            merged = [attend(*(x.transpose(1, 2).flatten(2, 3) for x in (keys, values)))]
        else:
            merged = [attend(k_i, v_i) for k_i, v_i in zip(keys.unbind(1), values.unbind(1), strict=True)]
        o_i = [_output(attn, one) for one in merged]
        compares = len(o_i) > 1 and pooling != "mean"
        of_all = alike or compares or references.strength < 1
        own = _output(attn, o if of_all else o[:plain])  # SA(f), Eq. 2
        out = o_i[0] if len(o_i) == 1 else pool_references(own[plain:], torch.stack(o_i, dim=1), pooling)
        if references.strength < 1:
            out = own[plain:].lerp(out, references.strength)
        if alike:
            return torch.cat([own[: references.plain], *[out] * references.branches])
        return torch.cat([own[:plain], out])


class CollectAttnProcessor:
    """The Reference UNet's `attn1`: notes its input f_ref under the layer's name, and ends the pass at the last."""

    def __init__(self, name: str, is_last: bool) -> None:
        self.name, self.is_last = name, is_last

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        collected: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if collected is not None:
            collected[self.name] = hidden_states
            if self.is_last:
                raise LastLayerReachedError
        return self_attention(attn, hidden_states)


class TextAttnProcessor(AttnProcessor2_0):
    """`attn2` of both UNets: cross-attention to the text, deaf to what is meant for `attn1`."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        references: References | ProjectedReferences | None = None,
        collected: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if not slow_backward(hidden_states):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        q, text = attn.to_q(hidden_states), encoder_hidden_states
        return _output(attn, _attend(*(_heads(attn, x) for x in (q, attn.to_k(text), attn.to_v(text)))))


def self_attention_layers(unet: UNet2DConditionModel) -> list[str]:
    """Names of all `attn1`, in the order of the forward pass: down, mid, up."""
    rank = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    names = [name for name, module in unet.named_modules() if isinstance(module, Attention) and name.endswith(".attn1")]
    return sorted(names, key=lambda name: rank[name.split(".")[0]])


def install_reference_attention(unet: UNet2DConditionModel, *, pooling: Pooling, key_scale: float) -> None:
    """Make the `attn1` of the Base UNet RSA layers."""
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling {pooling!r} is none of {get_args(Pooling)}")
    _install(unet, {name: ReferenceAttnProcessor(name, pooling, key_scale) for name in self_attention_layers(unet)})


def install_collecting_attention(unet: UNet2DConditionModel) -> None:
    """Make the `attn1` of the Reference UNet note their inputs."""
    names = self_attention_layers(unet)
    _install(unet, {name: CollectAttnProcessor(name, is_last=name == names[-1]) for name in names})


def _install(unet: UNet2DConditionModel, own: Mapping[str, object]) -> None:
    unet.set_attn_processor(
        {key: own.get(key.removesuffix(".processor"), TextAttnProcessor()) for key in unet.attn_processors}
    )
