"""Generate images with DreamBlend (arXiv 2411.19390): an early checkpoint lays out, a late one draws the subject.

    M_i     the early network's word maps in step i, while it draws the prompt from noise z
    z_i <- z_i - step_size grad_z sum_{layers, positions, words} mean_heads (M_i - M'_i(z_i))^2
    z_i-1   the late network's usual step from there, M' its own maps; both start from the same noise

The paper's algorithm is not public. The gradient step is that of pix2pix-zero (arXiv 2302.03027, Algorithm 1).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self

import psutil
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pig.attention.maps import Maps, distance, layers_of, maps_bytes, recording
from pig.errors import InputError
from pig.models.backbone import Backbone, SchedulerName
from pig.models.encoders import tokenize
from pig.models.identifier import identifier_token, with_identifier
from pig.sampling.call import Call, Condition
from pig.sampling.settings import SamplingSettings, control
from pig.sampling.text import TextPipeline

Words = Literal["all", "not_identifier", "subject"]


@dataclass(frozen=True)
class DreamBlendSettings(SamplingSettings):
    """DreamBlend's controls."""

    step_size: float = control(0.01, 0, 100, slider=(0, 0.1))
    """Of the gradient step towards the early network's maps: 0 is the late network alone."""
    guided_share: float = control(1.0, 0, 1)
    """Of the steps, from the first one on: those with a gradient step."""
    words: Words = control("all")
    """Whose maps count: those of the whole text, of all but the identifier, or of identifier and class noun."""
    coarse: bool = control(False)
    """Compare the maps of the UNet's coarser levels only."""
    early_share: float = control(0.0, 0, 1)
    """Of the steps, from the first one on: those that the early network takes itself."""
    identifier: str = control("sks")
    """The word that stands for the subject before its class noun, as in training. A prompt may hold it."""
    scheduler: SchedulerName | None = control("dpm++")
    """The sampler; one that goes back to its last sample, as UniPC does, would undo a part of the gradient step."""


@dataclass(eq=False)
class BlendCondition(Condition):
    """words: (B, L) bool, those whose maps count. early_until: the early network draws up to this step."""

    words: Tensor
    early_until: int


class DreamBlendPipeline(TextPipeline):
    """Prompts about one subject in, images of that subject out.

    Args:
        vae, text_encoder, tokenizer, scheduler: of the base model.
        unet, early_unet: the late and the early checkpoint's.
        tuned: the pipelines of the early and of the late checkpoint, which these come from.
        base: the base model's name. settings: the model's own defaults, over those of `DreamBlendSettings`.
    """

    method = "dreamblend"
    Settings = DreamBlendSettings

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        early_unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        tuned: tuple[TextPipeline, ...] = (),
        base: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, base, settings)
        self.register_modules(early_unet=early_unet)
        unet.requires_grad_(False)  # the guidance's gradient is of the latents: nothing is kept for the weights'
        self._tuned = tuned

    @classmethod
    def from_backbone(cls, backbone: Backbone, *, base: str, settings: Mapping[str, Any], **options: Any) -> Self:
        early = copy.deepcopy(backbone.unet)
        return cls(**vars(backbone), early_unet=early, base=base, settings=dict(settings), **options)

    @classmethod
    def of(cls, early: TextPipeline, late: TextPipeline) -> Self:
        """Of two checkpoints of one tuning."""
        if early.config.get("tuned_text_encoder"):
            raise InputError("DreamBlend needs one text encoder for both checkpoints: here it is tuned, too")
        parts = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        return cls(
            **{name: getattr(late, name) for name in parts},
            early_unet=early.unet,
            tuned=(early, late),
            base=late.config.base,
            settings=late.config.settings,
        )

    @property
    def tuned_parts(self) -> tuple[TextPipeline, ...]:
        return self._tuned

    @classmethod
    def check_prompt(cls, prompt: str, noun: str, settings: DreamBlendSettings) -> None:
        with_identifier(prompt, noun, settings.identifier)

    def text_of(self, prompt: str, noun: str, settings: DreamBlendSettings) -> str:
        identifier_token(self.tokenizer, settings.identifier)
        return with_identifier(prompt, noun, settings.identifier)

    def condition(self, call: Call, settings: DreamBlendSettings) -> BlendCondition:
        plain = super().condition(call, settings)
        prompts = [self.text_of(*given, settings) for given in zip(call.prompts, call.class_nouns, strict=True)]
        ids = tokenize(self.tokenizer, prompts).to(self._execution_device)
        words = torch.ones_like(ids, dtype=torch.bool)
        identifier = ids == identifier_token(self.tokenizer, settings.identifier)
        if settings.words == "not_identifier":
            words = ~identifier
        elif settings.words == "subject":
            words = identifier.clone()
            for row, noun in enumerate(call.class_nouns):
                for token in self.tokenizer(noun, add_special_tokens=False).input_ids:
                    words[row] |= ids[row] == token
        return BlendCondition(
            **vars(plain),
            words=words.repeat_interleave(call.images_per_prompt, 0),
            early_until=round(settings.early_share * plain.steps),
        )

    def branches(
        self,
        latents: Tensor,
        t: Tensor,
        step: int,
        names: Sequence[str],
        condition: BlendCondition,
        settings: DreamBlendSettings,
    ) -> Tensor:
        unet = self.early_unet if step < condition.early_until else self.unet
        return unet(*self.stacked(latents, t, names, condition)).sample

    def draw(self, noise: Tensor, call: Call, condition: BlendCondition, settings: DreamBlendSettings) -> Tensor:
        guided = round(settings.guided_share * condition.steps) if settings.step_size else 0
        start = noise * call.scheduler.init_noise_sigma
        if not guided:
            return self.denoise(start, call, condition, settings)
        kept = self._early_maps(start, call, condition, settings, guided)
        timesteps = call.scheduler.timesteps

        def towards(step: int, latents: Tensor) -> Tensor:
            """The latents at the beginning of a step, moved towards the early network's maps."""
            if not condition.early_until <= step < guided:
                return latents
            given = partial(self._gradient, latents, timesteps[step], call, condition, settings, kept[step])
            try:
                gradient = given()
            except torch.OutOfMemoryError:
                if self.unet.is_gradient_checkpointing:
                    raise
                gradient = None  # tried again below, when this error no longer holds the pass's tensors
            if gradient is None:
                warnings.warn("memory is short: the guidance's gradient is checkpointed, and slower", stacklevel=2)
                self.unet.enable_gradient_checkpointing()
                gradient = given()
            return latents - settings.step_size * gradient

        def on_step(step: int, t: Tensor, latents: Tensor) -> tuple[Tensor, bool]:
            latents, go_on = call.on_step(step, t, latents)
            return (towards(step + 1, latents) if go_on else latents), go_on

        return self.denoise(towards(0, start), replace(call, on_step=on_step), condition, settings)

    @torch.enable_grad()
    def _gradient(
        self,
        latents: Tensor,
        t: Tensor,
        call: Call,
        condition: BlendCondition,
        settings: DreamBlendSettings,
        early: Maps,
    ) -> Tensor:
        """Of the distance to the early network's maps, by the latents: (B, 4, h, w)."""
        moved = latents.detach().requires_grad_()
        given = call.scheduler.scale_model_input(moved, t)
        with recording(self.unet, len(latents), layers_of(self.unet, coarse=settings.coarse)) as maps:
            self.unet(*self.stacked(given, t, ["text_im"], condition))
            # Rounded as the early ones are: where both networks are one, there is no difference.
            rounded = {name: one.half() for name, one in maps.items()}
            # Inside: where the gradient is checkpointed, the pass is repeated, with the same hooks.
            (gradient,) = torch.autograd.grad(distance(rounded, early, condition.words).sum(), moved)
        return gradient

    def _early_maps(
        self, start: Tensor, call: Call, condition: BlendCondition, settings: DreamBlendSettings, guided: int
    ) -> list[Maps]:
        """Of the steps that are guided, while the early network draws; in half precision."""
        kept: list[Maps] = []
        place = self._place_for_maps(start, guided, settings)

        with recording(self.early_unet, len(start), layers_of(self.early_unet, coarse=settings.coarse)) as maps:

            def on_step(step: int, t: Tensor, latents: Tensor) -> tuple[Tensor, bool]:
                kept.append({name: one.half().to(place) for name, one in maps.items()})
                return latents, len(kept) < guided

            early = replace(condition, early_until=condition.steps)
            self.denoise(start, replace(call, on_step=on_step), early, settings)
        return kept

    def _place_for_maps(self, latents: Tensor, guided: int, settings: DreamBlendSettings) -> torch.device:
        """Where the maps are kept: beside the latents, or on the CPU where they take more than half of what is free."""
        layers = layers_of(self.unet, coarse=settings.coarse)
        one = maps_bytes(self.unet, layers, tuple(latents.shape[-2:]), self.tokenizer.model_max_length)
        wanted = guided * len(latents) * one
        if latents.device.type == "cuda" and wanted < torch.cuda.mem_get_info(latents.device)[0] / 2:
            return latents.device
        free = psutil.virtual_memory().available
        if wanted > free:
            raise InputError(
                f"the maps of {len(latents)} pictures and {guided} steps take {wanted / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} are free: draw fewer at a time (--batch_size), or lower guided_share"
            )
        return torch.device("cpu")
