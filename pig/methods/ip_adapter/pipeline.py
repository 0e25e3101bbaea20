"""Generate images with IP-Adapter (arXiv 2308.06721)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from pig.methods.ip_adapter.network import ImagePrompt, IPAdapterNet
from pig.models.backbone import Backbone
from pig.models.vision import load_vision, look_at_references, vision_for
from pig.sampling.call import Call, Condition
from pig.sampling.guidance import classifier_free
from pig.sampling.pipeline import SubjectPipeline
from pig.sampling.settings import SamplingSettings, control

VISION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the released IP-Adapters' image encoder


@dataclass(frozen=True)
class IPAdapterSettings(SamplingSettings):
    """IP-Adapter's controls."""

    scale: float = control(1.0, 0, 2)
    """Of the attention to the references: 0 is the base model alone; with prompts that say more than the references, .5
    follows them better."""


@dataclass(eq=False)
class IPAdapterCondition(Condition):
    """embeds: branch -> (B, K, E), of each picture's references; zeros where they are left out."""

    embeds: Mapping[str, Tensor]


class IPAdapterPipeline(SubjectPipeline):
    """Prompt and reference images in, images of that subject out.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: of the base model, all frozen.
        image_encoder: a CLIP's image tower, frozen.
        prompt: trained; see `ImagePrompt`.
        vision, vision_digest: the image encoder's name, and the digest of its weights as loaded; see `load_vision`.
        base: the base model's name. settings: the model's own defaults, over those of `IPAdapterSettings`.
        network: UNet and image prompt together, where there are such already.
    """

    method = "ip_adapter"
    resident = ("prompt",)
    Settings = IPAdapterSettings
    without_references: ClassVar = {"scale": 0.0}
    delta_file = "ip-adapter.safetensors"
    network: IPAdapterNet

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        image_encoder: CLIPVisionModelWithProjection,
        prompt: ImagePrompt,
        scheduler: SchedulerMixin,
        vision: str | None = None,
        vision_digest: str | None = None,
        base: str | None = None,
        settings: dict[str, Any] | None = None,
        network: IPAdapterNet | None = None,
    ) -> None:
        super().__init__()
        self.register(
            base=base,
            settings=settings,
            parts={
                "vae": vae,
                "text_encoder": text_encoder,
                "tokenizer": tokenizer,
                "unet": unet,
                "image_encoder": image_encoder,
                "prompt": prompt,
                "scheduler": scheduler,
            },
        )
        self.register_to_config(vision=vision, vision_digest=vision_digest)
        self.network = network or IPAdapterNet(unet, prompt)

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        *,
        base: str,
        settings: Mapping[str, Any],
        vision: str | None = None,
        vision_digest: str | None = None,
        **options: Any,
    ) -> Self:
        vision = vision_for(base, vision, VISION)
        image_encoder, vision_digest = load_vision(vision, vision_digest)
        return cls(
            **vars(backbone),
            image_encoder=image_encoder,
            prompt=ImagePrompt.of(backbone.unet, image_encoder.config.projection_dim),
            vision=vision,
            vision_digest=vision_digest,
            base=base,
            settings=dict(settings),
            **options,
        )

    def model_options(self) -> dict[str, Any]:
        return {name: self.config[name] for name in ("vision", "vision_digest")}

    def name_in_delta(self, name: str) -> str:
        return name.removeprefix("prompt.")

    def write_delta(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """As `StableDiffusionPipeline.load_ip_adapter` reads it, with the image encoder where it looks for it."""
        super().write_delta(folder, tensors)
        self.image_encoder.save_pretrained(folder / "image_encoder")

    def condition(self, call: Call, settings: IPAdapterSettings) -> IPAdapterCondition:
        embeds, _ = look_at_references(self.image_encoder, call.references)
        embeds = embeds.repeat_interleave(call.images_per_prompt, dim=0)
        nothing = torch.zeros_like(embeds)
        return IPAdapterCondition(
            text=self.encode_prompts(call, settings),
            weights=classifier_free(settings.text_guidance),
            steps=len(call.scheduler.timesteps),
            embeds={"uncond": nothing, "text_im": embeds},
        )

    def branches(
        self,
        latents: Tensor,
        t: Tensor,
        step: int,
        names: Sequence[str],
        condition: IPAdapterCondition,
        settings: IPAdapterSettings,
    ) -> Tensor:
        embeds = torch.cat([condition.embeds[name] for name in names])
        return self.network(*self.stacked(latents, t, names, condition), embeds, settings.scale)
