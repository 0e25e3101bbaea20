"""The contracts between the stages: triplet shards, batches, subjects and generated images.

**Triplet shard** (a webdataset tar, `train-000000.tar`): `KEY.target.jpg` (or png, webp; RGB), `KEY.reference.png`
(RGBA, the object cut out, straight alpha) and `KEY.json` (`caption`, `object`: the object phrase, `seed`, names of the
models, scores). Beside it `train-000000_stats.json`, written last: without it the shard does not exist. Encoded shards
(`pig.data.encoded`) hold what the frozen encoders make of the triplets instead.

**Generated images**: `SUBJECT/PROMPT_INDEX/SEED.png` and `manifest.jsonl`, a line per image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pig.errors import InputError

TARGETS = ("target.jpg", "target.png", "target.webp")
REFERENCE = "reference.png"
METADATA = "json"


@dataclass(frozen=True)
class Triplet:
    """One training sample. `target`: RGB; `reference`: RGBA, the object cut out; `object`: its phrase."""

    key: str
    target: Image.Image
    reference: Image.Image
    caption: str
    object: str
    metadata: Mapping[str, Any]


@dataclass
class Batch:
    """What a training step gets.

    target: (B, 3, H, W) in [-1, 1]. reference: (B, K, 3, H, W) in [-1, 1], the augmented object on white; None where
    the data has none. From encoded shards (`python -m data_gen encode`) either may be the VAE's moments instead,
    (..., 8, H/8, W/8).
    text: (B, L, D), the captions' embeddings, and encoded_by: the base model's digest, from encoded shards only.
    seeds: (B,) int64, every random draw made for a sample follows from its seed, so that neither the batch's
    composition nor the number of processes changes what is learnt, and a resumed run draws what it would have drawn.
    of_class: where a subject is tuned with prior preservation: which samples show its class, not the subject.
    """

    target: Tensor
    reference: Tensor | None
    captions: list[str]
    objects: list[str]
    seeds: Tensor
    keys: list[str]
    text: Tensor | None = None
    encoded_by: str | None = None
    of_class: list[bool] | None = None

    def to(self, device: torch.device) -> Batch:
        """With its pictures and texts there, which nothing waits for; the seeds stay, as draws are made on the CPU."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """torch's DataLoader asks for it."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        moved: dict[str, Any] = {name: one if one is None else move(one) for name, one in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor | None]:
        """What travels to the device that trains."""
        return {"target": self.target, "reference": self.reference, "text": self.text}

    def references(self) -> Tensor:
        """
        Raises:
            InputError: the data has none.
        """
        if self.reference is None:
            raise InputError("this method learns from references, and the data has none")
        return self.reference

    def split(self, size: int) -> list[Batch]:
        """Parts of at most `size` samples."""
        columns: dict[str, Any] = vars(self)
        parts = []
        for at in range(0, len(self.keys), size):
            part: dict[str, Any] = {
                name: of if of is None or isinstance(of, str) else of[at : at + size] for name, of in columns.items()
            }
            parts.append(Batch(**part))
        return parts


@dataclass(frozen=True)
class GeneratedImage:
    """A line of `manifest.jsonl`; `file` is relative to the manifest."""

    subject: str
    class_noun: str
    prompt: str
    prompt_index: int
    seed: int
    file: str
    method: str
    settings: Mapping[str, Any]
