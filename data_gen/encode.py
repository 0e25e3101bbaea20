"""Run the frozen encoders over triplet shards once: VAE moments and text embeddings into shards beside them."""

from __future__ import annotations

import itertools
import json
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pig.data.encoded import EncodedTriplet, encoded_members
from pig.data.schema import REFERENCE, Triplet
from pig.data.shards import (
    BadSampleError,
    MissingSampleError,
    Shard,
    ShardStats,
    decode_triplet,
    find_shards,
    read_shard,
    shard_name,
    stats_path,
    write_samples,
)
from pig.data.transforms import ReferenceAugmentation, target_picture, to_tensor
from pig.errors import InputError
from pig.files import make_folder
from pig.models.backbone import (
    Backbone,
    check_size,
    encode_text,
    encoders_digest,
    image_moments,
    inputs_told,
    load_backbone,
    vae_scale,
)

BATCH = 16  # pictures at a time


class Encoder:
    """VAE and text encoder of a base model, and what its shards say of themselves."""

    def __init__(
        self, base: str, resolution: int, variants: int, augmentation: ReferenceAugmentation, half: bool
    ) -> None:
        self.backbone: Backbone = load_backbone(base)
        check_size(self.backbone.vae, resolution, resolution)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for part in (self.backbone.vae, self.backbone.text_encoder):
            part.to(self.device)
        self.resolution, self.variants, self.augmentation, self.half = resolution, variants, augmentation, half
        self.identity = {
            "base": encoders_digest(self.backbone),
            "resolution": resolution,
            "variants": variants,
            "augmentation": augmentation.as_json() if variants else None,
            "dtype": "float16" if half else "float32",
        }

    def bytes_per_sample(self) -> int:
        """Without the reference's picture."""
        side = self.resolution // vae_scale(self.backbone.vae)
        moments = 2 * self.backbone.vae.config.latent_channels * side**2 * (1 + self.variants)
        text = self.backbone.tokenizer.model_max_length * self.backbone.text_encoder.config.hidden_size
        return (moments + text) * (2 if self.half else 4)

    def __call__(self, triplets: list[Triplet]) -> Iterator[EncodedTriplet]:
        """In the same order."""
        targets = self.moments(to_tensor(target_picture(one.target, self.resolution)) for one in triplets)
        texts = self.array(encode_text(self.backbone, [one.caption for one in triplets]))
        references: Any = [one.reference for one in triplets]
        if self.variants:
            pictures = (self._augmented(one, variant) for one in triplets for variant in range(self.variants))
            moments = self.moments(pictures)
            references = moments.reshape(len(triplets), self.variants, *moments.shape[1:])
        for triplet, target, text, reference in zip(triplets, targets, texts, references, strict=True):
            yield EncodedTriplet(
                triplet.key, target, text, reference, triplet.caption, triplet.object, triplet.metadata
            )

    def _augmented(self, triplet: Triplet, variant: int) -> Tensor:
        rng = np.random.default_rng([zlib.crc32(triplet.key.encode()), variant])
        return to_tensor(self.augmentation(triplet.reference, triplet.target, self.resolution, rng))

    def moments(self, pictures: Iterable[Tensor]) -> np.ndarray:
        """(B, 8, h, w) of B pictures (3, H, W)."""
        left, found = iter(pictures), []
        while part := list(itertools.islice(left, BATCH)):
            found.append(self.array(image_moments(self.backbone.vae, torch.stack(part).to(self.device))))
        return np.concatenate(found)

    def array(self, tensor: Tensor) -> np.ndarray:
        return tensor.cpu().numpy().astype(np.float16 if self.half else np.float32)


def encode_shards(
    shards: list[str],
    base: str,
    out: Path,
    resolution: int,
    variants: int,
    augmentation: ReferenceAugmentation,
    half: bool,
) -> None:
    """Write `out/NAME.tar` for each `NAME.tar` of the shards; those that are there, of the same shard, are kept."""
    found, left_out = find_shards(shards)
    for line in left_out:
        tqdm.write(f"left out: {line}")
    names = Counter(tar_of(shard, out) for shard in found)
    if twice := [tar.name for tar, times in names.items() if times > 1]:
        raise InputError(f"two shards are named {twice[0]}: encode their folders one by one, each into its own --out")
    local = [(tar, Path(shard.url)) for tar, shard in zip(names, found, strict=True) if Path(shard.url).exists()]
    if any(tar.exists() and tar.samefile(path) for tar, path in local):
        raise InputError(f"--out {out} is the folder of the shards themselves: name another")
    if any(shard.stats.encoded for shard in found):
        raise InputError(f"the shards of {shards} are encoded already: name the triplets that they were made of")
    make_folder(out)
    if strangers := sorted(path.name for path in out.glob("*.tar") if path not in names):
        raise InputError(
            f"--out {out} holds {strangers[0]}, which is of none of these shards: name another, or remove it"
        )
    if variants < 0:
        raise InputError(f"--variants must be at least 0, got {variants}")
    encoder = Encoder(base, resolution, variants, augmentation, half)
    missing = [shard for shard in found if not is_done(tar_of(shard, out), shard, encoder.identity)]
    count = sum(shard.stats.count for shard in missing)
    size = count * encoder.bytes_per_sample() / 1e6
    print(
        f"{len(found) - len(missing)} of {len(found)} shards are encoded; {count} samples to go, about {size:,.0f} MB"
    )
    began, done = time.perf_counter(), 0
    with tqdm(total=count, unit="sample") as bar:
        for shard in missing:
            done += encode_shard(shard, tar_of(shard, out), encoder, bar)
    if done:
        print(f"{done} samples -> {out}, {(time.perf_counter() - began) / done * 1000:.1f} ms each")
    print(inputs_told(encoder.backbone, resolution, encoder.identity))


def tar_of(shard: Shard, out: Path) -> Path:
    return out / shard_name(shard.url)


def is_done(tar: Path, shard: Shard, identity: Mapping[str, Any]) -> bool:
    """Raises InputError where another base or other settings made what is there."""
    try:
        stats = ShardStats(**json.loads(Path(stats_path(str(tar))).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False
    there = dict(stats.encoded or {})
    if there.pop("source", None) == shard.stats.sha256 and there == identity:
        return tar.exists()
    changed = [name for name, value in identity.items() if there.get(name) != value] or ["the triplets"]
    raise InputError(f"{tar} was made with another {' and '.join(changed)}: name another --out, or remove it")


def encode_shard(shard: Shard, tar: Path, encoder: Encoder, bar: Any) -> int:
    """How many samples were written. Unusable ones are left out and counted."""
    rejected: Counter[str] = Counter()

    def good() -> Iterator[tuple[Triplet, bytes]]:
        for raw in read_shard(shard, whole=True):
            bar.update()
            if isinstance(raw, MissingSampleError):
                raise raw
            try:
                if isinstance(raw, BadSampleError):
                    raise raw
                yield decode_triplet(raw), raw[REFERENCE]
            except BadSampleError as error:
                rejected["unreadable"] += 1
                tqdm.write(f"left out: {error}")

    def members() -> Iterator[dict[str, Any]]:
        samples = good()
        while batch := list(itertools.islice(samples, BATCH)):
            triplets, references = zip(*batch, strict=True)
            for encoded, reference in zip(encoder(list(triplets)), references, strict=True):
                yield encoded_members(encoded, reference)

    try:
        return write_samples(tar, members(), rejected, {**encoder.identity, "source": shard.stats.sha256}).count
    except MissingSampleError as error:  # perhaps there at the next try: nothing is finished without it
        told = "Finished shards are kept; start again to go on, or make this one again"
        raise InputError(f"{error}. {told}") from error
