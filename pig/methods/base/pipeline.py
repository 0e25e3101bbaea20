"""The base model alone, drawing by text: what a benchmark's scores are measured from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pig.models.backbone import Backbone
from pig.sampling.call import Call, Condition
from pig.sampling.guidance import classifier_free
from pig.sampling.pipeline import SubjectPipeline
from pig.sampling.settings import SamplingSettings


class BasePipeline(SubjectPipeline):
    """Stable Diffusion with classifier-free guidance; references are not looked at.

    Args:
        base: the base model's name. settings: the model's own defaults, over those of `SamplingSettings`.
    """

    method = "base"
    reads_references = False
    without_references: ClassVar = {}
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
        text, weights = self.encode_prompts(call, settings), classifier_free(settings.text_guidance)
        return Condition(text, weights, len(call.scheduler.timesteps))

    def branches(
        self,
        latents: Tensor,
        t: Tensor,
        step: int,
        names: Sequence[str],
        condition: Condition,
        settings: SamplingSettings,
    ) -> Tensor:
        return self.unet(*self.stacked(latents, t, names, condition)).sample
