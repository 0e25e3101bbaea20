"""Generate images of a given subject with a trained BootPIG model (arXiv 2401.13974, sections 3.5 and 3.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import psutil
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Generator, Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pig import diffusion
from pig.attention import Pooling
from pig.data.transforms import cut_out, reference_picture, to_images, to_tensor
from pig.errors import InputError
from pig.models.backbone import align, check_size, decode_latents, encode_images, tokenize, vae_scale
from pig.models.two_unet import TwoUNet
from pig.pipelines.guidance import image_text_guidance

ReferenceCaption = Literal["caption", "object"]


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
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        base_unet: UNet2DConditionModel,
        reference_unet: UNet2DConditionModel,
        scheduler: UniPCMultistepScheduler,
        pooling: str = "softmax",  # diffusers understands no Literal here; TwoUNet checks it
        reference_key_scale: float = 1.0,
        reference_timestep: int | None = None,
        reference_caption: str = "caption",
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
        )
        self.model = TwoUNet(
            base_unet, reference_unet, pooling=cast(Pooling, pooling), reference_key_scale=reference_key_scale
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Sequence[Image.Image] | Sequence[Sequence[Image.Image]],
        *,
        image_guidance: float = 5.0,
        text_guidance: float = 7.5,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generator | list[Generator] | None = None,
        reference_noise: Literal["fresh", "fixed"] = "fresh",
        output_type: Literal["pil", "pt"] = "pil",
    ) -> ImagePipelineOutput:
        """Draw `num_images_per_prompt` images for each prompt.

        Args:
            prompt: one or several.
            references: pictures of the subject (PIL; RGBA cut-outs, or RGB taken as they are), the same for all
                prompts; or a list of such lists, one for each prompt, all of one length.
            image_guidance, text_guidance: eta_im and eta_text+im of Eq. 4.
            height, width: in pixels; by default what the base model was trained at.
            generator: one for all images, or a list with one for each image, prompt by prompt.
            reference_noise: the noise on the references is drawn afresh at every step, or once. It does not depend on
                `generator`, so that one Reference-UNet pass serves all images of a prompt.
            output_type: `pil`, or `pt`: (N, 3, H, W) in [-1, 1].

        Raises:
            InputError: no references, a size the model cannot do, or more references than memory allows.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        native = self.base_unet.config.sample_size * vae_scale(self.vae)
        height, width = (native if side is None else side for side in (height, width))
        check_size(self.vae, width, height)
        if num_images_per_prompt < 1 or num_inference_steps < 1 or not prompts:
            raise InputError("give at least one prompt, one image per prompt and one step")
        if min(image_guidance, text_guidance) < 0:
            raise InputError(f"guidance must be at least 0, got image {image_guidance}, text {text_guidance}")
        per_prompt = self._references_of(prompts, references)
        side = max(height, width)
        self._check_memory(len(prompts), len(per_prompt[0]), num_images_per_prompt, side)

        # What the Reference UNet finds depends on pictures and caption: prompts that share both share one pass.
        asked = [
            (tuple(map(id, pictures)), reference_prompt(one, self.config.reference_caption))
            for pictures, one in zip(per_prompt, prompts, strict=True)
        ]
        groups = list(dict.fromkeys(asked))
        z_ref = torch.stack([self._encode_references(per_prompt[asked.index(group)], side) for group in groups])
        reference_text = self._encode_text([caption for _, caption in groups])
        group_of_prompt = None if len(groups) in (1, len(prompts)) else [groups.index(one) for one in asked]
        text = self._encode_text(prompts).repeat_interleave(num_images_per_prompt, dim=0)
        empty = self._encode_text([""]).expand_as(text)
        conditions = torch.cat([empty, empty, text])

        count = len(prompts) * num_images_per_prompt
        factor = vae_scale(self.vae)
        shape = (count, self.base_unet.config.in_channels, height // factor, width // factor)
        latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=text.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        latents = latents * self.scheduler.init_noise_sigma

        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            noise_seed = step if reference_noise == "fresh" else 0
            features = self._read_references(z_ref, t, reference_text, noise_seed)
            if group_of_prompt is not None:
                features = {name: f[group_of_prompt] for name, f in features.items()}
            # One batch: e_uncond, which has no references, then e_im and e_text_im, which share theirs.
            projected = self.model.project(features, plain=count, branches=2)
            e_uncond, e_im, e_text_im = self.model(
                latents.repeat(3, 1, 1, 1), t.expand(3 * count), conditions, projected
            ).chunk(3)
            guided = image_text_guidance(e_uncond, e_im, e_text_im, image_guidance, text_guidance)
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]

        images = torch.cat([decode_latents(self.vae, one) for one in latents.split(1)])  # one at a time: memory
        return ImagePipelineOutput(images=to_images(images) if output_type == "pil" else images)

    def _read_references(self, z_ref: Tensor, t: Tensor, text: Tensor, noise_seed: int) -> dict[str, Tensor]:
        """One Reference-UNet pass. z_ref: (P, K, 4, h, w), P groups -> layer name -> (P, K, N, C)."""
        if self.config.reference_timestep is not None:
            t = torch.full_like(t, self.config.reference_timestep)
        generator = torch.Generator().manual_seed(noise_seed)
        noise = torch.randn(z_ref.shape[1:], generator=generator).to(z_ref).expand_as(z_ref)
        alpha, sigma = diffusion.alpha_sigma(self.scheduler.alphas_cumprod, t.view(1).long())
        z_ref_t = diffusion.add_noise(z_ref, noise, alpha.to(z_ref), sigma.to(z_ref))
        return self.model.encode_reference(z_ref_t, t.expand(len(z_ref)), text)

    def _references_of(self, prompts: list[str], references: Sequence) -> list[list[Image.Image]]:
        if not references or any(not one for one in references if not isinstance(one, Image.Image)):
            raise InputError("a prompt without references: give at least one picture of the subject")
        shared = isinstance(references[0], Image.Image)
        per_prompt = [list(references)] * len(prompts) if shared else [list(one) for one in references]
        if len(per_prompt) != len(prompts):
            raise InputError(f"{len(prompts)} prompts but reference lists for {len(per_prompt)}")
        if len({len(one) for one in per_prompt}) > 1:
            raise InputError("all prompts of a call must have equally many references")
        return per_prompt

    def _encode_references(self, pictures: list[Image.Image], side: int) -> Tensor:
        """(K, 4, h, h), scaled latents of the references on white squares; RSA does not ask for the image's shape."""
        tensors = [to_tensor(reference_picture(cut_out(picture), side)) for picture in pictures]
        return torch.cat([encode_images(self.vae, one[None].to(self._execution_device)) for one in tensors])

    def _encode_text(self, texts: list[str]) -> Tensor:
        return self.text_encoder(tokenize(self.tokenizer, texts).to(self._execution_device))[0]

    def _check_memory(self, prompts: int, references: int, images: int, side: int) -> None:
        """Refuse before the first step what will not fit, by count: all features, the pass that makes them (its skip
        connections, and some 40 tensors of the widest layer), and one RSA layer's outputs for each reference."""
        factor, levels, sizes = vae_scale(self.vae), len(self.base_unet.config.block_out_channels), []
        for name in self.model.layers:
            kind, part = name.split(".")[:2]
            index = int(part) if part.isdigit() else 0
            depth = {"down_blocks": index, "mid_block": levels - 1, "up_blocks": levels - 1 - index}[kind]
            channels = self.base_unet.get_submodule(name).to_q.in_features
            sizes.append((side // (factor * 2**depth)) ** 2 * channels)
        per_reference = 2 * sum(sizes) + (2 * images + 40) * max(sizes)
        needed = prompts * references * per_reference * self.base_unet.dtype.itemsize
        device = self._execution_device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if needed > free:
            raise InputError(
                f"{references} references for {prompts} prompts x {images} images need about {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free on {device}: give fewer references, prompts or images at a time"
            )
