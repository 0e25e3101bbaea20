"""Stage 3: from the object's phrase to its mask in the picture, by one of three ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from data_gen.config import MasksConfig
from data_gen.samples import Report, batches, read_samples, save_png, write_lines
from pig.data.transforms import load_image, reference_picture
from pig.models.backbone import half_on
from pig.models.encoders import load_clip
from pig.models.segmenters import (
    automatic_masks,
    best_boxes,
    encode,
    is_background,
    load_detector,
    load_sam,
    masks_for,
)

DONE = "masks.jsonl"


@dataclass(frozen=True)
class Found:
    """mask: (H, W) bool, or None where the phrase was not found; score: how sure, by the way's own measure."""

    mask: np.ndarray | None
    score: float


NOTHING = Found(None, 0.0)


class Segmenter(Protocol):
    def find(self, images: Sequence[Image.Image], phrases: Sequence[str]) -> list[Found]:
        """The mask of each phrase in its picture."""


def make_segmenter(config: MasksConfig, device: str) -> Segmenter:
    ways: dict[str, Any] = {"automatic": AutomaticMasks, "grounded": GroundedMasks, "sam3": Sam3Masks}
    return ways[config.method](config, device)


class AutomaticMasks:
    """SAM's automatic masks; of these the one whose cut-out CLIP finds most like the phrase. Needs no detector."""

    def __init__(self, config: MasksConfig, device: str) -> None:
        self.sam = BatchedSam(config, device)
        self.clip = load_clip(str(config.clip), device)
        self.settings = {
            "points_per_side": config.points_per_side,
            "pred_iou_thresh": config.pred_iou_thresh,
            "stability_score_thresh": config.stability_score_thresh,
        }

    def find(self, images: Sequence[Image.Image], phrases: Sequence[str]) -> list[Found]:
        arrays = [np.asarray(image) for image in images]
        features = self.sam.encode(arrays)
        texts = self.clip.texts([f"a photo of a {phrase}" for phrase in phrases])
        found = []
        for array, feature, text in zip(arrays, features, texts, strict=True):
            masks = [mask.mask for mask in automatic_masks(self.sam.model, feature[None], array, **self.settings)]
            # CLIP alone falls for the hole that an object leaves in its background.
            masks = [mask for mask in masks if mask.any() and not is_background(mask)]
            if masks:
                scores = self.clip.images([cut(array, mask) for mask in masks]) @ text
                best = int(scores.argmax())
                found.append(Found(masks[best], float(scores[best])))
            else:
                found.append(NOTHING)
        return found


class GroundedMasks:
    """Grounding DINO finds the phrase's box, SAM the mask in it (the authors' release)."""

    def __init__(self, config: MasksConfig, device: str) -> None:
        from transformers import AutoModelForZeroShotObjectDetection

        self.detector = load_detector(AutoModelForZeroShotObjectDetection, str(config.detector), device)
        self.sam = BatchedSam(config, device)
        self.threshold = config.threshold

    def find(self, images: Sequence[Image.Image], phrases: Sequence[str]) -> list[Found]:
        boxes = best_boxes(*self.detector, images, phrases, self.threshold)
        arrays = [np.asarray(image) for image in images]
        found = []
        for box, array, feature in zip(boxes, arrays, self.sam.encode(arrays), strict=True):
            if box is None:
                found.append(NOTHING)
            else:
                masks = masks_for(self.sam.model, feature[None], array.shape[:2], box=box[0])
                found.append(Found(masks[0].mask, box[1]))
        return found


class Sam3Masks:
    """SAM 3, prompted by the phrase itself. Its weights need Meta's consent on the hub."""

    def __init__(self, config: MasksConfig, device: str) -> None:
        from transformers import Sam3Model

        self.model, self.processor = load_detector(Sam3Model, str(config.detector), device)
        self.threshold = config.threshold

    @torch.no_grad()
    def find(self, images: Sequence[Image.Image], phrases: Sequence[str]) -> list[Found]:
        inputs = self.processor(images=list(images), text=list(phrases), return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        sizes = [(image.height, image.width) for image in images]
        found = []
        for result in self.processor.post_process_instance_segmentation(
            outputs, threshold=self.threshold, target_sizes=sizes
        ):
            if len(result["scores"]):
                best = int(result["scores"].argmax())
                found.append(Found(result["masks"][best].bool().cpu().numpy(), float(result["scores"][best])))
            else:
                found.append(NOTHING)
        return found


class BatchedSam:
    """SAM and its encoder's settings: bf16 on GPUs; compiled for one shape of batch, to which batches are filled up."""

    def __init__(self, config: MasksConfig, device: str) -> None:
        self.model = load_sam(str(config.sam), device)
        self.dtype = half_on(device)
        self.fill_up_to = config.batch_size if config.compile else 0
        if config.compile:
            self.model.image_encoder.compile(dynamic=False)

    def encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        filled = [*images, *[images[-1]] * (self.fill_up_to - len(images))]
        return encode(self.model, filled, self.dtype)[: len(images)]


def cut(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """What the mask shows, alone on white and filling the frame."""
    cutout = Image.fromarray(image)
    cutout.putalpha(Image.fromarray(mask))
    return reference_picture(cutout, max(image.shape[:2]))


def find_masks(folder: Path, segmenter: Segmenter, config: MasksConfig, report: Report) -> None:
    """`images/KEY.png` -> `masks/KEY.png` (0 or 255; nothing where the phrase was not found) and `masks.jsonl`."""
    rows = []
    for batch in batches(read_samples(folder), config.batch_size):
        images = [load_image(folder / "images" / f"{sample.key}.png").convert("RGB") for sample in batch]
        for sample, found in zip(batch, segmenter.find(images, [sample.object for sample in batch]), strict=True):
            if found.mask is not None:
                mask = Image.fromarray(found.mask.astype(np.uint8) * 255)
                save_png(mask, folder / "masks" / f"{sample.key}.png")
            rows.append({"key": sample.key, "found": found.mask is not None, "mask_score": round(found.score, 4)})
        report(len(batch))
    write_lines(folder / DONE, rows)
