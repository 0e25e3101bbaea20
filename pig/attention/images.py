"""A second cross-attention, for image tokens (IP-Adapter, arXiv 2308.06721, Eq. 5), by diffusers' own processors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import Tensor, nn


class ImageAttnProcessor(IPAdapterAttnProcessor2_0):
    """diffusers' own, which without images (text alone, no tuple) is the plain attention."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Any = None, **more: Any
    ) -> Tensor:
        if isinstance(encoder_hidden_states, Tensor):
            encoder_hidden_states = (encoder_hidden_states, [])
        return super().__call__(attn, hidden_states, encoder_hidden_states, **more)


def cross_attention_layers(unet: UNet2DConditionModel) -> list[str]:
    """Names of all `attn2`, in the order that IP-Adapter's format counts them in: down, up, mid."""
    return [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]


def install_image_attention(
    unet: UNet2DConditionModel, pairs: Iterable[tuple[nn.Linear, nn.Linear]], tokens: int
) -> list[ImageAttnProcessor]:
    """Let all `attn2` attend to image tokens, by these projections to keys and values, in the order of
    `cross_attention_layers`.

    The processors stand beside the module system: the UNet saves and loads as if they were not there.
    """
    processors = []
    for name, (to_k, to_v) in zip(cross_attention_layers(unet), pairs, strict=True):
        with torch.device("meta"):
            processor = ImageAttnProcessor(to_k.out_features, to_k.in_features, num_tokens=(tokens,))
        processor.to_k_ip, processor.to_v_ip = nn.ModuleList([to_k]), nn.ModuleList([to_v])
        object.__setattr__(unet.get_submodule(name), "processor", processor)
        processors.append(processor)
    return processors
