"""`torch.compile` of a network's repeated blocks, each for itself, which takes minutes less than all at once."""

from __future__ import annotations

from collections.abc import Collection

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


def compile_blocks(network: nn.Module, *, leave_out: Collection[nn.Module] = ()) -> None:
    """Compile the transformer and residual blocks. Sizes stay symbolic, as batches may vary with what is dropped.

    leave_out: blocks that an exception leaves, as where a reading pass ends.
    """
    # Dynamo counts per function: all layers share one, and batches of 0 and of 1 samples compile it once more.
    torch._dynamo.config.recompile_limit = 128
    for module in network.modules():
        if isinstance(module, ResnetBlock2D | BasicTransformerBlock) and module not in leave_out:
            module.compile(dynamic=True)
