"""The base model alone, drawing by text: what a benchmark's scores are measured from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pig.models.backbone import Backbone
from pig.sampling.guidance import branch_weights, combine, weights_at
from pig.sampling.pipeline import Call, SubjectPipeline
from pig.sampling.settings import SamplingSettings


@dataclass(frozen=True, eq=False)
class Condition:
    """text: branch -> (B, L, D); weights: of the branches; steps: how many."""

    text: Mapping[str, Tensor]
    weights: Mapping[str, float]
    steps: int


class BasePipeline(SubjectPipeline):
    """Stable Diffusion with classifier-free guidance; references are not looked at.

    Args:
        base: the base model's name. settings: the model's own defaults, over those of `SamplingSettings`.
    """

    method = "base"
    reads_references = False
    network: UNet2DConditionModel

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        base: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
        self.register(base=base, settings=settings, parts=parts)
        self.network = unet

    @classmethod
    def from_backbone(cls, backbone: Backbone, *, base: str, settings: Mapping[str, Any], **options: Any) -> Self:
        parts = (backbone.vae, backbone.text_encoder, backbone.tokenizer, backbone.unet, backbone.scheduler)
        return cls(*parts, base=base, settings=dict(settings), **options)

    def condition(self, call: Call, settings: SamplingSettings) -> Condition:
        text = self.encode_text(call.prompts).repeat_interleave(call.images_per_prompt, dim=0)
        empty = self.encode_text([settings.negative_prompt]).expand_as(text)
        weights = branch_weights(settings.text_guidance, settings.text_guidance)
        return Condition({"uncond": empty, "text_im": text}, weights, len(call.scheduler.timesteps))

    def predict(
        self, latents: Tensor, t: Tensor, step: int, condition: Condition, settings: SamplingSettings
    ) -> Tensor:
        weights = weights_at(condition.weights, step, condition.steps, settings)
        predicted = self.unet(
            latents.repeat(len(weights), 1, 1, 1),
            t.expand(len(weights) * len(latents)),
            torch.cat([condition.text[branch] for branch in weights]),
        ).sample
        return combine(dict(zip(weights, predicted.chunk(len(weights)), strict=True)), weights, settings)
