"""Reading the references: what the Reference UNet finds, for one step or kept from call to call."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from pig import diffusion
from pig.models.two_unet import TwoUNet

Features = Mapping[str, Tensor]  # layer name -> (K, N, C)
Key = tuple[str, int, int]  # what was read (see `digest`), t, seed of the noise


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
        size = sum(f.numel() * f.element_size() for f in features.values())
        while self.bytes + size > self.max_bytes:
            oldest = next((other for other in self._kept if other[0] != key[0]), None)
            if oldest is None:
                return
            self.bytes -= sum(f.numel() * f.element_size() for f in self._kept.pop(oldest).values())
        # A copy: a view would keep the whole batch alive.
        self._kept[key] = {name: f.to("cpu", copy=True) for name, f in features.items()}
        self.bytes += size


def digest(*tensors: Tensor) -> str:
    """Changes whenever a value, a shape or a type does."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def weights_digest(*modules: nn.Module) -> str:
    """Of modules' weights, summed up where they lie: their bits' exclusive or, and their sum."""
    weights = [weight for module in modules for weight in module.parameters()]
    bits = torch.stack([torch.hash_tensor(weight.detach()).view(torch.int64) for weight in weights])
    return digest(bits, torch.stack([weight.detach().sum(dtype=torch.float64) for weight in weights]))


def reference_reader(
    model: TwoUNet, z_ref: Tensor, text: Tensor, alphas_cumprod: Tensor, cache: ReferenceCache | None
) -> Callable[[int, int], dict[str, Tensor]]:
    """A function of t and the noise's seed: one Reference-UNet pass, less what the cache has of it.

    z_ref: (P, K, 4, h, w), P groups; text: (P, L, D). What is read: layer name -> (P, K, N, C).
    """

    def run(groups: list[int], t: int, noise_seed: int) -> dict[str, Tensor]:
        z, ts = z_ref[groups], torch.full((len(groups),), t, device=z_ref.device)
        noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(noise_seed)).to(z)
        alpha, sigma = diffusion.alpha_sigma(alphas_cumprod, ts[:1])
        z_t = diffusion.add_noise(z, noise.expand_as(z), alpha.to(z), sigma.to(z))
        return model.encode_reference(z_t, ts, text[groups])

    everyone = list(range(len(z_ref)))
    if cache is None:
        return partial(run, everyone)
    weights = weights_digest(model.reference_unet)
    names = [weights + digest(z, one, alphas_cumprod) for z, one in zip(z_ref, text, strict=True)]

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
