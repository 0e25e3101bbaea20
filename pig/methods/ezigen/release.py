"""The authors' release (github.com/ZichengDuan/EZIGen): its checkpoint is the whole UNet with the adapters in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pig.attention.install import transformer_blocks
from pig.errors import InputError
from pig.methods.ezigen.network import EZIGenNet
from pig.methods.ezigen.pipeline import EZIGenPipeline
from pig.models.backbone import Backbone
from pig.models.weights import copy_weights

SCALES = "learnable_weights"  # (blocks,), in the order of the forward pass
PARTS = {".adapter_norm.": ".norm.", ".adapter.": "."}  # theirs -> ours
RTOL, ATOL = 1e-2, 1e-3  # half precision rounds weights by less
SETTINGS = {"max_loops": 9, "renoise_timestep": 400}  # where its sampling differs from the paper
REMEDY = "Name the base model that the release was trained on by --base"


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=RTOL, atol=ATOL)


def is_release(names: Collection[str]) -> bool:
    return SCALES in names


def from_release(weights: Mapping[str, Tensor], backbone: Backbone, base: str) -> EZIGenPipeline:
    """EZIGen on this base model, with the release's adapters and its second addition of LayerNorm(h).

    Args:
        weights: of the checkpoint's `model.safetensors`.

    Raises:
        InputError: a weight is missing or of another shape, or the UNet in the file is not the base model's.
    """
    net, blocks = EZIGenNet(backbone.unet, double_residual=True), list(transformer_blocks(backbone.unet))
    scales = weights[SCALES]
    if scales.shape != (len(blocks),):
        raise InputError(f"{SCALES} has shape {tuple(scales.shape)}, the base model {len(blocks)} blocks. {REMEDY}")
    adapters = {f"{block}.scale": scale for block, scale in zip(blocks, scales, strict=True)}
    for name, tensor in weights.items():
        for theirs, ours in PARTS.items():
            if theirs in name:
                adapters[name.replace(theirs, ours)] = tensor
    copy_weights(adapters, net.adapter_parameters(), "the release's adapters", REMEDY)
    for name, own in net.unet.named_parameters():
        given = weights.get(name)
        if given is None or given.shape != own.shape or not _alike(given, own):
            raise InputError(f"the release's {name} is missing, or not that of the base model. {REMEDY}")
    return EZIGenPipeline(**vars(backbone), adapters=net.adapters, base=base, settings=SETTINGS, network=net)
