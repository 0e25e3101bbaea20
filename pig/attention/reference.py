"""Reference Self-Attention (BootPIG, arXiv 2401.13974, section 3.2), as it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

from pig.attention.install import install, self_attention_layers
from pig.attention.merged import MergedReferences, merged_self_attention
from pig.attention.products import attend, heads, output, self_attention

Pooling = Literal["softmax", "argmax", "mean", "concat"]


@dataclass(eq=False)
class References:
    """What the Base UNet's `attn1` layers attend to besides their own input.

    features: layer name -> (B, K, N, C), or (1, K, N, C) to serve all samples.
    kept: (B',) long, the samples that the features belong to, which then are (B', K, N, C); the others get plain
        self-attention. None: the features are of all samples.
    """

    features: Mapping[str, Tensor]
    kept: Tensor | None = None


def reference_self_attention(attn: Attention, f: Tensor, f_ref: Tensor, f_ref_key: Tensor | None = None) -> Tensor:
    """RSA(f, f_ref) = W_o softmax(q(f) [k(f); k(f_ref)]^T / sqrt(d)) [v(f); v(f_ref)], Eq. 3.

    The same W_q, W_k, W_v, W_o serve both parts. f: (B, N, C); f_ref: (B or 1, M, C) -> (B, N, C).
    f_ref_key: the input of W_k in place of f_ref.
    """
    k_ref = heads(attn, attn.to_k(f_ref if f_ref_key is None else f_ref_key))
    v_ref = heads(attn, attn.to_v(f_ref))
    q, k, v = (heads(attn, project(f)) for project in (attn.to_q, attn.to_k, attn.to_v))  # (B, H, N, d)
    k = torch.cat([k, k_ref.expand(len(k), -1, -1, -1)], dim=2)  # (B, H, N + M, d)
    v = torch.cat([v, v_ref.expand(len(v), -1, -1, -1)], dim=2)
    return output(attn, attend(q, k, v))


def pool_references(o: Tensor, o_i: Tensor, pooling: Pooling) -> Tensor:
    """Merge the outputs of K references, section 3.6 (not for `concat`, which has one output).

    o: (B, N, C), Eq. 5; o_i: (B, K, N, C), Eq. 6 -> (B, N, C).
    """
    if pooling == "mean":
        return o_i.mean(dim=1)
    difference = o_i - o[:, None]
    n = difference.float().norm(dim=-1, keepdim=True)  # (B, K, N, 1)
    if pooling == "softmax":
        p = n.softmax(dim=1)  # Eq. 7
    else:
        p = F.one_hot(n.squeeze(-1).argmax(dim=1), o_i.shape[1]).movedim(-1, 1)[..., None]
    return o + (p * difference).sum(dim=1).to(o.dtype)  # Eq. 8


class ReferenceAttnProcessor(AttnProcessor2_0):
    """The Base UNet's `attn1`: RSA where references are given, diffusers' own self-attention where not."""

    def __init__(self, name: str, pooling: Pooling, key_scale: float) -> None:
        super().__init__()
        self.name, self.pooling, self.key_scale = name, pooling, key_scale

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        context: References | MergedReferences | None = None,
    ) -> Tensor:
        if context is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if self.name not in context.features:
            raise ValueError(f"the references hold no features for layer {self.name!r}")
        if isinstance(context, MergedReferences):
            return self.sample(attn, hidden_states, context)
        f, f_ref = hidden_states, context.features[self.name].to(hidden_states.dtype)
        if len(f_ref) not in ((1, len(f)) if context.kept is None else (len(context.kept),)):
            raise ValueError(f"{self.name}: references of {len(f_ref)} samples for a batch of {len(f)}")

        f_ref_key = f_ref * self.key_scale if self.key_scale != 1 else f_ref
        if context.kept is not None:
            # RSA(f, f) = SA(f): doubling all keys changes no softmax average. A dropped sample takes f for f_ref.
            own = f[:, None].expand(-1, f_ref.shape[1], -1, -1)
            scaled = f_ref_key is not f_ref
            f_ref = own.index_copy(0, context.kept, f_ref)
            f_ref_key = own.index_copy(0, context.kept, f_ref_key) if scaled else f_ref

        if self.pooling == "concat":
            return reference_self_attention(attn, f, f_ref.flatten(1, 2), f_ref_key.flatten(1, 2))
        o_i = [
            reference_self_attention(attn, f, r, r_key)
            for r, r_key in zip(f_ref.unbind(1), f_ref_key.unbind(1), strict=True)
        ]
        if len(o_i) == 1:
            return o_i[0]
        return pool_references(self_attention(attn, f), torch.stack(o_i, dim=1), self.pooling)

    def sample(self, attn: Attention, f: Tensor, context: MergedReferences) -> Tensor:
        """The same in sampling; keys and values are projected at the first use."""
        if self.name not in context.projected:
            context.projected[self.name] = self.project(attn, context.features[self.name])
        pooling = self.pooling if context.pooling is None else context.pooling

        def pool(o: Tensor, o_i: Tensor) -> Tensor:
            return pool_references(o, o_i, pooling)

        return merged_self_attention(attn, f, context, self.name, pool, concatenated=pooling == "concat",
                                     needs_own=pooling != "mean")  # fmt: skip

    def project(self, attn: Attention, f_ref: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (P, K, H, M, d) of reference features (P, K, M, C)."""
        f_ref = f_ref.to(attn.to_k.weight.dtype)
        f_ref_key = f_ref * self.key_scale if self.key_scale != 1 else f_ref
        k, v = attn.to_k(f_ref_key), attn.to_v(f_ref)
        k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(2, 3) for x in (k, v))
        return k, v


def install_reference_attention(unet: UNet2DConditionModel, *, pooling: Pooling, key_scale: float) -> None:
    """Make the `attn1` of the Base UNet RSA layers."""
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling {pooling!r} is none of {get_args(Pooling)}")
    install(unet, {name: ReferenceAttnProcessor(name, pooling, key_scale) for name in self_attention_layers(unet)})
