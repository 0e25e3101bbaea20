"""Networks that look at pictures and texts to score them: CLIP (by transformers or open_clip), DINO (or timm).

Each says in `identity` what it is: the sha256 of its weights, its activation, and how it prepares a picture.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv
from transformers import CLIPModel, CLIPTokenizer, ViTModel
from transformers.utils import logging as transformers_logging

from pig.errors import InputError
from pig.files import sha256_of
from pig.models.names import resolve
from pig.models.weights import weights_digest

OPEN_CLIP, TIMM = "open_clip:", "timm:"
BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)
FILTERS = {BILINEAR: tv.InterpolationMode.BILINEAR, BICUBIC: tv.InterpolationMode.BICUBIC}
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (B, L) long; longer texts are cut at the tokenizer's `model_max_length`."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


class ImageEncoder(ABC):
    """`identity`: all that decides its features: `network`, `weights` (sha256), `activation`, `preprocessing`.

    `preprocessing`: what `prepare` does, where the library does not bring its own.
    """

    identity: dict[str, Any]
    preprocessing: Preprocessing

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D) on the CPU, unit length."""
        return self.embed(torch.stack([self.prepare(picture) for picture in pictures]))

    def prepare(self, picture: Image.Image) -> Tensor:
        """What of a picture the network needs, (3, S, S); may run in a thread of its own."""
        return self.preprocessing.prepare(picture)

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """(N, D) on the CPU, unit length, of N prepared pictures."""


class Clip(ImageEncoder):
    """Both towers of a CLIP."""

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) on the CPU, unit length."""


@dataclass(frozen=True)
class Preprocessing:
    """Picture -> (3, crop, crop) uint8 -> standardised.

    resize: the shorter side's length before the centre crop; None: the whole picture is squeezed into the square.
    filter: PIL's (2 bilinear, 3 bicubic). floor: of an odd margin the smaller half lies left and above, as in
    transformers; else halves are rounded to even, as in torchvision.
    """

    resize: int | None
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: int = BICUBIC
    floor: bool = False

    def prepare(self, picture: Image.Image) -> Tensor:
        """(3, crop, crop) uint8"""
        square = [self.crop, self.crop]
        to = square if self.resize is None else [self.resize]
        resized = tv.resize(picture.convert("RGB"), to, interpolation=FILTERS[self.filter])
        if not self.floor:
            return tv.pil_to_tensor(tv.center_crop(resized, square))
        left, top = (resized.width - self.crop) // 2, (resized.height - self.crop) // 2
        return tv.pil_to_tensor(resized.crop((left, top, left + self.crop, top + self.crop)))

    def standardise(self, pixels: Tensor) -> Tensor:
        """(N, 3, crop, crop) uint8 -> float32"""
        return tv.normalize(tv.to_dtype(pixels, torch.float32, scale=True), list(self.mean), list(self.std))


def load_clip(name: str | Path, device: torch.device | str = "cpu") -> Clip:
    """A CLIP by name.

    Args:
        name: `toyworld` (the embedded one); a folder in transformers' or open_clip's format; a hub id (transformers);
            or in open_clip's names, `open_clip:ViT-B-32-quickgelu/openai`, `open_clip:hf-hub:ID`.

    Raises:
        InputError: it cannot be loaded, or holds OpenAI's weights without the QuickGELU that they were trained with.
    """
    if str(name).startswith(OPEN_CLIP):
        return OpenClipEncoder(str(name).removeprefix(OPEN_CLIP), device)
    folder = resolve(name, "clip")
    if (Path(folder) / "open_clip_config.json").is_file():
        return OpenClipEncoder(f"local-dir:{folder}", device)
    return ClipEncoder(folder, device)


def load_dino(name: str | Path, device: torch.device | str = "cpu", *, crop: bool = True) -> ImageEncoder:
    """A DINO ViT by name; its feature is the last layer's [CLS] token after the final norm.

    Args:
        name: `toyworld` (the embedded one); a folder in transformers' or timm's format; a hub id (transformers); or
            in timm's names, `timm:vit_small_patch16_224.dino`.
        crop: shorter side to 256/224 of the network's size S (bicubic), then the centre crop S. Otherwise the
            picture is squeezed to S x S, as transformers' own processor does, by the filter which that names.

    Raises:
        InputError: it cannot be loaded.
    """
    if str(name).startswith(TIMM):
        return TimmDinoEncoder(str(name).removeprefix(TIMM), device, crop)
    folder = resolve(name, "dino")
    if "architecture" in _json(folder, "config.json"):
        return TimmDinoEncoder(f"local-dir:{folder}", device, crop)
    return DinoEncoder(folder, device, crop=crop)


class ClipEncoder(Clip):
    """CLIP in transformers' format: shorter side to S (bicubic), centre crop S, the checkpoint's mean and deviation;
    pixel by pixel what transformers' own processor makes of it by PIL (by torchvision it rounds otherwise)."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.model = load_transformer(CLIPModel, folder).to(device).eval()
        self.tokenizer = load_transformer(CLIPTokenizer, folder)
        known = self.model.config.text_config.vocab_size
        if not 0.9 * known <= len(self.tokenizer) <= known:
            raise InputError(
                f"{folder}: {len(self.tokenizer)} tokens, {known} expected: a file of the tokenizer is missing"
            )
        size = self.model.config.vision_config.image_size
        processor = _processor(folder)
        mean, std = processor.get("image_mean", OPENAI_MEAN), processor.get("image_std", OPENAI_STD)
        self.preprocessing = Preprocessing(size, size, tuple(mean), tuple(std), floor=True)
        words = sorted(self.tokenizer.get_vocab().items())
        self.identity = identity_of(self.model, self.model.config.model_type, asdict(self.preprocessing), words)
        if is_openai_name(str(folder)):
            demand_quick_gelu(self.identity, str(folder), 'set "hidden_act": "quick_gelu" in both parts of config.json')

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        pixels = self.preprocessing.standardise(pixels.to(self.model.device))
        return F.normalize(self.model.get_image_features(pixels).pooler_output, dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        ids = tokenize(self.tokenizer, texts).to(self.model.device)
        return F.normalize(self.model.get_text_features(ids).pooler_output, dim=-1).cpu()


class OpenClipEncoder(Clip):
    """CLIP in open_clip's format, with the preprocessing that its checkpoint names."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        model, _, pretrained = name.partition("/") if ":" not in name else (name, "", "")
        import open_clip  # slow to import, and few need it

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "QuickGELU mismatch")  # an error below
                loaded, self.preprocess = open_clip.create_model_from_pretrained(
                    model, pretrained or None, device=device
                )
            self.tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:  # open_clip raises many kinds
            raise InputError(f"cannot load a CLIP from {OPEN_CLIP}{name}: {str(error).splitlines()[0]}") from error
        self.model, self.device = loaded.eval(), device
        words = self.tokenizer(["a photograph, of Words 123"]).tolist()
        self.identity = identity_of(self.model, model.partition(":")[0], str(self.preprocess), words)
        if is_openai_name(name) or is_openai_file(pretrained):
            demand_quick_gelu(self.identity, f"{OPEN_CLIP}{name}", "take the model's name that ends in -quickgelu")

    def prepare(self, picture: Image.Image) -> Tensor:
        return self.preprocess(picture.convert("RGB"))

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(self.device), normalize=True).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=True).cpu()


class DinoEncoder(ImageEncoder):
    """A DINO ViT in transformers' format; see `load_dino`."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu", *, crop: bool = True) -> None:
        folder = resolve(folder, "dino")
        self.model = load_transformer(ViTModel, folder, add_pooling_layer=False).to(device).eval()
        processor = _processor(folder)
        mean, std = processor.get("image_mean", IMAGENET_MEAN), processor.get("image_std", IMAGENET_STD)
        self.preprocessing = _dino_preprocessing(
            self.model.config.image_size, crop, tuple(mean), tuple(std), processor.get("resample", BILINEAR)
        )
        patch = self.model.config.patch_size
        self.identity = identity_of(self.model, f"ViT, patches of {patch}", asdict(self.preprocessing))

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        pixels = self.preprocessing.standardise(pixels.to(self.model.device))
        return F.normalize(self.model(pixels).last_hidden_state[:, 0], dim=-1).cpu()


class TimmDinoEncoder(ImageEncoder):
    """A DINO ViT in timm's format; see `load_dino`."""

    def __init__(self, name: str, device: torch.device | str = "cpu", crop: bool = True) -> None:
        import timm  # slow to import, and few need it

        try:
            self.model = cast(Any, timm.create_model(name, pretrained=True, num_classes=0).to(device).eval())
        except Exception as error:  # timm raises many kinds
            raise InputError(f"cannot load a DINO from {TIMM}{name}: {str(error).splitlines()[0]}") from error
        config = self.model.pretrained_cfg
        mean, std, size = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD), config["input_size"][-1]
        self.preprocessing = _dino_preprocessing(size, crop, tuple(mean), tuple(std), BICUBIC)
        self.device, patch = device, self.model.patch_embed.patch_size[0]
        self.identity = identity_of(self.model, f"ViT, patches of {patch}", asdict(self.preprocessing))

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        pixels = self.preprocessing.standardise(pixels.to(self.device))
        return F.normalize(self.model.forward_features(pixels)[:, 0], dim=-1).cpu()


def _dino_preprocessing(
    size: int, crop: bool, mean: tuple[float, ...], std: tuple[float, ...], own_filter: int
) -> Preprocessing:
    if crop:
        return Preprocessing(round(size * 256 / 224), size, mean, std)
    return Preprocessing(None, size, mean, std, int(own_filter))


def identity_of(model: nn.Module, network: str, preprocessing: Any, words: Any = None) -> dict[str, Any]:
    """The weights' sha256 does not depend on the file's format or on the device. words: what shows the tokenizer."""
    names = (type(part).__name__ for part in model.modules())
    activations = {"QuickGELU" if "QuickGELU" in name else "GELU" for name in names if "GELU" in name}
    found = {
        "network": network,
        "weights": weights_digest(model),
        "activation": " and ".join(sorted(activations)),
        "preprocessing": preprocessing,
    }
    return found if words is None else {**found, "words": hashlib.sha256(repr(words).encode()).hexdigest()}


def demand_quick_gelu(identity: dict[str, Any], name: str, remedy: str) -> None:
    if identity["activation"] != "QuickGELU":
        raise InputError(
            f"{name} holds OpenAI's weights, trained with QuickGELU, under {identity['activation']}: {remedy}"
        )


def is_openai_name(name: str) -> bool:
    """Of a hub id or tag by any part of it; of a folder by its own name or one such as `models--openai--clip-...`."""
    path = Path(name.removeprefix("local-dir:"))
    if not path.exists():
        return "openai" in name.lower()
    path = path.resolve()
    return "openai" in path.name.lower() or re.search(r"openai[\W_]+clip", str(path).lower()) is not None


def is_openai_file(path: str) -> bool:
    """Whether a file is one that OpenAI released, by the sha256 that its address carries."""
    if not Path(path).is_file():
        return False
    import open_clip

    found = sha256_of(Path(path))
    urls = (open_clip.get_pretrained_url(model, "openai") or "" for model in open_clip.list_models())
    return any(found in url for url in urls)


def load_transformer(kind: Any, folder: str | Path, **options: object) -> Any:
    """
    Raises:
        InputError: it cannot be loaded, or lacks weights. (Weights too many, such as those of the text tower where the
            image tower is wanted, are as it should be: transformers' report of them is left out.)
    """
    what = f"cannot load a {kind.__name__} from {str(folder)!r}"
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        if kind is CLIPTokenizer:
            return kind.from_pretrained(folder)
        loaded, told = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise InputError(f"{what}: {str(error).splitlines()[0]}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if absent := sorted(told["missing_keys"]) + sorted(str(one) for one in told["mismatched_keys"]):
        raise InputError(f"{what}: it has no weights for {absent[0]} and {len(absent) - 1} more, which would be random")
    return loaded


def _processor(folder: str | Path) -> dict[str, Any]:
    """What a model's image processor is set to, wherever transformers has put it; {} where nothing is said."""
    return _json(folder, "preprocessor_config.json") or _json(folder, "processor_config.json").get(
        "image_processor", {}
    )


def _json(folder: str | Path, name: str) -> dict[str, Any]:
    """A JSON file of a model, on disk or on the hub; {} where there is none."""
    path = Path(folder) / name
    if not path.is_file() and not Path(folder).exists():
        from transformers.utils import cached_file

        try:
            path = Path(cached_file(str(folder), name) or path)
        except OSError:  # no such file or model: the loading of the weights will say so
            return {}
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
