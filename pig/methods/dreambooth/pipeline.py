"""Generate images with a model that DreamBooth has tuned (arXiv 2208.12242)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pig.methods.dreambooth.network import DreamBoothNet
from pig.models.identifier import identifier_token, with_identifier
from pig.models.lora import LORA_FILE, Lora, name_in_file, save_lora, without_lora
from pig.sampling.settings import SamplingSettings, control
from pig.sampling.text import TextPipeline


@dataclass(frozen=True)
class DreamBoothSettings(SamplingSettings):
    """DreamBooth's controls."""

    identifier: str = control("sks")
    """The word that stands for the subject before its class noun, as in training. A prompt may hold it."""


class DreamBoothPipeline(TextPipeline):
    """Prompts about one subject in, images of that subject out.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: of the base model, partly tuned.
        lora: see `Lora`; None: the whole UNet is tuned.
        tuned_text_encoder: whether the text encoder is tuned, too.
        base: the base model's name. settings: the model's own defaults, over those of `DreamBoothSettings`.
        network: what is tuned, where there is such already.
    """

    method = "dreambooth"
    Settings = DreamBoothSettings
    network: DreamBoothNet

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        lora: dict[str, Any] | None = None,
        tuned_text_encoder: bool = False,
        base: str | None = None,
        settings: dict[str, Any] | None = None,
        network: DreamBoothNet | None = None,
    ) -> None:
        own = Lora(**lora) if lora else None
        network = network or DreamBoothNet(unet, own, text_encoder if tuned_text_encoder else None)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, base, settings, network)
        self.register_to_config(lora=lora, tuned_text_encoder=tuned_text_encoder)
        self.kept_apart = own is not None
        if own is not None:
            self.delta_file = LORA_FILE

    def model_options(self) -> dict[str, Any]:
        return {name: self.config[name] for name in ("lora", "tuned_text_encoder")}

    def base_parts(self) -> AbstractContextManager[None]:
        return without_lora(self.unet)  # nothing, where there is none

    def name_in_delta(self, name: str) -> str:
        return name_in_file(name) if self.network.lora else super().name_in_delta(name)

    def write_delta(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        if self.network.lora is None:
            super().write_delta(folder, tensors)
        else:
            save_lora(folder, tensors, self.unet)

    def text_of(self, prompt: str, noun: str, settings: DreamBoothSettings) -> str:
        identifier_token(self.tokenizer, settings.identifier)
        return with_identifier(prompt, noun, settings.identifier)

    @classmethod
    def check_prompt(cls, prompt: str, noun: str, settings: DreamBoothSettings) -> None:
        with_identifier(prompt, noun, settings.identifier)
