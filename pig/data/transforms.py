"""Pictures in and out: loading what users have, cutting out, the paper's augmentation of the reference, tensors."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from pig.errors import InputError, check_named, check_ranges

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
Background = Literal["white", "black", "own"]
LEAST_PIXELS = 16  # of an object
MAX_PIXELS = 80 * 10**6  # below PIL's own limit against decompression bombs; a picture of that size takes 320 MB
# What PIL raises for files that are no pictures, or damaged ones (a broken PNG is a SyntaxError to it).
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def load_image(path: str | Path) -> Image.Image:
    """An upright RGB picture, or RGBA where the file has transparency; grey, CMYK, palette and 16-bit are converted.

    Raises:
        InputError: the file is missing or does not decode.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{path} is {image.width}x{image.height}, more than {MAX_PIXELS // 10**6} megapixels: shrink it"
                )
            image.load()
            if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
                raise InputError(f"{path} holds numbers that are not finite (NaN): draw it again")
            return normalise(image)
    except InputError:
        raise
    except UNDECODABLE as error:
        raise InputError(f"cannot read image {path}: {error}") from error


def is_whole(file: Path) -> bool:
    """Whether a picture is there and can be read."""
    try:
        load_image(file)
    except InputError:
        return False
    return True


def normalise(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation and bring any PIL mode to RGB, or to RGBA where there is transparency."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: PIL's convert would clip instead of scale
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def has_alpha(image: Image.Image) -> bool:
    """Whether the alpha channel says anything: an RGBA picture that is opaque all over says nothing."""
    return image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255)


def to_mask(image: Image.Image) -> Image.Image:
    """A mask (L) of any picture: its brightness, and nothing where it is transparent.

    Raises:
        InputError: a picture of floats, whose range nothing says.
    """
    if image.mode == "F":
        raise InputError("a mask of floating-point numbers: give one of 8 bits, 255 where it counts")
    image = normalise(image)
    grey = image.convert("L")
    return ImageChops.multiply(grey, image.getchannel("A")) if image.mode == "RGBA" else grey


def cut_out(image: Image.Image, mask: Image.Image | None = None) -> Image.Image:
    """RGBA, the object's coverage in the alpha channel: from a mask, else the picture's own alpha, else all of it.

    Raises:
        InputError: the mask has another size, or nothing is left.
    """
    image = normalise(image)
    if mask is not None:
        if mask.size != image.size:
            raise InputError(f"the mask is {mask.size}, its image {image.size}; they must be of one size")
        image = image.convert("RGB")
        image.putalpha(to_mask(mask))
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getbbox() is None:
        raise InputError("the mask (or alpha channel) is empty: no object is left to refer to")
    if (seen := sum(alpha.histogram()[1:])) < LEAST_PIXELS:
        raise InputError(f"the mask (or alpha channel) leaves {seen} pixels: too few to refer to; correct it")
    return image


def crop_to_object(reference: Image.Image) -> Image.Image:
    """Crop an RGBA cut-out to its object (alpha above one half where there is such, else above 0)."""
    alpha = reference.getchannel("A")
    box = alpha.point(lambda value: 255 * (value > 127)).getbbox() or alpha.getbbox()
    return reference.crop(box) if box else reference


def place(
    cropped: Image.Image, size: int, scale: float, x: float = 0.5, y: float = 0.5, background: Colour = WHITE
) -> Image.Image:
    """An RGBA object on a square of `size` pixels, its longer side `scale` of it; (x, y) in [0, 1]: where."""
    ratio = scale * size / max(cropped.size)
    width, height = (max(1, round(side * ratio)) for side in cropped.size)
    # Premultiplied, so that colours under alpha = 0 do not bleed into the edges.
    resized = cropped.convert("RGBa").resize((width, height), Image.Resampling.BICUBIC).convert("RGBA")
    canvas = Image.new("RGB", (size, size), background)
    canvas.paste(resized, (round(x * (size - width)), round(y * (size - height))), resized)
    return canvas


def reference_picture(cutout: Image.Image, size: int, background: Colour = WHITE) -> Image.Image:
    """A reference for generation: box crop, square pad, filling the frame."""
    return place(crop_to_object(cutout), size, scale=1.0, background=background)


@dataclass
class ReferenceAugmentation:
    """What happens to a reference in training (section 4.1): resized, flipped, moved on white; for other methods more.

    Attributes:
        scale: range of the object's longer side, as a share of the frame; (1, 1) keeps it filling the frame.
        flip: probability of a horizontal flip.
        jitter: probability of a colour jitter of (.2, .2, .2, .05) (authors' release: 0.1).
        erasing: probability that a white box of 2 to 25 % of the area covers a part (authors' release: 0.4).
        rotation: by up to so many degrees, either way.
        crop: of each side of the object, up to this share is cut off.
        background: `white`, `black`, or `own`: what is around the object in the target, on black.
    """

    scale: tuple[float, float] = (0.4, 1.0)
    flip: float = 0.5
    jitter: float = 0.0
    erasing: float = 0.0
    rotation: float = 0.0
    crop: float = 0.0
    background: Background = "white"

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"augmentation.scale must satisfy 0 < low <= high <= 1, got {self.scale}")
        for name in ("flip", "jitter", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"augmentation.{name} is a probability, got {getattr(self, name)}")
        check_ranges(**{"augmentation.rotation": (self.rotation, 0, 180), "augmentation.crop": (self.crop, 0, 0.45)})
        check_named("augmentation.background", self.background, get_args(Background))

    def as_json(self) -> dict[str, Any]:
        """Its settings as JSON gives them back, for comparison with those of encoded shards."""
        return json.loads(json.dumps(asdict(self)))

    def __call__(self, reference: Image.Image, target: Image.Image | None, size: int, rng: Generator) -> Image.Image:
        """RGBA cut-out -> RGB square of `size` pixels. target: what it was cut out of; only `own` asks for it."""
        scale, x, y = rng.uniform(*self.scale), rng.random(), rng.random()
        flip, jitter, erasing = rng.random(3) < (self.flip, self.jitter, self.erasing)
        reference = surroundings(reference, target) if self.background == "own" else crop_to_object(reference)
        if self.crop:
            left, top, right, bottom = rng.uniform(0, self.crop, 4)
            width, height = reference.size
            reference = reference.crop(
                (int(left * width), int(top * height), width - int(right * width), height - int(bottom * height))
            )
        if self.rotation:
            turned = reference.convert("RGBa").rotate(
                rng.uniform(-self.rotation, self.rotation), Image.Resampling.BICUBIC, expand=True
            )
            reference = crop_to_object(turned.convert("RGBA"))
        picture = place(reference, size, scale, x, y, WHITE if self.background == "white" else BLACK)
        if flip:
            picture = ImageOps.mirror(picture)
        if jitter:
            from torchvision.transforms.v2 import functional as tv  # seconds, which most commands need not wait

            brightness, contrast, saturation = rng.uniform(0.8, 1.2, 3)
            picture = tv.adjust_brightness(picture, brightness)
            picture = tv.adjust_saturation(tv.adjust_contrast(picture, contrast), saturation)
            picture = tv.adjust_hue(picture, rng.uniform(-0.05, 0.05))
        if erasing:
            area, aspect = rng.uniform(0.02, 0.25) * size**2, np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
            width, height = (min(size, round(side)) for side in ((area * aspect) ** 0.5, (area / aspect) ** 0.5))
            at = (int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1)))
            picture.paste(WHITE, (*at, at[0] + width, at[1] + height))
        return picture


def surroundings(reference: Image.Image, target: Image.Image | None) -> Image.Image:
    """The object's box with what is around it, from the target that it was cut out of."""
    if target is None or reference.size != target.size:
        raise InputError(
            "augmentation.background=own needs the targets' pixels (not encoded shards), and references of their size, "
            "which say where in them the object was"
        )
    alpha = reference.getchannel("A")
    return target.convert("RGBA").crop(alpha.point(lambda value: 255 * (value > 127)).getbbox() or alpha.getbbox())


def target_picture(image: Image.Image, size: int) -> Image.Image:
    """A training target: RGB, shorter side to `size`, centre crop."""
    return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    return to_bytes(image).float() / 127.5 - 1


def to_bytes(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def to_images(tensor: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> B RGB pictures."""
    array = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]
