"""Generate images with InstantBooth (arXiv 2304.03411, section 3.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from pig.attention.adapters import PatchTokens
from pig.data.transforms import BLACK
from pig.errors import InputError
from pig.methods.instantbooth.network import Concept, InstantBoothNet, text_with_concept
from pig.models.backbone import Backbone
from pig.models.encoders import tokenize
from pig.models.identifier import first_positions, identifier_token, with_identifier
from pig.models.vision import load_vision, look_at_references, vision_for
from pig.sampling.call import Call, Condition
from pig.sampling.guidance import classifier_free
from pig.sampling.pipeline import SubjectPipeline
from pig.sampling.settings import SamplingSettings, control

VISION = "openai/clip-vit-large-patch14"  # which has the 257 tokens of section 3.2


@dataclass(frozen=True)
class InstantBoothSettings(SamplingSettings):
    """InstantBooth's controls (sections 3.4 and 4.4)."""

    beta: float = control(0.3, 0, 1)
    """Of the adapters: more keeps the subject better and follows the prompt less (balanced sampling). 1 in training."""
    alpha: float = control(0.4, 0, 1)
    """Of the concept's embedding: more keeps the subject better and follows the prompt less (concept token
    renormalisation, Eq. 6). 1 in training."""
    identifier: str = control("sks")
    """The word that stands for the subject before its class noun; one token. A prompt may hold it."""


@dataclass(eq=False)
class InstantBoothCondition(Condition):
    """f_p: width of a block -> (P, N M, C), of each prompt's references."""

    f_p: Mapping[int, Tensor]


class InstantBoothPipeline(SubjectPipeline):
    """Prompt and reference images in, images of that subject out.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: of the base model.
        image_encoder: a CLIP's image tower.
        concept: trained; see `Concept`.
        vision, vision_digest: the image encoder's name, and the digest of its weights as loaded; see `load_vision`.
        before_text, tuned_vision_layers, tuned_unet: as the model was trained; see `InstantBooth`.
        base: the base model's name. settings: the model's own defaults, over those of `InstantBoothSettings`.
        network: all networks together, where there are such already.
    """

    method = "instantbooth"
    resident = ("concept",)
    Settings = InstantBoothSettings
    network: InstantBoothNet

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        image_encoder: CLIPVisionModelWithProjection,
        concept: Concept,
        scheduler: SchedulerMixin,
        vision: str | None = None,
        vision_digest: str | None = None,
        before_text: bool = False,
        tuned_vision_layers: int = 0,
        tuned_unet: bool = False,
        base: str | None = None,
        settings: dict[str, Any] | None = None,
        network: InstantBoothNet | None = None,
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
                "concept": concept,
                "scheduler": scheduler,
            },
        )
        tuned: dict[str, Any] = {"tuned_vision_layers": tuned_vision_layers, "tuned_unet": tuned_unet}
        self.register_to_config(vision=vision, vision_digest=vision_digest, before_text=before_text, **tuned)
        self.network = network or InstantBoothNet(unet, image_encoder, concept, **tuned)

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        *,
        base: str,
        settings: Mapping[str, Any],
        vision: str | None = None,
        vision_digest: str | None = None,
        patch_feature: bool = True,
        **options: Any,
    ) -> Self:
        vision = vision_for(base, vision, VISION)
        image_encoder, vision_digest = load_vision(vision, vision_digest)
        return cls(
            **vars(backbone),
            image_encoder=image_encoder,
            concept=Concept.of(backbone.unet, image_encoder, patch_feature=patch_feature),
            vision=vision,
            vision_digest=vision_digest,
            base=base,
            settings=dict(settings),
            **options,
        )

    def model_options(self) -> dict[str, Any]:
        own = ("vision", "vision_digest", "before_text", "tuned_vision_layers", "tuned_unet")
        return {**{name: self.config[name] for name in own}, "patch_feature": self.concept.patch_feature}

    @classmethod
    def check_prompt(cls, prompt: str, noun: str, settings: InstantBoothSettings) -> None:
        with_identifier(prompt, noun, settings.identifier)

    def text_of(self, prompt: str, noun: str, settings: InstantBoothSettings) -> str:
        return with_identifier(prompt, noun, settings.identifier)

    def condition(self, call: Call, settings: InstantBoothSettings) -> InstantBoothCondition:
        token = identifier_token(self.tokenizer, settings.identifier)
        nouns = zip(call.prompts, call.class_nouns, strict=True)
        prompts = [self.text_of(prompt, noun, settings) for prompt, noun in nouns]
        if any(one.getchannel("A").getextrema() == (255, 255) for of in call.references for one in of):
            raise InputError(
                "a reference without a mask: InstantBooth sees the object alone, on black. Give pictures with an alpha "
                "channel, a NAME.mask.png beside each, or --segmenter"
            )
        f_c, f_p = self.concept(*look_at_references(self.image_encoder, call.references, BLACK))
        ids = tokenize(self.tokenizer, prompts).to(self._execution_device)
        if not first_positions(ids, token).any(1).all():
            raise InputError("a prompt is too long: its identifier and class noun lie behind what is read of it")
        before_text = self.config.before_text
        text = text_with_concept(self.text_encoder, ids, token, settings.alpha * f_c, before_text=before_text)
        return InstantBoothCondition(
            text=self.text_of_branches(text, call, settings),
            weights=classifier_free(settings.text_guidance),
            steps=len(call.scheduler.timesteps),
            f_p=f_p,
        )

    def branches(
        self,
        latents: Tensor,
        t: Tensor,
        step: int,
        names: Sequence[str],
        condition: InstantBoothCondition,
        settings: InstantBoothSettings,
    ) -> Tensor:
        """`uncond` is the base model's, which sees no subject."""
        plain, branches = self.with_references(latents, names)
        seen = PatchTokens(condition.f_p, settings.beta, plain) if branches else None
        return self.network(*self.stacked(latents, t, names, condition), seen)
