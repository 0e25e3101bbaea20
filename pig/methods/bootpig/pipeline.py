"""Generate images of a given subject with a trained BootPIG model (arXiv 2401.13974, sections 3.5 and 3.6)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pig.attention.merged import MergedReferences
from pig.attention.reference import Pooling
from pig.errors import InputError
from pig.methods.bootpig.network import TwoUNet
from pig.models.backbone import Backbone, vae_scale
from pig.sampling.call import Call, Condition
from pig.sampling.guidance import branch_weights
from pig.sampling.pipeline import SubjectPipeline
from pig.sampling.references import free_memory, reference_reader
from pig.sampling.settings import SamplingSettings, control

ReferenceCaption = Literal["caption", "object"]
ReferenceNoise = Literal["fresh", "fixed"]


def reference_prompt(caption: str, kind: ReferenceCaption) -> str:
    """What the Reference UNet is told: the caption (paper), or its words before the first comma (release)."""
    return caption if kind == "caption" else caption.split(",")[0]


@dataclass(frozen=True)
class BootPIGSettings(SamplingSettings):
    """BootPIG's controls (section 4.1)."""

    image_guidance: float = control(5.0, 0, 1000, slider=(0, 15))
    """How closely to follow the references: eta_im of Eq. 4 (eta_text+im is `text_guidance`). If both are equal, one
    of the three network evaluations per step is skipped, which saves a third of the work."""
    strength: float = control(1.0, 0, 1)
    """Strength of the references in every layer of Reference Self-Attention: 0 is the base model alone, 1 the full
    effect."""
    pooling: Pooling = control("softmax")
    """How several references are merged (section 3.6)."""
    reference_caption: ReferenceCaption = control("caption")
    """The text that the Reference UNet reads: the whole caption, or the object alone (up to the first comma). With
    `object`, all prompts of a subject share its passes."""
    reference_noise: ReferenceNoise = control("fresh")
    """The noise on the references: fresh at every step, or fixed. It does not depend on the generator, so that one
    Reference-UNet pass serves all images of a prompt."""
    reference_every: int = control(1, 1, slider=(1, 10))
    """Faster, but changes the image: read the references only at every N-th step."""
    deep_every: int = control(1, 1, slider=(1, 10))
    """Faster, but changes the image: compute the Base UNet's deep features only at every N-th step (arXiv
    2312.00858)."""


@dataclass(eq=False)
class BootPIGCondition(Condition):
    """What a call's steps need, and what one step leaves for the next.

    read: of t and the noise's seed: the references' features, layer name -> (P, K, N, C). timesteps: of all steps.
    """

    read: Callable[[int, int], Mapping[str, Tensor]]
    timesteps: Tensor
    references: MergedReferences | None = None
    read_at: tuple[int, int] | None = None
    deep: Tensor | None = None
    deep_of: list[str] | None = None


class BootPIGPipeline(SubjectPipeline):
    """Prompt and reference images in, images of that subject out.

    Args:
        vae, text_encoder, tokenizer, scheduler: of the Stable Diffusion checkpoint that was trained on.
        base_unet, reference_unet: trained; see `TwoUNet`.
        reference_key_scale: see `TwoUNet`.
        reference_timestep: the fixed t at which references are noised and read; None takes the step's own t.
        base: the base model's name. settings: the model's own defaults, over those of `BootPIGSettings`.
        network: both UNets as a `TwoUNet`, where there is one already.
    """

    method = "bootpig"
    Settings = BootPIGSettings
    denoiser = "base_unet"
    without_references: ClassVar = {"strength": 0.0}
    network: TwoUNet

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        base_unet: UNet2DConditionModel,
        reference_unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        reference_key_scale: float = 1.0,
        reference_timestep: int | None = None,
        base: str | None = None,
        settings: dict[str, Any] | None = None,
        network: TwoUNet | None = None,
    ) -> None:
        super().__init__()
        self.register(
            base=base,
            settings=settings,
            parts={
                "vae": vae,
                "text_encoder": text_encoder,
                "tokenizer": tokenizer,
                "base_unet": base_unet,
                "reference_unet": reference_unet,
                "scheduler": scheduler,
            },
        )
        self.register_to_config(reference_key_scale=reference_key_scale, reference_timestep=reference_timestep)
        self.network = network or TwoUNet(
            base_unet,
            reference_unet,
            pooling=cast(Pooling, self.settings().pooling),
            reference_key_scale=reference_key_scale,
        )

    @classmethod
    def from_backbone(cls, backbone: Backbone, *, base: str, settings: Mapping[str, Any], **options: Any) -> Self:
        return cls(
            backbone.vae,
            backbone.text_encoder,
            backbone.tokenizer,
            backbone.unet,
            copy.deepcopy(backbone.unet),
            backbone.scheduler,
            base=base,
            settings=dict(settings),
            **options,
        )

    def model_options(self) -> dict[str, Any]:
        return {name: self.config[name] for name in ("reference_key_scale", "reference_timestep")}

    @property
    def unet(self) -> UNet2DConditionModel:
        """The one that draws, as LoRAs of the base model mean it."""
        return self.base_unet

    def condition(self, call: Call, settings: BootPIGSettings) -> BootPIGCondition:
        if settings.deep_every > 1 and self.is_offloaded:
            raise InputError("deep_every keeps features of layers that offloading moves away: set it to 1")
        side = max(call.height, call.width)
        # What the Reference UNet finds depends on pictures and caption: prompts that share both share one pass.
        asked = [
            (tuple(map(id, cutouts)), reference_prompt(prompt, settings.reference_caption))
            for cutouts, prompt in zip(call.references, call.prompts, strict=True)
        ]
        groups = list(dict.fromkeys(asked))
        self._check_memory(len(groups), len(call.references[0]), call.count, side)
        z_ref = torch.stack([self.encode_references(call.references[asked.index(group)], side) for group in groups])
        captions = self.encode_text([caption for _, caption in groups])
        read = reference_reader(
            self.network.encode_reference,
            self.reference_unet.parameters(),
            z_ref,
            captions,
            self.scheduler.alphas_cumprod,
            self.reference_cache,
        )
        # Where the prompts stand in equal blocks of groups, a group's features serve its block; else each prompt's own.
        in_blocks = asked == [group for group in groups for _ in range(len(asked) // len(groups))]
        order = None if in_blocks else [groups.index(one) for one in asked]

        def read_in_order(t: int, noise_seed: int) -> Mapping[str, Tensor]:
            features = read(t, noise_seed)
            return features if order is None else {name: f[order] for name, f in features.items()}

        # At strength 0 "im" would be "uncond" once more: with equal guidances it falls away.
        eta_im = settings.image_guidance if settings.strength > 0 else settings.text_guidance
        return BootPIGCondition(
            text=self.encode_prompts(call, settings),
            weights=branch_weights(eta_im, settings.text_guidance),
            steps=len(call.scheduler.timesteps),
            read=read_in_order,
            timesteps=call.scheduler.timesteps,
        )

    def branches(
        self,
        latents: Tensor,
        t: Tensor,
        step: int,
        names: Sequence[str],
        condition: BootPIGCondition,
        settings: BootPIGSettings,
    ) -> Tensor:
        """Eq. 4's terms as one batch: e_uncond, without references, then e_im and e_text_im, which share theirs."""
        references = self._references(step, condition, settings, *self.with_references(latents, names))
        if step % settings.deep_every == 0 or condition.deep_of != list(names):
            condition.deep, condition.deep_of = None, list(names)
        batch = self.stacked(latents, t, names, condition)
        predicted, condition.deep = self.network.sample(*batch, references, condition.deep)
        return predicted

    def _references(
        self, step: int, condition: BootPIGCondition, settings: BootPIGSettings, plain: int, branches: int
    ) -> MergedReferences | None:
        """What a step's layers attend to; read again where the step asks for another t or another noise."""
        if settings.strength == 0 or not branches:
            return None
        read_step = step - step % settings.reference_every
        t = self.config.reference_timestep
        at = (
            int(condition.timesteps[read_step]) if t is None else t,
            read_step if settings.reference_noise == "fresh" else 0,
        )
        if at != condition.read_at:
            condition.read_at = at
            condition.references = MergedReferences(
                condition.read(*at),
                first_layer=self.network.layers[0],
                pooling=settings.pooling,
                strength=settings.strength,
            )
        assert condition.references is not None
        return replace(condition.references, plain=plain, branches=branches)

    def _check_memory(self, groups: int, references: int, images: int, side: int) -> None:
        """Refuse before the first step what will not fit, by count: all features, the pass that makes them (its skip
        connections, and some 40 tensors of the widest layer), and one RSA layer's outputs for each reference."""
        factor, levels, sizes = vae_scale(self.vae), len(self.base_unet.config.block_out_channels), []
        for name in self.network.layers:
            kind, part = name.split(".")[:2]
            index = int(part) if part.isdigit() else 0
            depth = {"down_blocks": index, "mid_block": levels - 1, "up_blocks": levels - 1 - index}[kind]
            channels = self.base_unet.get_submodule(name).to_q.in_features
            sizes.append((side // (factor * 2**depth)) ** 2 * channels)
        values = references * (groups * (2 * sum(sizes) + 40 * max(sizes)) + 2 * images * max(sizes))
        needed = values * self.base_unet.dtype.itemsize
        device = self._execution_device
        free = free_memory(device)
        if needed > free:
            raise InputError(
                f"{images} images of {groups} subjects with {references} references each need about "
                f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}: give fewer of them at a time"
            )
