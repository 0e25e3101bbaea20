"""Networks that look at pictures and texts to score them: CLIP (by transformers or open_clip) and DINO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer, ViTModel

from pig.errors import InputError
from pig.models.backbone import resolve, tokenize

OPEN_CLIP = "open_clip:"


class Clip(Protocol):
    """Both towers of a CLIP: features of unit length."""

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D), unit length."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D), unit length."""


def load_clip(name: str | Path, device: torch.device | str = "cpu") -> Clip:
    """A CLIP by name.

    Args:
        name: `toyworld` (the embedded one); a folder or hub id in transformers' format; or in open_clip's,
            `open_clip:ViT-B-32-quickgelu/openai`, `open_clip:hf-hub:ID`, `open_clip:local-dir:FOLDER`.

    Raises:
        InputError: it cannot be loaded.
    """
    if str(name).startswith(OPEN_CLIP):
        return OpenClipEncoder(str(name).removeprefix(OPEN_CLIP), device)
    return ClipEncoder(resolve(name, "clip"), device)


class ClipEncoder:
    """CLIP in transformers' format: shorter side to S (bicubic), centre crop S, the checkpoint's mean and deviation."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.model = _load(CLIPModel, folder).to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        self.mean, self.std = processor.image_mean, processor.image_std
        self.size = self.model.config.vision_config.image_size

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D), unit length."""
        pixels = preprocess(pictures, resize=self.size, crop=self.size, mean=self.mean, std=self.std)
        return F.normalize(self.model.get_image_features(pixels.to(self.model.device)).pooler_output, dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D), unit length."""
        ids = tokenize(self.tokenizer, texts).to(self.model.device)
        return F.normalize(self.model.get_text_features(ids).pooler_output, dim=-1).cpu()


class OpenClipEncoder:
    """CLIP in open_clip's format, with the preprocessing that its checkpoint names."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        model, _, pretrained = name.partition("/") if ":" not in name else (name, "", "")
        import open_clip  # slow to import, and few need it

        try:
            loaded, self.preprocess = open_clip.create_model_from_pretrained(model, pretrained or None, device=device)
            self.tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:  # open_clip raises many kinds
            raise InputError(f"cannot load a CLIP from {OPEN_CLIP}{name}: {str(error).splitlines()[0]}") from error
        self.model, self.device = loaded.eval(), device

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D), unit length."""
        pixels = torch.stack([self.preprocess(picture.convert("RGB")) for picture in pictures])
        return self.model.encode_image(pixels.to(self.device), normalize=True).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D), unit length."""
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=True).cpu()


class DinoEncoder:
    """A DINO ViT in transformers' format: shorter side to 256/224 S (bicubic), centre crop S; the [CLS] token."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        folder = resolve(folder, "dino")
        self.model = _load(ViTModel, folder, add_pooling_layer=False).to(device).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
        self.mean, self.std = processor.image_mean, processor.image_std
        self.size = self.model.config.image_size

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D), unit length."""
        resize = round(self.size * 256 / 224)
        pixels = preprocess(pictures, resize=resize, crop=self.size, mean=self.mean, std=self.std)
        return F.normalize(self.model(pixels.to(self.model.device)).last_hidden_state[:, 0], dim=-1).cpu()


def _load(kind: Any, folder: str | Path, **options: object) -> Any:
    try:
        return kind.from_pretrained(folder, dtype=torch.float32, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot load a {kind.__name__} from {str(folder)!r}: {str(error).splitlines()[0]}") from error


def preprocess(
    pictures: Sequence[Image.Image], *, resize: int, crop: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """(N, 3, crop, crop): shorter side to `resize` by PIL's bicubic filter, centre crop, standardised."""
    tensors = []
    for picture in pictures:
        resized = tv.resize(picture.convert("RGB"), [resize], interpolation=tv.InterpolationMode.BICUBIC)
        tensors.append(tv.to_dtype(tv.pil_to_tensor(tv.center_crop(resized, [crop, crop])), torch.float32, scale=True))
    return tv.normalize(torch.stack(tensors), list(mean), list(std))
