"""DeepCache (arXiv 2312.00858): between neighbouring steps a UNet's deep features hardly change, so keep them.

A full pass notes what enters the last up block. A shallow pass runs only the first down block and the last up block
around that. The parts are diffusers' own, called in the order of `UNet2DConditionModel.forward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor


def full_pass(
    unet: UNet2DConditionModel, latents: Tensor, timesteps: Tensor, text: Tensor, arguments: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor]:
    """The UNet's prediction (B, 4, h, w), and its deep features for `shallow_pass`.

    arguments: `cross_attention_kwargs`.
    """
    kept: list[Tensor] = []
    hook = unet.up_blocks[-1].register_forward_pre_hook(
        lambda block, args, kwargs: kept.append(kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        predicted = unet(latents, timesteps, text, cross_attention_kwargs=arguments).sample
    finally:
        hook.remove()
    return predicted, kept[0]


def shallow_pass(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timesteps: Tensor,
    text: Tensor,
    arguments: Mapping[str, Any] | None,
    deep: Tensor,
) -> Tensor:
    """The prediction (B, 4, h, w) with another step's deep features of the same batch."""
    first, last = unet.down_blocks[0], unet.up_blocks[-1]
    told = {"encoder_hidden_states": text, "cross_attention_kwargs": arguments}
    emb = unet.time_embedding(unet.time_proj(timesteps).to(latents.dtype))
    x = unet.conv_in(latents)
    _, skips = first(x, emb, **(told if first.has_cross_attention else {}))
    skips = (x, *skips)[: len(last.resnets)]
    x = last(deep, skips, emb, **(told if last.has_cross_attention else {}))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
