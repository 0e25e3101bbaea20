"""Reference Self-Attention in sampling, with no product done twice: attention to each set of keys, merged by log sums.

Equal to `reference` but for rounding, at (1 + K) N^2 in place of (1 + 2 K) N^2. Not for training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from pig.attention.products import heads, output


@dataclass(eq=False)
class MergedReferences:
    """The context of a sampling step: references for a batch of branches of the same latents at the same t.

    features: layer name -> (P, K, N, C); each of the P groups serves equally many samples.
    plain, branches: `plain` samples at the head of the batch attend to no reference; then (branches, P, images).
    first_layer: its input is the same in all branches (text enters behind it), so it is computed once for all.
    pooling: how the references are merged; None: as the layer was installed.
    strength: 0, as without references, to 1, Eq. 3 and 8.
    projected: layer name -> keys and values (P, K, H, M, d), noted by the layers at their first use.
    """

    features: Mapping[str, Tensor]
    plain: int = 0
    branches: int = 1
    first_layer: str | None = None
    pooling: Any = None
    strength: float = 1.0
    projected: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v and log sum exp(q k^T / sqrt(d)): (B, H, N, d) and (B, H, N). Not for training."""
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (0, 0)
    kernel = lse_kernel(q.device.type, q.dtype, capability)
    if kernel == "cpu":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif kernel == "flash":
        o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    elif kernel == "efficient":
        o, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        return plain_with_lse(q, k, v)
    return o, lse[..., : q.shape[2]]  # some kernels pad it


def lse_kernel(
    device: str, dtype: torch.dtype, capability: tuple[int, int]
) -> Literal["cpu", "flash", "efficient", "plain"]:
    """Which attention gives its log sums too: flash attention asks for half precision and Ampere (8.0), the
    memory-efficient one for CUDA (bfloat16: Ampere); elsewhere (MPS, ...) plain products."""
    if device in ("cpu", "meta"):
        return "cpu"
    if device != "cuda":
        return "plain"
    ampere = capability >= (8, 0)
    if dtype in (torch.float16, torch.bfloat16) and ampere:
        return "flash"
    return "plain" if dtype is torch.bfloat16 else "efficient"


def plain_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same by plain products, the sums in float32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    lse = scores.float().logsumexp(-1)
    return (scores.float() - lse[..., None]).exp().to(v.dtype) @ v, lse


def merge(o: Tensor, lse: Tensor, o_ref: Tensor, lse_ref: Tensor) -> Tensor:
    """Attention to two sets of keys from the attention to each: a convex combination, weighted by their sums of exp."""
    return o.lerp(o_ref, (lse_ref - lse).sigmoid()[..., None].to(o.dtype))


def merged_self_attention(
    attn: Attention,
    f: Tensor,
    context: MergedReferences,
    name: str,
    pool: Callable[[Tensor, Tensor], Tensor],
    *,
    concatenated: bool,
    needs_own: bool,
) -> Tensor:
    """RSA of a batch of branches, (B, N, C) -> (B, N, C).

    Args:
        name: of the layer.
        pool: the outputs for each of several references, (B, K, N, C), and without any, (B, N, C), into one.
        concatenated: all references are one set of keys; nothing is pooled.
        needs_own: `pool` looks at the output without references.
    """
    keys, values = context.projected[name]  # (P, K, H, M, d)
    plain, branches = context.plain, context.branches
    alike = name == context.first_layer
    if alike:
        f, plain, branches = f[plain : plain + (len(f) - plain) // branches], 0, 1
    q, k, v = (heads(attn, project(f)) for project in (attn.to_q, attn.to_k, attn.to_v))  # (B, H, N, d)
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

    if concatenated:
        merged = [attend(*(x.transpose(1, 2).flatten(2, 3) for x in (keys, values)))]
    else:
        merged = [attend(k_i, v_i) for k_i, v_i in zip(keys.unbind(1), values.unbind(1), strict=True)]
    o_i = [output(attn, one) for one in merged]
    of_all = alike or (len(o_i) > 1 and needs_own) or context.strength < 1
    own = output(attn, o if of_all else o[:plain])  # SA(f), Eq. 2
    out = o_i[0] if len(o_i) == 1 else pool(own[plain:], torch.stack(o_i, dim=1))
    if context.strength < 1:
        out = own[plain:].lerp(out, context.strength)
    if alike:
        return torch.cat([own[: context.plain], *[out] * context.branches])
    return torch.cat([own[:plain], out])
