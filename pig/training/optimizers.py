"""AdamW in its three forms, and the layout of the weights that it moves."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from pig.errors import InputError

Schedule = Literal["constant", "cosine"]
OptimizerName = Literal["adamw", "adamw_8bit", "adamw_sharded"]


def adamw(name: OptimizerName, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW as in appendix B of BootPIG: `adamw` (fused), `adamw_8bit` (bitsandbytes: a quarter of its memory), or
    `adamw_sharded` (torch's ZeroRedundancyOptimizer: each process keeps and updates its share of the state)."""
    settings: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}
    if name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise InputError("model.optimizer=adamw_8bit needs bitsandbytes: pip install 'pig[8bit]'") from error
        return AdamW8bit(groups, **settings)
    optimizer: torch.optim.Optimizer
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    elif torch.distributed.is_initialized():
        optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings, fused=True)
    else:
        raise InputError("model.optimizer=adamw_sharded is for several processes: set trainer.strategy to ddp")
    optimizer.register_load_state_dict_post_hook(_settle)
    return optimizer


def _settle(optimizer: torch.optim.Optimizer) -> None:
    """Fused kernels want a loaded state as they would have made it: the step count on the parameter's device (the
    sharded optimizer loads it onto the CPU), the moments laid out like the parameter, whatever it was in the run that
    saved them."""
    for parameter, state in getattr(optimizer, "optim", optimizer).state.items():
        for name, value in state.items():
            like = parameter if value.shape == parameter.shape else value
            state[name] = torch.empty_like(like, dtype=value.dtype, device=parameter.device).copy_(value)


def lay_out(module: nn.Module, precision: str, device: torch.device) -> None:
    """Arrange the weights for training on `device`; what is computed stays the same.

    Under bf16-mixed, the frozen weights of products are kept in bf16, as autocast would round them at each use (norms
    stay float32). Convolutions want channels_last, but in bf16 on CPUs, which are slower with it.
    """
    if precision == "bf16-mixed":
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                for parameter in layer.parameters(recurse=False):
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.bfloat16()
    if device.type == "cuda" or precision == "32-true":
        module.to(memory_format=torch.channels_last)
