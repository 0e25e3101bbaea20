"""References seen by a CLIP image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from pig.data.schema import Batch
from pig.data.transforms import WHITE, Colour, reference_picture, to_tensor
from pig.errors import InputError
from pig.models.backbone import sent
from pig.models.encoders import OPENAI_MEAN, OPENAI_STD, load_transformer
from pig.models.names import TOYWORLD, resolve
from pig.models.weights import weights_digest


def load_vision(name: str | Path, digest: str | None = None) -> tuple[CLIPVisionModelWithProjection, str]:
    """The image tower of a CLIP in transformers' format (a folder, a hub id, or `toyworld`), and its weights' digest.

    digest: of the weights that it must have, as `weights_digest` gives it.

    Raises:
        InputError: it cannot be loaded, or has other weights.
    """
    vision = load_transformer(CLIPVisionModelWithProjection, resolve(name, "clip")).eval()
    found = weights_digest(vision)
    if digest not in (None, found):
        raise InputError(
            f"the image encoder {str(name)!r} is not the one that the model was trained on ({found[:12]}, wanted is "
            f"{str(digest)[:12]})"
        )
    return vision, found


def vision_for(base: str, named: str | None, otherwise: str) -> str:
    """The encoder that is named; else the toy world's for the toy world's base model; else another."""
    return named or (TOYWORLD if base == TOYWORLD else otherwise)


def look(vision: CLIPVisionModelWithProjection, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder makes of pictures.

    Args:
        pictures: (N, 3, H, W) in [-1, 1], square.

    Returns:
        The global features, (N, E), and the last layer's tokens, the [CLS] token first, (N, M, V).
    """
    side = vision.config.image_size
    if pictures.shape[-2:] != (side, side):
        pictures = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (sent(torch.tensor(one).view(3, 1, 1), pictures.device) for one in (OPENAI_MEAN, OPENAI_STD))
    seen = vision(pixel_values=((pictures.float() / 2 + 0.5 - mean) / std).to(vision.dtype))
    return seen.image_embeds, seen.last_hidden_state


def look_at_references(
    vision: CLIPVisionModelWithProjection, references: Sequence[Sequence[Image.Image]], background: Colour = WHITE
) -> tuple[Tensor, Tensor]:
    """`look` at the references of P prompts, equally many RGBA cut-outs of each, every picture once.

    Each is cropped to its object, on a square of one colour.

    Returns:
        (P, N, E) and (P, N, M, V).
    """
    cutouts = list({id(one): one for of in references for one in of}.values())
    squares = [to_tensor(reference_picture(one, vision.config.image_size, background)) for one in cutouts]
    embeds, tokens = look(vision, torch.stack(squares).to(vision.device))
    row = {id(one): number for number, one in enumerate(cutouts)}
    rows = torch.tensor([[row[id(one)] for one in of] for of in references], device=embeds.device)
    return embeds[rows], tokens[rows]


def pictures_of(batch: Batch) -> Tensor:
    """The references of a batch as pixels, (B, K, 3, H, W).

    Raises:
        InputError: there are none, or only what the VAE has made of them.
    """
    references = batch.references()
    if references.shape[2] != 3:
        raise InputError("this method sees the references' pixels: encode the triplets without --variants")
    return references
