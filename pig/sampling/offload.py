"""A base class of all pipelines: what diffusers does with any pipeline's networks: offloading, compiling, LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import nn

from pig.models.compiled import compile_blocks
from pig.sampling.storing import StoredPipeline


class OffloadingPipeline(StableDiffusionLoraLoaderMixin, StoredPipeline):
    """diffusers' offloading: `enable_model_cpu_offload` (text encoder, denoiser, VAE in turn; what else there is, such
    as a Reference UNet, apart, as a ControlNet is) and `enable_group_offload`.

    A part whose layers are called one by one, by another network, would never be fetched: it is named in `resident`,
    and stays on the device. CUDA is untried.

    And diffusers' LoRAs: `load_lora_weights` puts a style of the base model on the network that draws.
    """

    denoiser: ClassVar[str] = "unet"  # the component that draws
    resident: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.model_cpu_offload_seq = f"text_encoder->{cls.denoiser}->vae"
        cls._exclude_from_cpu_offload = list(cls.resident)

    def enable_group_offload(
        self, onload_device: torch.device, *, offload_to_disk_path: str | None = None, **kwargs: Any
    ) -> None:
        """As diffusers', with a folder of its own for each part: two UNets would overwrite each other's files."""
        parts = [name for name, one in self.components.items() if isinstance(one, nn.Module)]
        left_out = kwargs.pop("exclude_modules", None) or []
        left_out = {*([left_out] if isinstance(left_out, str) else left_out), *self.resident}
        told = {"offload_device": torch.device("cpu"), "offload_type": "block_level", **kwargs}
        for name in parts:
            part = getattr(self, name)
            if name in left_out:
                part.to(onload_device)
                continue
            if offload_to_disk_path is not None:
                told["offload_to_disk_path"] = str(Path(offload_to_disk_path) / name)
            if hasattr(part, "enable_group_offload"):
                part.enable_group_offload(onload_device, **told)
            else:
                apply_group_offloading(part, onload_device, **told)

    def compile_repeated_blocks(self) -> None:
        """`torch.compile` of the networks' blocks, but for those in which a reading pass ends."""
        compile_blocks(self.network, leave_out=getattr(self.network, "interrupted_blocks", list)())

    @property
    def is_offloaded(self) -> bool:
        parts = [one for one in self.components.values() if isinstance(one, nn.Module)]
        return any(hasattr(one, "_hf_hook") or _is_group_offload_enabled(one) for one in parts)
