"""Which processor serves which attention layer of a UNet."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention

from pig.attention.products import TextAttnProcessor


def self_attention_layers(unet: UNet2DConditionModel) -> list[str]:
    """Names of all `attn1`, in the order of the forward pass: down, mid, up."""
    rank = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    names = [name for name, module in unet.named_modules() if isinstance(module, Attention) and name.endswith(".attn1")]
    return sorted(names, key=lambda name: rank[name.split(".")[0]])


def transformer_blocks(unet: UNet2DConditionModel) -> dict[str, BasicTransformerBlock]:
    """All of them by name, in the order of the forward pass."""
    names = [name.removesuffix(".attn1") for name in self_attention_layers(unet)]
    return {name: unet.get_submodule(name) for name in names}


def install(unet: UNet2DConditionModel, processors: Mapping[str, object]) -> None:
    """Give each named layer its processor, every other one (all `attn2`) plain attention that ignores the context."""
    unet.set_attn_processor(
        {key: processors.get(key.removesuffix(".processor"), TextAttnProcessor()) for key in unet.attn_processors}
    )
