"""Stage 4: which samples are fit to train on, and if not, why not. Every score is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from data_gen.config import QualityConfig
from data_gen.masks import cut
from data_gen.samples import Report, Sample, batches, read_lines, read_samples, write_lines
from pig.data.transforms import load_image
from pig.models.encoders import Clip

DONE = "quality.jsonl"
# The order in which they are tried; the first that holds is the reason.
REASONS = (
    *("unsafe", "constant image", "no object", "border", "area", "components"),
    *("caption score", "object score"),
)


def largest_part(mask: np.ndarray) -> tuple[np.ndarray, float]:
    """The largest connected part of a boolean mask, and its share of the mask's area (0 of an empty one)."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask, 0.0
    areas = np.bincount(labels.ravel())[1:]
    return labels == areas.argmax() + 1, float(areas.max() / areas.sum())


def measure(image: np.ndarray, mask: np.ndarray | None) -> dict[str, float]:
    """What needs no network, of the mask's largest part, the one that is used.

    area: its share of the picture; largest_part: its share of the mask; margin: its distance to the border at 512 px.
    """
    scores = {"deviation": float(np.asarray(Image.fromarray(image).convert("L")).std())}
    if mask is not None and mask.any():
        part, share = largest_part(mask)
        rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
        height, width = mask.shape
        margin = min(rows[0], columns[0], height - 1 - rows[-1], width - 1 - columns[-1])
        scores |= {
            "area": float(part.mean()),
            "margin": float(margin * 512 / min(height, width)),
            "largest_part": share,
        }
    return scores


def verdict(scores: dict[str, Any], config: QualityConfig) -> str | None:
    """The reason to reject a sample with these scores, or None."""
    found = "area" in scores
    failed = {
        "unsafe": scores.get("unsafe", False),
        "constant image": scores["deviation"] < config.min_deviation,
        "no object": not found,
        "border": found and scores["margin"] < config.border,
        "area": found and not config.min_area <= scores["area"] <= config.max_area,
        "components": found and scores["largest_part"] < config.min_largest_part,
        "caption score": scores["caption_score"] < config.min_caption_score,
        "object score": found and scores["object_score"] < config.min_object_score,
    }
    return next((reason for reason in REASONS if failed[reason]), None)


def judge(folder: Path, clip: Clip, config: QualityConfig, report: Report) -> None:
    """Pictures and masks -> `quality.jsonl`: scores and reason (null: accepted)."""
    unsafe = {row["key"]: row["unsafe"] for row in read_lines(folder / "images.jsonl")}
    found = {row["key"]: row for row in read_lines(folder / "masks.jsonl")}
    rows = []
    for batch in batches(read_samples(folder), config.batch_size):
        rows += _judge_batch(batch, folder, unsafe, found, clip, config)
        report(len(batch))
    write_lines(folder / DONE, rows)


def _judge_batch(
    batch: Sequence[Sample],
    folder: Path,
    unsafe: dict[str, bool],
    found: dict[str, dict[str, Any]],
    clip: Clip,
    config: QualityConfig,
) -> list[dict[str, Any]]:
    images = [np.asarray(load_image(folder / "images" / f"{sample.key}.png").convert("RGB")) for sample in batch]
    masks = []
    for sample in batch:
        path = folder / "masks" / f"{sample.key}.png"
        masks.append(np.asarray(load_image(path).convert("L")) > 127 if found[sample.key]["found"] else None)
    captions = (clip.images([Image.fromarray(image) for image in images]) * clip.texts([s.caption for s in batch])).sum(
        1
    )
    crops = [Image.fromarray(i) if m is None else cut(i, m) for i, m in zip(images, masks, strict=True)]
    objects = (clip.images(crops) * clip.texts([f"a photo of a {s.object}" for s in batch])).sum(1)
    rows = []
    for i, sample in enumerate(batch):
        mask = masks[i]
        scores: dict[str, Any] = measure(images[i], mask)
        scores |= {"caption_score": float(captions[i]), "mask_score": found[sample.key]["mask_score"]}
        if mask is not None:
            scores["object_score"] = float(objects[i])
        scores = {name: round(value, 4) for name, value in scores.items()}
        rows.append(
            {
                "key": sample.key,
                "scores": scores,
                "reason": verdict({**scores, "unsafe": unsafe[sample.key]}, config),
            }
        )
    return rows
