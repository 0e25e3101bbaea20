"""Reading the references: what the Reference UNet finds, for one step or kept from call to call."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from pig import diffusion
from pig.data.subjects import Segment, find_object, load_cutout
from pig.errors import InputError

Features = Mapping[str, Tensor]  # layer name -> (K, N, C)
Picture = Image.Image | str | Path | tuple  # the last, within a list: a picture and its mask
Key = tuple[str, int, int]  # what was read (see `digest`), t, seed of the noise


def as_cutout(picture: Picture, segment: Segment | None) -> Image.Image:
    """RGBA, from any of the forms that a reference may have."""
    if isinstance(picture, str | Path):
        return load_cutout(Path(picture), segment)
    if not isinstance(picture, tuple):
        return find_object(picture, None, segment, noun="")
    if len(picture) != 2 or not all(isinstance(one, Image.Image) for one in picture) or not is_grey(picture[1]):
        raise InputError(
            "a tuple within a list of references is a picture and its mask, which is grey, both PIL; for several "
            "references of a prompt give a list of lists"
        )
    return find_object(*picture, segment, noun="")


def is_grey(image: Image.Image) -> bool:
    """Whether a picture may be meant as a mask: no colour where it is not transparent."""
    if image.mode in ("1", "L", "LA", "I", "I;16", "F"):
        return True
    array = np.asarray(image.convert("RGBA")).astype(int)
    shown = array[array[..., 3] > 0][:, :3]
    return bool((np.ptp(shown, axis=1) <= 8).all()) if len(shown) else True


def cut_outs_of(prompts: Sequence[str], references: Any, segment: Segment | None) -> list[list[Image.Image]]:
    """The references of each prompt as RGBA cut-outs, from what the pipeline is given.

    Raises:
        InputError: a prompt without references, or not equally many for all.
    """
    if isinstance(references, Image.Image | str | Path):
        references = [references]
    if not references or any(not one for one in references if isinstance(one, list)):
        raise InputError("a prompt without references: give at least one picture of the subject")
    shared = isinstance(references[0], Picture)
    per_prompt = [list(references)] * len(prompts) if shared else [list(one) for one in references]
    if len(per_prompt) != len(prompts):
        raise InputError(f"{len(prompts)} prompts but reference lists for {len(per_prompt)}")
    if len({len(one) for one in per_prompt}) > 1:
        raise InputError("all prompts of a call must have equally many references")
    # Each picture once: what is one object here is one object there, which is how prompts share a pass.
    found = {id(one): one for pictures in per_prompt for one in pictures}
    cutouts = {key: as_cutout(one, segment) for key, one in found.items()}
    return [[cutouts[id(one)] for one in pictures] for pictures in per_prompt]


class ReferenceCache:
    """Features of references up to `max_bytes`, on the CPU whatever device draws.

    The key is all that the features depend on (arXiv 2401.13974, section 3.5: never on the picture being drawn), the
    Reference UNet's weights included; so nothing in here can be stale. When full, what was asked for longest ago goes,
    but never for other steps of the same call: a call that is larger than the cache keeps its first steps.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._kept: OrderedDict[Key, Features] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key, device: torch.device) -> Features | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return {name: f.to(device) for name, f in self._kept[key].items()}

    def put(self, key: Key, features: Features) -> None:
        size = size_of(features)
        if key in self._kept or size > self.max_bytes:
            return
        while self.bytes + size > self.max_bytes:
            oldest = next((other for other in self._kept if other[0] != key[0]), None)
            if oldest is None:
                return
            self.bytes -= size_of(self._kept.pop(oldest))
        # A copy: a view would keep the whole batch alive.
        self._kept[key] = {name: f.to("cpu", copy=True) for name, f in features.items()}
        self.bytes += size


def size_of(features: Features) -> int:
    """In bytes."""
    return sum(f.nbytes for f in features.values())


def digest(*tensors: Tensor) -> str:
    """Changes whenever a value, a shape or a type does."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def reference_noise(shape: Sequence[int], number: int) -> Tensor:
    """Standard normal noise on a subject's references, independent of what pictures are drawn from (Algorithm 1)."""
    generator = torch.Generator().manual_seed(diffusion.derived_seed("reference noise", number))
    return torch.randn(*shape, generator=generator)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken; on a GPU also those that torch's allocator holds free."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


Encode = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


def reference_reader(
    encode_reference: Encode,
    weights: Iterable[Tensor],
    z_ref: Tensor,
    text: Tensor,
    alphas_cumprod: Tensor,
    cache: ReferenceCache | None,
) -> Callable[[int, int], dict[str, Tensor]]:
    """A function of t and the noise's seed: one pass over the references, less what the cache has of it.

    Args:
        encode_reference: of noised latents (P, K, 4, h, w), t (P,) and text (P, L, D): layer name -> (P, K, N, C).
        weights: of the network that reads, by which the cache tells networks apart.
        z_ref: (P, K, 4, h, w), P groups. text: (P, L, D).
    """

    def run(groups: list[int], t: int, noise_seed: int) -> dict[str, Tensor]:
        z, ts = z_ref[groups], torch.full((len(groups),), t, device=z_ref.device)
        noise = reference_noise(z.shape[1:], noise_seed).to(z)
        alpha, sigma = diffusion.alpha_sigma(alphas_cumprod, ts[:1])
        z_t = diffusion.add_noise(z, noise.expand_as(z), alpha.to(z), sigma.to(z))
        return encode_reference(z_t, ts, text[groups])

    everyone = list(range(len(z_ref)))
    if cache is None:
        return partial(run, everyone)
    reader = digest(*weights)  # about a second for Stable Diffusion's in half precision
    names = [reader + digest(z, one, alphas_cumprod) for z, one in zip(z_ref, text, strict=True)]

    def read(t: int, noise_seed: int) -> dict[str, Tensor]:
        keys = [(name, t, noise_seed) for name in names]
        found = {i: kept for i in everyone if (kept := cache.get(keys[i], z_ref.device)) is not None}
        missing = [i for i in everyone if i not in found]
        if missing:
            features = run(missing, t, noise_seed)
            for row, i in enumerate(missing):
                found[i] = {name: f[row] for name, f in features.items()}
                cache.put(keys[i], found[i])
        return {name: torch.stack([found[i][name] for i in everyone]) for name in found[0]}

    return read
