"""LoRA (arXiv 2106.09685) in a UNet, by PEFT as diffusers uses it, and its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from pig.errors import InputError, check_ranges
from pig.files import replacing
from pig.models.weights import random_but_the_same

LORA_FILE = "pytorch_lora_weights.safetensors"  # as `load_lora_weights` looks for it
ADAPTER = "default"


@dataclass
class Lora:
    """The weights W of linear layers become W + (alpha / rank) B A; only A and B are trained.

    Attributes:
        rank: of A and B.
        alpha: scale of the product B A.
        targets: how the layers' names end; by default all projections of self- and cross-attention.
    """

    rank: int = 4
    alpha: float = 4.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])

    def __post_init__(self) -> None:
        check_ranges(**{"lora.rank": (self.rank, 1, 4096), "lora.alpha": (self.alpha, 1e-6, 1e6)})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def add_lora(unet: UNet2DConditionModel, lora: Lora) -> None:
    """Add a LoRA to the UNet. A starts at random (the same in every run), B at 0, so the output is the same at first.

    Raises:
        InputError: the UNet has no layer of such a name.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number does
        init_lora_weights="gaussian",
        target_modules=list(lora.targets),
    )
    try:
        with random_but_the_same():
            unet.add_adapter(config, ADAPTER)
    except ValueError as error:
        raise InputError(f"lora.targets {lora.targets}: {str(error).splitlines()[0]}") from error


def lora_parameters(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """A and B of all layers, by their names in the UNet."""
    return {name: one for name, one in unet.named_parameters() if ".lora_" in name}


def name_in_file(name: str) -> str:
    """A parameter's name as LoRA files have it, without `.default`; any prefix stays."""
    return name.replace(f".{ADAPTER}.", ".")


@contextmanager
def without_lora(unet: UNet2DConditionModel) -> Iterator[None]:
    """Inside, the UNet is what it was before `add_lora`: its layers, and their names."""
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in layers.items():
        unet.set_submodule(name, layer.get_base_layer())
    try:
        yield
    finally:
        for name, layer in layers.items():
            unet.set_submodule(name, layer)


def save_lora(folder: Path, tensors: Mapping[str, Tensor], unet: UNet2DConditionModel) -> None:
    """As `StableDiffusionPipeline.load_lora_weights` reads it, with rank and alpha in its header: without them, an
    alpha other than the rank would be lost.

    tensors: their keys are `unet.` and the `name_in_file`.
    """
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers={name.removeprefix("unet."): one for name, one in tensors.items()},
        unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
    )


def save_kohya(file: Path, tensors: Mapping[str, Tensor], lora: Lora) -> None:
    """The same in the keys of kohya's scripts, which ComfyUI and AUTOMATIC1111 read.

    diffusers' converter writes the rank in the place of alpha; here it is alpha's own.
    """
    found = {name: one.contiguous() for name, one in convert_state_dict_to_kohya(dict(tensors)).items()}
    found |= {name: torch.tensor(float(lora.alpha)) for name in found if name.endswith(".alpha")}
    told = {"ss_network_module": "networks.lora", "ss_network_dim": f"{lora.rank}", "ss_network_alpha": f"{lora.alpha}"}
    with replacing(file) as aside:
        save_file(found, aside, metadata=told)
