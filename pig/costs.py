"""What work costs: floating-point operations, memory, and the machine that it is measured on."""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

# torch 2.11's counter passes over the attention of CPUs.
aten = torch.ops.aten
for cpus, gpus in (
    (aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention),
    (aten._scaled_dot_product_flash_attention_for_cpu_backward, aten._scaled_dot_product_flash_attention_backward),
):
    flop_registry.setdefault(cpus, flop_registry[gpus])

# The UNet of Stable Diffusion 2.1-base, for 512 px.
SD21 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
# Its VAE.
SD21_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def flops_of(work: Callable[[], Any]) -> int:
    """Of all matrix products, convolutions and attention that `work` does."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_memory() -> int:
    """The most bytes that this process has held: of the GPU's memory if there is one, else of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory() -> None:
    """Begin anew, on a GPU. A process cannot lower the peak that the system has noted of it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def machine() -> str:
    """The name of the GPU or else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
