"""Segment Anything by the real `segment_anything` package: its models from a name, and masks for many pictures.

SAM (arXiv 2304.02643) has an image encoder, costly and run once a picture, and a light decoder that answers prompts
(points, boxes) with masks. The encoder runs here over batches of pictures; the package's own predictor and automatic
mask generator then answer from the stored features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor
from transformers import AutoProcessor

from pig.errors import InputError
from pig.models.names import resolve

META_SIZES = ("vit_h", "vit_l", "vit_b")
SAM_FORMS = "Give `toyworld`, a folder with config.json and model.safetensors, or Meta's sam_vit_h_4b8939.pth"


@dataclass(frozen=True)
class SamSize:
    """What fixes a SAM's shape, for sizes other than Meta's three. image: side in pixels of what the encoder sees."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    prompt_width: int


def build_sam(size: SamSize) -> Sam:
    """A SAM with random weights and global attention throughout."""
    grid = size.image // size.patch
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=size.image,
            patch_size=size.patch,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            out_chans=size.prompt_width,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=size.prompt_width,
            image_embedding_size=(grid, grid),
            input_image_size=(size.image, size.image),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=size.prompt_width,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=size.prompt_width, num_heads=8, mlp_dim=4 * size.prompt_width
            ),
            num_multimask_outputs=3,
            iou_head_hidden_dim=size.prompt_width,
        ),
    )


def save_sam(sam: Sam, size: SamSize, folder: Path) -> None:
    """`config.json` and half precision `model.safetensors`, as `load_sam` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(size), indent=1), encoding="utf-8")
    weights = {name: weight.detach().half().contiguous() for name, weight in sam.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def load_sam(name: str | Path, device: torch.device | str = "cpu") -> Sam:
    """A SAM ready to predict.

    Args:
        name: `toyworld` (the embedded one), a folder that `save_sam` wrote, or one of Meta's files, whose name says
            its size (`sam_vit_h_4b8939.pth`); its tensors are read without running the pickle's code.

    Raises:
        InputError: it is none of these, or cannot be read.
    """
    path, kind = find_sam(name)
    try:
        if kind is not None:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            sam = sam_model_registry[kind]()
        else:
            weights = load_file(path / "model.safetensors")
            sam = build_sam(SamSize(**json.loads((path / "config.json").read_text(encoding="utf-8"))))
        sam.load_state_dict(weights)
    except Exception as error:
        raise InputError(f"cannot load a SAM from {path}: {str(error).splitlines()[0]}. {SAM_FORMS}") from error
    return sam.to(device).eval()


def find_sam(name: str | Path) -> tuple[Path, str | None]:
    """Where a SAM lies, and for one of Meta's files its size.

    Raises:
        InputError: there is none.
    """
    path = Path(resolve(name, "sam"))
    if not (path if path.suffix == ".pth" else path / "config.json").is_file():
        raise InputError(f"there is no SAM {str(name)!r}. {SAM_FORMS}")
    if path.suffix != ".pth":
        return path, None
    kind = next((size for size in META_SIZES if size in path.name), None)
    if kind is None:
        raise InputError(f"{path}: the name of a SAM file must say its size, one of {', '.join(META_SIZES)}")
    return path, kind


class EncodedPredictor(SamPredictor):
    """The package's predictor, given features that were computed in a batch; `set_image` then costs nothing."""

    def use(self, features: Tensor, original_size: tuple[int, int]) -> None:
        """features: (1, C, h, w) of `encode`; original_size: (H, W) of the picture."""
        self.prepared = features
        self.original_size = original_size
        self.input_size = self.transform.get_preprocess_shape(*original_size, self.transform.target_length)
        self.features, self.is_image_set = features, True

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        self.use(self.prepared, image.shape[:2])


@torch.no_grad()
def encode(sam: Sam, images: Sequence[np.ndarray], dtype: torch.dtype = torch.float32) -> Tensor:
    """Image features (N, C, h, w), float32, of pictures (H, W, 3) uint8 of any sizes, in one pass of the encoder."""
    transform = SamPredictor(sam).transform
    pixels = []
    for image in images:
        resized = torch.as_tensor(transform.apply_image(image), device=sam.device).permute(2, 0, 1).float()
        pixels.append(sam.preprocess(resized))
    with torch.autocast(sam.device.type, dtype, enabled=dtype != torch.float32):
        return sam.image_encoder(torch.stack(pixels)).float()


@dataclass(frozen=True)
class Mask:
    """mask: (H, W) bool. predicted_iou: SAM's own estimate of its quality."""

    mask: np.ndarray
    predicted_iou: float


def masks_for(
    sam: Sam,
    features: Tensor,
    size: tuple[int, int],
    *,
    box: Sequence[float] | None = None,
    point: Sequence[float] | None = None,
) -> list[Mask]:
    """SAM's three masks for a box (x0, y0, x1, y1) or a point (x, y) on the object, or both, in pixels of a picture of
    `size` (H, W); the best first."""
    predictor = EncodedPredictor(sam)
    predictor.use(features, size)
    masks, quality, _ = predictor.predict(
        box=None if box is None else np.asarray(box, dtype=np.float32),
        point_coords=None if point is None else np.asarray([point], dtype=np.float32),
        point_labels=None if point is None else np.ones(1),
        multimask_output=True,
    )
    found = [Mask(mask, float(iou)) for mask, iou in zip(masks, quality, strict=True)]
    return sorted(found, key=lambda mask: -mask.predicted_iou)


def is_background(mask: np.ndarray) -> bool:
    """Whether a mask touches three sides of the picture or more."""
    return sum(bool(side.any()) for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1])) >= 3


def load_detector(kind: Any, name: str, device: str) -> tuple[Any, Any]:
    """A model of transformers' class `kind`, and its processor.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        return kind.from_pretrained(name).to(device).eval(), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"cannot load the detector {name!r}: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def best_boxes(
    model: Any, processor: Any, images: Sequence[Image.Image], phrases: Sequence[str], threshold: float
) -> list[tuple[list[float], float] | None]:
    """Grounding DINO's surest box (x0, y0, x1, y1; pixels) for each phrase in its picture, and how sure; None: none."""
    prompts = [phrase.lower().strip(". ") + "." for phrase in phrases]  # the form it was trained on
    inputs = processor(images=list(images), text=prompts, return_tensors="pt", padding=True)
    found = processor.post_process_grounded_object_detection(
        model(**inputs.to(model.device)),
        inputs.input_ids,
        threshold=threshold,
        text_threshold=threshold,
        target_sizes=[(image.height, image.width) for image in images],
    )
    surest = [int(one["scores"].argmax()) if len(one["scores"]) else None for one in found]
    return [
        None if best is None else (one["boxes"][best].tolist(), float(one["scores"][best]))
        for one, best in zip(found, surest, strict=True)
    ]


def automatic_masks(sam: Sam, features: Tensor, image: np.ndarray, **settings: Any) -> list[Mask]:
    """SAM's automatic masks (section 5, "everything"): a grid of points, filtered and freed of duplicates.

    `settings` go to the package's `SamAutomaticMaskGenerator` (`points_per_side`, `pred_iou_thresh`, ...).
    """
    generator = SamAutomaticMaskGenerator(sam, **settings)
    generator.predictor = EncodedPredictor(sam)
    generator.predictor.prepared = features
    return [Mask(found["segmentation"], found["predicted_iou"]) for found in generator.generate(image)]
