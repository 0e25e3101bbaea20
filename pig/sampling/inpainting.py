"""Draw the subject into a part of a picture: inpainting (BootPIG, arXiv 2401.13974, appendix F), and editing (EZIGen,
arXiv 2409.08091, section 3.4)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pig.data.transforms import to_mask, to_tensor
from pig.errors import InputError
from pig.models.backbone import encode_images, vae_scale
from pig.sampling.loop import noised


class KnownRegion:
    """What of a picture shall stay: its latents are blended in at every step, its pixels at the end.

    Args:
        image: RGB; its size is that of what will be drawn.
        mask: of the same size; white (255) is drawn anew, black stays as it is, grey is mixed.
        noise: (B, 4, h, w), the noise that the drawing starts from.

    Raises:
        InputError: the mask has another size, or nothing is white in it.
    """

    def __init__(self, vae: AutoencoderKL, image: Image.Image, mask: Image.Image, noise: Tensor) -> None:
        check_mask(image, mask)
        self.noise = noise
        self.path: Mapping[int, Tensor] | None = None
        self.pixels = to_tensor(image)[None].to(noise.device)
        self.open = ((to_tensor(to_mask(mask))[None, :1] + 1) / 2).to(noise.device)  # (1, 1, H, W): 1 is drawn
        self.z_0 = encode_images(vae, self.pixels).to(noise.dtype)
        # A latent is drawn as soon as one of its pixels is.
        self.open_latents = F.max_pool2d(self.open, vae_scale(vae)).to(noise.dtype)

    def on_path(self, path: Mapping[int, Tensor]) -> KnownRegion:
        """The same, its noisy latents taken from an inversion: timestep -> (1, 4, h, w)."""
        own = copy.copy(self)
        own.path = path
        return own

    def at(self, scheduler: SchedulerMixin, t: Tensor) -> Tensor:
        """The picture's latents at noise level t."""
        if self.path is not None:
            return self.path[int(t)]
        return noised(self.z_0.expand_as(self.noise), self.noise, scheduler, t)

    def blend(self, latents: Tensor, scheduler: SchedulerMixin, t: Tensor | None) -> Tensor:
        """The latents with the known region at noise level t; None: free of noise."""
        known = (self.z_0 if t is None else self.at(scheduler, t)).expand_as(latents)
        return torch.lerp(known, latents, self.open_latents)

    def paste(self, images: Tensor) -> Tensor:
        """The decoded images (B, 3, H, W) with the picture's own pixels where the mask is black."""
        return self.pixels.lerp(images.to(self.pixels), self.open)  # whatever precision drew them


def check_mask(image: Image.Image, mask: Image.Image) -> None:
    if mask.size != image.size:
        raise InputError(f"the inpainting mask is {mask.size}, the picture {image.size}; they must be of one size")
    if to_mask(mask).getbbox() is None:
        raise InputError("the inpainting mask is black all over: paint white what shall be drawn anew")
