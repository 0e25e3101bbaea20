"""Generate images of a given subject with a trained BootPIG model (arXiv 2401.13974, sections 3.5 and 3.6)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, cast, get_args

import psutil
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Generator, Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pig.attention import Pooling, ProjectedReferences
from pig.data.subjects import Segment
from pig.data.transforms import reference_picture, to_images, to_tensor
from pig.errors import InputError, check_named, check_ranges
from pig.models.backbone import (
    SchedulerName,
    align,
    check_size,
    decode_latents,
    encode_images,
    make_scheduler,
    tokenize,
    vae_scale,
)
from pig.models.two_unet import TwoUNet
from pig.pipelines.guidance import branch_weights
from pig.pipelines.inpainting import KnownRegion
from pig.pipelines.references import Picture, ReferenceCache, cut_outs_of, reference_reader

log = logging.getLogger(__name__)

ReferenceCaption = Literal["caption", "object"]
ReferenceNoise = Literal["fresh", "fixed"]
StepCallback = Callable[["BootPIGPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


def reference_prompt(caption: str, kind: str) -> str:
    """What the Reference UNet is told: the caption (paper), or its words before the first comma (release)."""
    return caption if kind == "caption" else caption.split(",")[0]


class BootPIGPipeline(DiffusionPipeline):
    """Prompt and reference images in, images of that subject out.

    Args:
        vae, text_encoder, tokenizer, scheduler: of the Stable Diffusion checkpoint that was trained on.
        base_unet, reference_unet: trained; see `pig.models.two_unet.TwoUNet`.
        pooling, reference_key_scale: see `TwoUNet`.
        reference_timestep: the fixed t at which references are noised and read; None takes the step's own t.
        reference_caption: see `reference_prompt`.
        image_guidance, text_guidance: what a call takes that names none (section 4.1).
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        base_unet: UNet2DConditionModel,
        reference_unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        pooling: str = "softmax",  # diffusers understands no Literal here; TwoUNet checks it
        reference_key_scale: float = 1.0,
        reference_timestep: int | None = None,
        reference_caption: str = "caption",
        image_guidance: float = 5.0,
        text_guidance: float = 7.5,
    ) -> None:
        super().__init__()
        for part in (vae, text_encoder, base_unet, reference_unet):
            align(part)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            base_unet=base_unet,
            reference_unet=reference_unet,
            scheduler=scheduler,
        )
        self.register_to_config(
            pooling=pooling,
            reference_key_scale=reference_key_scale,
            reference_timestep=reference_timestep,
            reference_caption=reference_caption,
            image_guidance=image_guidance,
            text_guidance=text_guidance,
        )
        self.model = TwoUNet(
            base_unet, reference_unet, pooling=cast(Pooling, pooling), reference_key_scale=reference_key_scale
        )
        self.reference_cache: ReferenceCache | None = None

    def use_scheduler(self, name: SchedulerName) -> None:
        """Sample by `unipc` (paper), `ddim` or `dpm++` (DPM-Solver++), with the base model's own noise schedule."""
        self.register_modules(scheduler=make_scheduler(name, self.scheduler.config))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Picture | Sequence[Picture] | Sequence[Sequence[Picture]],
        *,
        segment: Segment | None = None,
        image_guidance: float | None = None,
        text_guidance: float | None = None,
        strength: float = 1.0,
        negative_prompt: str = "",
        guidance_rescale: float = 0.0,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generator | list[Generator] | None = None,
        pooling: Pooling | None = None,
        reference_caption: ReferenceCaption | None = None,
        reference_noise: ReferenceNoise = "fresh",
        image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        reference_every: int = 1,
        deep_every: int = 1,
        callback_on_step_end: StepCallback | None = None,
        output_type: Literal["pil", "pt"] = "pil",
    ) -> ImagePipelineOutput:
        """Draw `num_images_per_prompt` images for each prompt.

        Args:
            prompt: one or several.
            references: pictures of the subject, the same for all prompts; or a list of such lists, one for each
                prompt, all of one length. A picture is a file, PIL, or PIL and its mask. The object is found by the
                picture's own alpha, else by its mask (of a file, by `NAME.mask.png`), else by `segment`; without any
                of them the whole picture is taken.
            segment: see `pig.models.foreground.make_segmenter`.
            image_guidance, text_guidance: eta_im and eta_text+im of Eq. 4: how closely to follow the references, and
                the prompt; by default as the model says. Where both are equal, one of the three branches is not needed,
                and a third of the work.
            strength: of the references in every RSA layer: 0 is the Base UNet alone with `text_guidance` as
                classifier-free guidance, 1 is BootPIG.
            negative_prompt: what to keep away from: it stands in place of the empty prompt.
            guidance_rescale: 0 to 1; brings the contrast of strongly guided images back (arXiv 2305.08891, 3.4).
            height, width: in pixels; by default what the base model was trained at, or the size of `image`.
            generator: one for all images, or a list with one for each image, prompt by prompt.
            pooling, reference_caption: in place of the model's own (see the class).
            reference_noise: the noise on the references is drawn afresh at every step, or once. It does not depend on
                `generator`, so that one Reference-UNet pass serves all images of a prompt.
            image, mask_image: inpainting: draw only where the mask is white; see `KnownRegion`.
            guidance_interval: the share of the steps, (0, 1) for all, in which guidance is used (arXiv 2404.07724);
                in the others there is one branch in place of three.
            reference_every: read the references only at every so many steps.
            deep_every: compute the Base UNet's deep features only at every so many steps (arXiv 2312.00858).
            callback_on_step_end: as in diffusers: called with this pipeline, step, t and `{"latents": ...}`, whose
                latents it may replace. Setting `pipeline._interrupt = True` ends the drawing as it stands.
            output_type: `pil`, or `pt`: (N, 3, H, W) in [-1, 1].

        Raises:
            InputError: no references, a setting out of its range, a size the model cannot do, or more references than
                memory allows.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num_images_per_prompt < 1 or num_inference_steps < 1 or not prompts:
            raise InputError("give at least one prompt, one image per prompt and one step")
        image_guidance = self.config.image_guidance if image_guidance is None else image_guidance
        text_guidance = self.config.text_guidance if text_guidance is None else text_guidance
        check_ranges(
            image_guidance=(image_guidance, 0, 1000),
            text_guidance=(text_guidance, 0, 1000),
            strength=(strength, 0, 1),
            guidance_rescale=(guidance_rescale, 0, 1),
            guidance_interval=(guidance_interval[0], 0, guidance_interval[1]),
            guidance_interval_end=(guidance_interval[1], 0, 1),
            num_inference_steps=(num_inference_steps, 1, self.scheduler.config.num_train_timesteps),
            reference_every=(reference_every, 1, math.inf),
            deep_every=(deep_every, 1, math.inf),
        )
        check_named("pooling", pooling, (None, *get_args(Pooling)))
        check_named("reference_caption", reference_caption, (None, *get_args(ReferenceCaption)))
        check_named("reference_noise", reference_noise, get_args(ReferenceNoise))
        if (image is None) != (mask_image is None):
            raise InputError("inpainting needs both the picture (image) and its mask (mask_image)")
        native = self.base_unet.config.sample_size * vae_scale(self.vae)
        own = (native, native) if image is None else (image.height, image.width)
        height, width = (own[0] if height is None else height, own[1] if width is None else width)
        check_size(self.vae, width, height)
        if image is not None and image.size != (width, height):
            raise InputError(f"inpainting keeps the picture's size {image.size}; leave height and width away")
        per_prompt = cut_outs_of(prompts, references, segment)
        for cut in filter(None, map(self.cut_off, dict.fromkeys(prompts))):
            log.warning("the prompt is too long, its end is not read: %r", cut)
        side = max(height, width)
        # What the Reference UNet finds depends on pictures and caption: prompts that share both share one pass.
        caption_kind = self.config.reference_caption if reference_caption is None else reference_caption
        asked = [
            (tuple(map(id, pictures)), reference_prompt(one, caption_kind))
            for pictures, one in zip(per_prompt, prompts, strict=True)
        ]
        groups = list(dict.fromkeys(asked))
        self._check_memory(len(groups), len(per_prompt[0]), len(prompts) * num_images_per_prompt, side)
        z_ref = torch.stack([self._encode_references(per_prompt[asked.index(group)], side) for group in groups])
        captions = self._encode_text([caption for _, caption in groups])
        read = reference_reader(self.model, z_ref, captions, self.scheduler.alphas_cumprod, self.reference_cache)
        in_blocks = asked == [group for group in groups for _ in range(len(asked) // len(groups))]
        group_of_prompt = None if in_blocks else [groups.index(one) for one in asked]

        text = self._encode_text(prompts).repeat_interleave(num_images_per_prompt, dim=0)
        empty = self._encode_text([negative_prompt]).expand_as(text)
        conditions = {"uncond": empty, "im": empty, "text_im": text}
        # At strength 0 "im" would be "uncond" once more: with equal guidances it falls away.
        guided_by = branch_weights(image_guidance if strength > 0 else text_guidance, text_guidance)

        count = len(text)
        factor = vae_scale(self.vae)
        shape = (count, self.base_unet.config.in_channels, height // factor, width // factor)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=text.dtype)
        known = None if image is None or mask_image is None else KnownRegion(self.vae, image, mask_image, noise)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        timesteps = self.scheduler.timesteps
        latents = noise * self.scheduler.init_noise_sigma
        self._interrupt = False

        projected: ProjectedReferences | None = None
        read_at, deep, deep_of = None, None, None
        for step, t in enumerate(self.progress_bar(timesteps)):
            low, high = guidance_interval
            weights = guided_by if low <= step / len(timesteps) < high else {"text_im": 1.0}
            plain = count if "uncond" in weights else 0
            branches = len(weights) - (plain > 0)
            asking = None
            if strength > 0 and branches:
                reference_step = step - step % reference_every
                at = self._noise_level(timesteps[reference_step], reference_step, reference_noise)
                if at != read_at:
                    features, read_at = read(*at), at
                    if group_of_prompt is not None:
                        features = {name: f[group_of_prompt] for name, f in features.items()}
                    projected = self.model.project(features, pooling=pooling, strength=strength)
                assert projected is not None
                asking = replace(projected, plain=plain, branches=branches)
            # One batch: e_uncond, which has no references, then e_im and e_text_im, which share theirs.
            if step % deep_every == 0 or deep_of != list(weights):
                deep, deep_of = None, list(weights)
            predicted, deep = self.model.sample(
                self.scheduler.scale_model_input(latents, t).repeat(len(weights), 1, 1, 1),
                t.expand(len(weights) * count),
                torch.cat([conditions[branch] for branch in weights]),
                asking,
                deep,
            )
            e = dict(zip(weights, predicted.chunk(len(weights)), strict=True))
            guided = sum((weight * e[branch] for branch, weight in weights.items()), start=torch.zeros_like(noise))
            if guidance_rescale > 0 and "text_im" in e:
                guided = rescale_noise_cfg(guided, e["text_im"], guidance_rescale)
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
            if known is not None:
                level = timesteps[step + 1] if step + 1 < len(timesteps) else None
                latents = known.blend(latents, self.scheduler, level)
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step, t, {"latents": latents})
                latents = (changed or {}).get("latents", latents)
            if self._interrupt:
                break

        images = torch.cat([decode_latents(self.vae, one) for one in latents.split(1)])  # one at a time: memory
        if known is not None:
            images = known.paste(images)
        return ImagePipelineOutput(images=to_images(images) if output_type == "pil" else images)

    def _noise_level(self, t: Tensor, step: int, reference_noise: ReferenceNoise) -> tuple[int, int]:
        """At which t the references are read in a step, and the seed of their noise."""
        fixed = self.config.reference_timestep
        return int(t) if fixed is None else fixed, step if reference_noise == "fresh" else 0

    def cut_off(self, prompt: str) -> str:
        """What of a prompt is longer than the tokenizer takes, and is not read."""
        limit = self.tokenizer.model_max_length - 2  # the begin and the end
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return self.tokenizer.decode(ids[limit:])

    def _encode_references(self, pictures: list[Image.Image], side: int) -> Tensor:
        """(K, 4, h, h), scaled latents of the references on white squares; RSA does not ask for the image's shape."""
        tensors = [to_tensor(reference_picture(picture, side)) for picture in pictures]
        return torch.cat([encode_images(self.vae, one[None].to(self._execution_device)) for one in tensors])

    def _encode_text(self, texts: list[str]) -> Tensor:
        return self.text_encoder(tokenize(self.tokenizer, texts).to(self._execution_device))[0]

    def _check_memory(self, groups: int, references: int, images: int, side: int) -> None:
        """Refuse before the first step what will not fit, by count: all features, the pass that makes them (its skip
        connections, and some 40 tensors of the widest layer), and one RSA layer's outputs for each reference."""
        factor, levels, sizes = vae_scale(self.vae), len(self.base_unet.config.block_out_channels), []
        for name in self.model.layers:
            kind, part = name.split(".")[:2]
            index = int(part) if part.isdigit() else 0
            depth = {"down_blocks": index, "mid_block": levels - 1, "up_blocks": levels - 1 - index}[kind]
            channels = self.base_unet.get_submodule(name).to_q.in_features
            sizes.append((side // (factor * 2**depth)) ** 2 * channels)
        values = references * (groups * (2 * sum(sizes) + 40 * max(sizes)) + 2 * images * max(sizes))
        needed = values * self.base_unet.dtype.itemsize
        device = self._execution_device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if needed > free:
            raise InputError(
                f"{images} images of {groups} subjects with {references} references each need about "
                f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}: give fewer of them at a time"
            )
