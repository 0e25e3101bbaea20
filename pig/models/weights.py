"""Weights in safetensors files, and into the parameters that they are for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pig.errors import InputError

if TYPE_CHECKING:
    from diffusers import ModelMixin

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def random_but_the_same() -> Iterator[None]:
    """Weights that are made in here are random, but the same in every run and process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def like(made: Module, other: ModelMixin) -> Module:
    """On the other's device, in its type. (diffusers' own `to` warns for no reason.)"""
    return nn.Module.to(made, other.device, other.dtype)


def read_weights(file: Path) -> dict[str, Tensor]:
    """
    Raises:
        InputError: no such file, a torn one, or one in another format.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is missing, torn, or no safetensors file: {str(error).splitlines()[0]}") from error


def copy_weights(given: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str | Path, otherwise: str) -> None:
    """Copy weights of the same names and shapes.

    Args:
        where: they come from. otherwise: what to do where they do not fit, for the message.

    Raises:
        InputError: names, shapes or kinds of numbers differ; a number is not finite.
    """
    if own.keys() != given.keys():
        odd = sorted(own.keys() ^ given.keys())
        raise InputError(f"{where}: {len(odd)} names differ, such as {odd[0]}. {otherwise}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != given[name].shape:
                shapes = f"has shape {tuple(given[name].shape)}, wanted is {tuple(tensor.shape)}"
                raise InputError(f"{where}: {name} {shapes}. {otherwise}")
            if tensor.is_floating_point() != given[name].is_floating_point():
                kinds = f"is {given[name].dtype}, wanted is {tensor.dtype}"
                raise InputError(f"{where}: {name} {kinds}. {otherwise}")
            if not given[name].isfinite().all():
                raise InputError(f"{where}: {name} holds numbers that are not finite (NaN): the training went wrong")
            tensor.copy_(given[name])


def weights_digest(model: nn.Module) -> str:
    """sha256 of all parameters and buffers with their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
