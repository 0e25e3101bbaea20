"""Generate and edit images with EZIGen (arXiv 2409.08091, sections 3.3 and 3.4): lay the scene out by text, or take a
picture that is given, then transfer the subject's appearance into it, again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from pig.attention.adapters import ScaledReferences
from pig.data.transforms import to_images
from pig.errors import InputError
from pig.methods.ezigen.network import Adapters, EZIGenNet
from pig.models.backbone import Backbone, SchedulerName, decode_latents
from pig.models.encoders import Clip, load_clip
from pig.models.names import TOYWORLD
from pig.sampling.call import Call, Condition
from pig.sampling.guidance import branch_weights, classifier_free
from pig.sampling.inversion import invert
from pig.sampling.loop import noised
from pig.sampling.pipeline import SubjectPipeline
from pig.sampling.references import reference_reader
from pig.sampling.settings import SamplingSettings, control

CLIP = "openai/clip-vit-base-patch32"  # of the stop rule


@lru_cache(maxsize=1)  # a training makes pipelines often
def stop_clip(name: str, device: torch.device) -> Clip:
    return load_clip(name, device)


def reference_prompt(noun: str) -> str:
    """What the UNet is told while it reads references."""
    return f"a photo of a {noun}" if noun else ""


@dataclass(frozen=True)
class EZIGenSettings(SamplingSettings):
    """EZIGen's controls (sections 3.3 and 4.1)."""

    scheduler: SchedulerName | None = control("ddpm")
    """The sampler; the paper's is the ancestral one."""
    layout_share: float = control(0.6, 0, 1)
    """Share of the steps that lay out the scene by text alone, before the subject's appearance is transferred."""
    loops: int | None = control(None, 0, 50)
    """How often the picture is noised again and the transfer repeated; by default as the stop rule says."""
    min_loops: int = control(3, 0, 50, slider=(0, 10))
    """Of the stop rule: so many loops at least."""
    max_loops: int = control(10, 0, 50, slider=(0, 20))
    """Of the stop rule: so many loops at most."""
    similarity_stop: float = control(0.99, -1, 1, slider=(0.8, 1))
    """Of the stop rule: a picture is finished when its CLIP similarity to the one before reaches this."""
    renoise_timestep: int | None = control(None, 0, 999)
    """The timestep to which pictures are noised again; by default that of the first transfer step (release:
    400). Editing does without."""
    adapter_scale: float = control(1.0, 0, 2)
    """Of what the adapters add: 0 is the base model alone."""
    transfer_everywhere: bool = control(False)
    """Transfer at all steps, without layout and loops (the first line of Table 5). In editing: go back to the first
    step."""
    image_guidance: float = control(1.0, 0, 1000, slider=(0, 15))
    """How closely to follow the references in the transfer: eta_im of BootPIG's Eq. 4. 1 is the paper's: features in
    both branches."""
    editing_guidance: float = control(2.0, 0, 1000, slider=(0, 15))
    """How closely to follow the prompt where a picture is edited, in place of `text_guidance`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_loops > self.max_loops:
            raise InputError(f"min_loops={self.min_loops} is above max_loops={self.max_loops}")

    def first_transfer(self, steps: int, edits: bool = False) -> int:
        """The number of the first transfer step; in editing there is always one."""
        first = 0 if self.transfer_everywhere else round(self.layout_share * steps)
        return min(first, steps - 1) if edits else first

    def most_loops(self, steps: int, edits: bool = False) -> int:
        """How many loops a picture goes through, at most."""
        none = self.transfer_everywhere or self.adapter_scale == 0 or self.first_transfer(steps) == steps
        if none and not edits:
            return 0
        return self.max_loops if self.loops is None else self.loops


@dataclass(eq=False)
class EZIGenCondition(Condition):
    """What a call's steps need. `weights` are those of the transfer.

    layout: weights of the branches in the layout. references: of the transfer steps; None where the adapters are off.
    group_of: of each picture, its row in `references`. first: the number of the first transfer step.
    """

    layout: Mapping[str, float]
    references: ScaledReferences | None
    group_of: list[int]
    first: int

    def of(self, pictures: Sequence[int]) -> EZIGenCondition:
        """For some of the pictures; each brings its own references, unless all have the same."""
        if list(pictures) == list(range(len(self.group_of))):
            return self
        rows, references = [self.group_of[one] for one in pictures], self.references
        if len(set(rows)) == 1:
            rows = rows[:1]
        if references is not None:
            features = {name: f[rows] for name, f in references.features.items()}
            projected = {name: (k[rows], v[rows]) for name, (k, v) in references.projected.items()}
            references = replace(references, features=features, projected=projected)
        text = {name: one[list(pictures)] for name, one in self.text.items()}
        groups = list(range(len(rows))) if len(rows) > 1 else [0] * len(pictures)
        return replace(self, text=text, references=references, group_of=groups)


class EZIGenPipeline(SubjectPipeline):
    """Prompt and reference images in, images of that subject out.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: of the base model, all frozen.
        adapters: trained; see `Adapters`.
        reference_timestep: t at which references are noised and read.
        clip: of the stop rule: as `pig.models.encoders.load_clip` takes it.
        base: the base model's name. settings: the model's own defaults, over those of `EZIGenSettings`.
        network: UNet and adapters together, where there are such already.
    """

    method = "ezigen"
    resident = ("adapters",)
    Settings = EZIGenSettings
    without_references: ClassVar = {"adapter_scale": 0.0, "scheduler": "unipc"}
    has_loops = True
    network: EZIGenNet

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        adapters: Adapters,
        scheduler: SchedulerMixin,
        reference_timestep: int = 1,
        clip: str | None = None,
        base: str | None = None,
        settings: dict[str, Any] | None = None,
        network: EZIGenNet | None = None,
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
                "adapters": adapters,
                "scheduler": scheduler,
            },
        )
        clip = clip or (TOYWORLD if base == TOYWORLD else CLIP)
        self.register_to_config(reference_timestep=reference_timestep, clip=clip)
        self.network = network or EZIGenNet(unet, adapters=adapters)

    @classmethod
    def further_models(cls, base: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
        stops_by_rule = settings.get("loops") is None and not settings.get("transfer_everywhere")
        return (CLIP,) if stops_by_rule and base != TOYWORLD else ()

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        *,
        base: str,
        settings: Mapping[str, Any],
        double_residual: bool = False,
        **options: Any,
    ) -> Self:
        return cls(
            **vars(backbone),
            adapters=Adapters.of(backbone.unet, double_residual),
            base=base,
            settings=dict(settings),
            **options,
        )

    def model_options(self) -> dict[str, Any]:
        own = {name: self.config[name] for name in ("reference_timestep", "clip")}
        return {**own, "double_residual": self.adapters.config.double_residual}

    def steps_of(self, settings: EZIGenSettings, *, edits: bool = False) -> int:
        steps = settings.num_inference_steps
        first = settings.first_transfer(steps, edits)
        return (0 if edits else steps) + settings.most_loops(steps, edits) * (steps - first)

    def condition(self, call: Call, settings: EZIGenSettings) -> EZIGenCondition:
        steps, edits = len(call.scheduler.timesteps), call.known is not None
        loops = settings.most_loops(steps, edits)
        if edits and ((settings.layout_share == 1 and not settings.transfer_everywhere) or loops == 0):
            raise InputError("editing needs a transfer: layout_share below 1, and at least one loop")
        if settings.loops is None and loops:
            self._load_clip()  # not found missing after the first picture
        references = self._read(call, settings) if settings.adapter_scale > 0 else None
        rows = 1 if references is None else len(next(iter(references.features.values())))
        guidance = settings.editing_guidance if edits else settings.text_guidance
        return EZIGenCondition(
            text=self.encode_prompts(call, settings),
            weights=branch_weights(settings.image_guidance, guidance),
            steps=steps,
            layout=classifier_free(guidance),
            references=references,
            group_of=[one * rows // call.count for one in range(call.count)],
            first=settings.first_transfer(steps, edits),
        )

    def _read(self, call: Call, settings: EZIGenSettings) -> ScaledReferences:
        """The references of each prompt, read once: a fixed t and a fixed noise serve all steps and loops."""
        asked = [(tuple(map(id, one)), noun) for one, noun in zip(call.references, call.class_nouns, strict=True)]
        groups = list(dict.fromkeys(asked))
        side = max(call.height, call.width)
        z_ref = torch.stack([self.encode_references(call.references[asked.index(one)], side) for one in groups])
        text = self.encode_text([reference_prompt(noun) for _, noun in groups])

        def encode(z: Tensor, t: Tensor, told: Tensor) -> dict[str, Tensor]:
            return self.network.encode_reference(z, t, told[:, None].expand(-1, z.shape[1], -1, -1))

        weights, cache = self.unet.parameters(), self.reference_cache
        read = reference_reader(encode, weights, z_ref, text, self.scheduler.alphas_cumprod, cache)
        features = read(self.config.reference_timestep, 0)
        if asked != [group for group in groups for _ in range(len(asked) // len(groups))]:
            features = {name: f[[groups.index(one) for one in asked]] for name, f in features.items()}
        return ScaledReferences(features, adapter_scale=settings.adapter_scale)

    def weights(self, step: int, condition: EZIGenCondition, settings: EZIGenSettings) -> Mapping[str, float]:
        return condition.weights if self._transfers(step, condition) else condition.layout

    @staticmethod
    def _transfers(step: int, condition: EZIGenCondition) -> bool:
        return step >= condition.first and condition.references is not None

    def branches(
        self,
        latents: Tensor,
        t: Tensor,
        step: int,
        names: Sequence[str],
        condition: EZIGenCondition,
        settings: EZIGenSettings,
    ) -> Tensor:
        """By text alone in the layout; in the transfer e_uncond without references, e_im and e_text_im with them."""
        references = None
        plain, branches = self.with_references(latents, names)
        if condition.references is not None and self._transfers(step, condition) and branches:
            references = replace(condition.references, plain=plain, branches=branches)
        return self.network(*self.stacked(latents, t, names, condition), references)

    def draw(self, noise: Tensor, call: Call, condition: EZIGenCondition, settings: EZIGenSettings) -> Tensor:
        """A first picture by layout and transfer, or the one to be edited; then loops, each back to the
        noise level of the layout and through the transfer again, which pictures leave when they have converged."""
        active, most = list(range(call.count)), settings.most_loops(condition.steps, call.known is not None)
        if call.known is None:
            latents = super().draw(noise, call, condition, settings)
        else:
            latents = call.known.z_0.expand_as(noise).clone()
            path = self._inverted(call.known.z_0, call, condition)
            call = replace(call, known=call.known.on_path(path))
        call.on_loop(active, latents)
        before = self._seen(latents) if settings.loops is None and most else None
        for loop in range(most):
            if not active or self._interrupt:
                break
            now = self._transfer(latents[active], active, loop, call, condition.of(active), settings)
            if self._interrupt:  # what is not finished does not take the place of what is
                break
            latents = latents.index_copy(0, torch.tensor(active, device=latents.device), now)
            call.on_loop(active, now)
            if before is not None:
                seen = self._seen(now)
                alike = F.cosine_similarity(seen, before[active]).tolist()
                before[active] = seen
                active = going_on(active, alike, loop + 1, settings)
        return latents

    def _transfer(
        self,
        latents: Tensor,
        pictures: Sequence[int],
        loop: int,
        call: Call,
        condition: EZIGenCondition,
        settings: EZIGenSettings,
    ) -> Tensor:
        """Bring finished pictures back to the layout's noise level, and run the transfer steps over them."""
        generator = call.generator
        if isinstance(generator, list):
            generator = [generator[one] for one in pictures]
        t = int(call.scheduler.timesteps[condition.first])
        if call.known is None:
            t = t if settings.renoise_timestep is None else settings.renoise_timestep
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
            back = noised(latents, noise, call.scheduler, torch.tensor(t, device=latents.device))
        elif loop == 0:  # the picture itself, inverted already
            back = call.known.at(call.scheduler, torch.tensor(t)).expand_as(latents)
        else:
            back = self._inverted(latents, call, condition)[t]
        return self.denoise(back, replace(call, generator=generator), condition, settings, first=condition.first)

    def _inverted(self, latents: Tensor, call: Call, condition: EZIGenCondition) -> dict[int, Tensor]:
        """Section 3.4: from pictures back to the first transfer step, by the UNet alone and the empty prompt."""
        empty = self.encode_text([""])

        def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
            return self.network(z, t.expand(len(z)), empty.expand(len(z), -1, -1))

        return invert(predict, latents, call.scheduler, call.scheduler.timesteps[condition.first :])

    def _load_clip(self) -> Clip:
        try:
            return stop_clip(self.config.clip, self._execution_device)
        except InputError as error:
            raise InputError(
                f"the stop rule needs CLIP ({self.config.clip}): {error}. Or name the number of loops"
            ) from (error)

    def _seen(self, latents: Tensor) -> Tensor:
        """CLIP's embeddings of the pictures, (B, D)."""
        images = [to_images(decode_latents(self.vae, one))[0] for one in latents.split(1)]
        return self._load_clip().images(images)


def going_on(active: Sequence[int], alike: Sequence[float], done: int, settings: EZIGenSettings) -> list[int]:
    """The pictures that another loop is for, after `done` of them."""
    if done < settings.min_loops:
        return list(active)
    return [one for one, similarity in zip(active, alike, strict=True) if similarity < settings.similarity_stop]
