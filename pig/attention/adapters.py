"""Layers between `attn1` and `attn2` that attend to references.

`ReferenceAdapter` (EZIGen, arXiv 2409.08091, Eq. 4):

    c = LayerNorm(h);  K = [c ; s f_1 ; ... ; s f_k];  a = W_o softmax(q(c) k(K)^T / sqrt(C / heads)) v(K);  h' = h + a

h: what comes out of `attn1` with its residual, (B, N, C); f_j: the same block's `attn1` input for reference j; s: a
learnt scalar. `GatedAdapter` (InstantBooth, arXiv 2304.03411, Eq. 3):

    y' = y + beta tanh(gamma) S([y, f_p])

y: as h; f_p: tokens of the references, (B, M, C); S: self-attention, of which the first N tokens are kept; gamma: a
learnt scalar, 0 at the start.

A layer stands in diffusers' own slot for such a one, the block's `fuser` (GLIGEN's), and is handed its context through
the slot's argument, so a call without one is the plain UNet, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, cat, nn, ones, zeros

from pig.attention.merged import MergedReferences, merged_self_attention
from pig.attention.reference import References, reference_self_attention


@dataclass(eq=False)
class ScaledReferences(MergedReferences):
    """`MergedReferences` for adapters, whose output is taken `adapter_scale` times. The plain samples at the head of
    the batch pass the adapters by."""

    adapter_scale: float = 1.0


class ReferenceAdapter(nn.Module):
    """The layer of one block. It starts as the block's `attn1`: norm1, q, k, v and out copied, s = 1.

    double_residual: h' = h + a + c, as the authors' release has it.
    """

    def __init__(self, name: str, width: int, heads: int, double_residual: bool) -> None:
        super().__init__()
        self.name, self.heads, self.double_residual = name, heads, double_residual
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
        self.scale = nn.Parameter(ones(()))

    def start_as(self, block: Any) -> None:
        """Copy the weights of a transformer block's `attn1` and of the norm before it."""
        self.norm.load_state_dict(block.norm1.state_dict())
        for name in ("to_q", "to_k", "to_v", "to_out"):
            getattr(self, name).load_state_dict(getattr(block.attn1, name).state_dict())

    def forward(self, h: Tensor, context: References | ScaledReferences) -> Tensor:
        """h: (B, N, C) -> (B, N, C)."""
        if self.name not in context.features:
            raise ValueError(f"the references hold no features for block {self.name!r}")
        if isinstance(context, ScaledReferences):
            plain, own = h[: context.plain], h[context.plain :]
            c = self.norm(own)
            changed = own + context.adapter_scale * self._residual(self.sample(c, context), c)
            return cat([plain, changed]) if context.plain else changed
        c = self.norm(h)
        f_ref = context.features[self.name].to(c.dtype) * self.scale  # (B or B', K, N, C)
        if context.kept is not None:
            # As in `reference`: a dropped sample attends to itself twice, which is to itself once.
            own = c[:, None].expand(-1, f_ref.shape[1], -1, -1)
            f_ref = own.index_copy(0, context.kept, f_ref.to(own.dtype))
        return h + self._residual(reference_self_attention(self, c, f_ref.flatten(1, 2)), c)

    def _residual(self, a: Tensor, c: Tensor) -> Tensor:
        return (a + c if self.double_residual else a).to(c.dtype)

    def sample(self, c: Tensor, context: ScaledReferences) -> Tensor:
        """The attention alone, merged by log sums; keys and values of the references are projected at the first use."""
        if self.name not in context.projected:
            f_ref = context.features[self.name].to(self.to_k.weight.dtype) * self.scale
            k, v = (layer(f_ref).unflatten(-1, (self.heads, -1)).transpose(2, 3) for layer in (self.to_k, self.to_v))
            context.projected[self.name] = (k, v)  # (P, K, H, M, d)
        alone = replace(context, plain=0)
        return merged_self_attention(
            self,
            c,
            alone,
            self.name,
            lambda o, o_i: o_i[:, 0],
            concatenated=True,
            needs_own=False,
        )


@dataclass(eq=False)
class PatchTokens:
    """What gated adapters attend to.

    tokens: width of a block -> f_p, (P, M, C); each of the P groups serves equally many samples. beta: of the adapters.
    plain: so many samples at the head of the batch pass the adapters by.
    """

    tokens: Mapping[int, Tensor]
    beta: float = 1.0
    plain: int = 0


class GatedAdapter(nn.Module):
    """The layer of one block. It starts as no layer at all, gamma = 0."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
        self.gamma = nn.Parameter(zeros(()))

    def forward(self, y: Tensor, context: PatchTokens) -> Tensor:
        """y: (B, N, C) -> (B, N, C)."""
        plain, own = y[: context.plain], y[context.plain :]
        f_p = context.tokens[self.width]
        f_p = f_p.repeat_interleave(len(own) // len(f_p), dim=0).to(own.dtype)
        changed = own + (context.beta * self.gamma.tanh() * reference_self_attention(self, own, f_p)).to(own.dtype)
        return cat([plain, changed]) if context.plain else changed


class AdaptersByBlock(nn.ModuleDict):
    """Adapters by the names of their blocks, whose dots a ModuleDict does not take."""

    def __init__(self, adapters: Mapping[str, nn.Module]) -> None:
        super().__init__({name.replace(".", "/"): one for name, one in adapters.items()})

    def by_block(self) -> dict[str, Any]:
        return {name.replace("/", "."): one for name, one in self.items()}


def install_adapters(unet: UNet2DConditionModel, adapters: Mapping[str, nn.Module]) -> None:
    """Put each adapter into its block, beside the module system: the UNet saves and loads as if it were not there.

    (Registered there, they would be saved with the UNet, and dropped when it is loaded.)
    """
    for name, adapter in adapters.items():
        object.__setattr__(unet.get_submodule(name), "fuser", adapter)
    object.__setattr__(unet, "position_net", _pass_through)


def adapter_arguments(context: References | ScaledReferences | PatchTokens | None) -> dict[str, Any] | None:
    """`cross_attention_kwargs` of a UNet whose adapters are to see this context; None: they are passed by."""
    return None if context is None else {"gligen": {"context": context}}


def _pass_through(context: Any) -> Any:
    return context
