"""Which word each position of a picture looks at: the probabilities of all `attn2`, recorded while a UNet runs.

A hook before the layer computes them from the layer's input. So any method's processors may serve it, diffusers' for
IP-Adapter included, and what the UNet returns stays the same to the bit. Gradients flow through to the latents.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from pig.attention.images import cross_attention_layers
from pig.attention.products import heads

Maps = dict[str, Tensor]  # layer -> (B, H, N, L): over L words, for each of N positions, H heads, B samples


@contextmanager
def recording(unet: UNet2DConditionModel, last: int, layers: Collection[str] | None = None) -> Iterator[Maps]:
    """Inside, each pass of the UNet writes its maps.

    Args:
        last: so many samples at the end of the batch are recorded: those of the branch with the prompt.
        layers: some of `cross_attention_layers`; all by default.
    """
    maps: Maps = {}
    wanted = cross_attention_layers(unet) if layers is None else layers
    hooks = [
        unet.get_submodule(name).register_forward_pre_hook(partial(_record, maps, name, last), with_kwargs=True)
        for name in wanted
    ]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def _record(maps: Maps, name: str, last: int, attn: Attention, args: Any, kwargs: Mapping[str, Any]) -> None:
    text = kwargs["encoder_hidden_states"]
    text = text[0] if isinstance(text, tuple) else text  # beside an IP-Adapter's image tokens
    q, k = heads(attn, attn.to_q(args[0][-last:])), heads(attn, attn.to_k(text[-last:]))
    maps[name] = torch.softmax((q * attn.scale) @ k.transpose(-1, -2), dim=-1)


def distance(maps: Mapping[str, Tensor], others: Mapping[str, Tensor], words: Tensor, *, mean: bool = False) -> Tensor:
    """Of each sample, (B,): the squared differences of all maps, summed over layers, positions and words, the mean over
    heads.

    words: (B, L) bool, those that count. mean: over positions, too, so that fine layers count no more than coarse ones.
    """
    parts = []
    for name, one in maps.items():
        dtype = torch.promote_types(one.dtype, torch.float32)
        squared = (one.to(dtype) - others[name].to(one.device, dtype)).square() * words[:, None, None]
        parts.append((squared.mean((1, 2)) if mean else squared.mean(1).sum(1)).sum(1))
    return torch.stack(parts).sum(0)


def word_maps(maps: Mapping[str, Tensor], side: int) -> Tensor:
    """(B, L, side, side): the mean over layers and heads, all brought to one size; for looking at."""
    found = []
    for one in maps.values():
        own = int(one.shape[2] ** 0.5)  # of a square picture
        grid = one.float().mean(1).transpose(1, 2).unflatten(2, (own, own))
        found.append(F.interpolate(grid, (side, side), mode="bilinear"))
    return torch.stack(found).mean(0)


def layers_of(unet: UNet2DConditionModel, *, coarse: bool) -> list[str]:
    """All `cross_attention_layers`; coarse: without those of the finest level."""
    finest = ("down_blocks.0.", f"up_blocks.{len(unet.up_blocks) - 1}.")
    return [name for name in cross_attention_layers(unet) if not (coarse and name.startswith(finest))]


def maps_bytes(unet: UNet2DConditionModel, layers: Collection[str], size: tuple[int, ...], length: int) -> int:
    """What the maps of one picture and one step take in half precision. size: of the latents. length: of the text."""
    last, total = len(unet.up_blocks) - 1, 0
    for name in layers:
        place, number = name.split(".")[0], name.split(".")[1]
        level = {"down_blocks": lambda n: n, "up_blocks": lambda n: last - n, "mid_block": lambda n: last}[place]
        depth = level(int(number)) if number.isdigit() else last
        positions = -(-size[0] // 2**depth) * -(-size[1] // 2**depth)
        total += unet.get_submodule(name).heads * positions * length * 2
    return total
