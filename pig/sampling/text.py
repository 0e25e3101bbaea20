"""Drawing by text alone: what the base model and the models tuned on one subject do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from pig.models.backbone import Backbone
from pig.sampling.call import Call, Condition
from pig.sampling.guidance import classifier_free
from pig.sampling.pipeline import SubjectPipeline


class TextPipeline(SubjectPipeline):
    """Stable Diffusion with classifier-free guidance; references are not looked at.

    Args:
        base: the base model's name. settings: the model's own defaults, over those of `Settings`.
        network: what is trained of it, where there is such already.
    """

    method = "base"
    reads_references = False

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        base: str | None = None,
        settings: dict[str, Any] | None = None,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
        self.register(base=base, settings=settings, parts=parts)
        self.network = network or unet

    @classmethod
    def from_backbone(cls, backbone: Backbone, *, base: str, settings: Mapping[str, Any], **options: Any) -> Self:
        return cls(**vars(backbone), base=base, settings=dict(settings), **options)

    def condition(self, call: Call, settings: Any) -> Any:
        nouns = zip(call.prompts, call.class_nouns, strict=True)
        text = self.encode_text([self.text_of(prompt, noun, settings) for prompt, noun in nouns])
        return Condition(
            text=self.text_of_branches(text, call, settings),
            weights=classifier_free(settings.text_guidance),
            steps=len(call.scheduler.timesteps),
        )

    def branches(
        self,
        latents: Tensor,
        t: Tensor,
        step: int,
        names: Sequence[str],
        condition: Any,
        settings: Any,
    ) -> Tensor:
        return self.unet(*self.stacked(latents, t, names, condition)).sample
