"""Encoded triplets: a shard's targets and captions as the frozen encoders see them, made once instead of every epoch.

Members of a sample: `KEY.target_moments.npy` (8, h, w), mean and log variance of the VAE's posterior; `KEY.text.npy`
(L, D), the caption's embedding; `KEY.json` as in a triplet; and the reference, either untouched as `KEY.reference.png`,
so that it is augmented afresh each time it is seen, or as `KEY.reference_moments.npy` (N, 8, h, w), the moments of N
augmented variants. The entry `encoded` of `_stats.json` says how they were made.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pig.data.schema import METADATA, REFERENCE
from pig.data.shards import BadSampleError, Raw, Shard, decode_metadata, decode_picture, sample_name
from pig.errors import InputError

TARGET_MOMENTS, REFERENCE_MOMENTS, TEXT = "target_moments.npy", "reference_moments.npy", "text.npy"


@dataclass(frozen=True)
class EncodedTriplet:
    """target: (8, h, w); text: (L, D); reference: RGBA, or (N, 8, h, w). Arrays are float32 or float16."""

    key: str
    target: np.ndarray
    text: np.ndarray
    reference: Image.Image | np.ndarray
    caption: str
    object: str
    metadata: Mapping[str, Any]


def encoded_members(triplet: EncodedTriplet, reference_png: bytes) -> dict[str, Any]:
    """As webdataset's TarWriter takes it. reference_png: the original's, kept where there are no variants."""
    metadata = {**triplet.metadata, "caption": triplet.caption, "object": triplet.object}
    reference: tuple[str, Any] = (REFERENCE, reference_png)
    if isinstance(triplet.reference, np.ndarray):
        reference = (REFERENCE_MOMENTS, _packed(triplet.reference))
    return {
        "__key__": triplet.key,
        TARGET_MOMENTS: _packed(triplet.target),
        TEXT: _packed(triplet.text),
        reference[0]: reference[1],
        METADATA: json.dumps(metadata, sort_keys=True).encode(),
    }


def decode_encoded(raw: Raw) -> EncodedTriplet:
    """Decode a sample; raises BadSampleError that names the sample and what is wrong with it."""
    name, metadata = sample_name(raw), decode_metadata(raw)
    target, text = (_unpacked(raw, member, name) for member in (TARGET_MOMENTS, TEXT))
    reference: Image.Image | np.ndarray
    if REFERENCE_MOMENTS in raw:
        reference = _unpacked(raw, REFERENCE_MOMENTS, name)
    else:
        reference = decode_picture(raw, REFERENCE, "RGBA")
    caption, object_ = metadata.pop("caption"), metadata.pop("object")
    return EncodedTriplet(str(raw["__key__"]), target, text, reference, caption, object_, metadata)


def how_encoded(shards: Sequence[Shard]) -> Mapping[str, Any] | None:
    """How the shards were encoded: `base` (a digest), `resolution`, `variants`, `augmentation`; None: they were not.

    Raises:
        InputError: they were not all made in one way.
    """
    ways = {}
    for shard in shards:
        way = shard.stats.encoded and {name: value for name, value in shard.stats.encoded.items() if name != "source"}
        ways[json.dumps(way, sort_keys=True)] = shard
    if len(ways) > 1:
        told = "\n".join(f"  {shard.url}: {way}" for way, shard in list(ways.items())[:3])
        raise InputError(f"shards of one run must all be encoded in the same way, or not at all:\n{told}")
    return shards[0].stats.encoded


def _packed(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _unpacked(raw: Raw, member: str, name: str) -> np.ndarray:
    if member not in raw:
        raise BadSampleError(f"{name}: lacks member {member}")
    try:
        array = np.load(io.BytesIO(raw[member]), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadSampleError(f"{name}: {member} does not decode ({error})") from error
    if not np.isfinite(array).all():
        raise BadSampleError(f"{name}: {member} holds numbers that are not finite")
    return array
