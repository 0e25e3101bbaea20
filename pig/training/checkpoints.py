"""Checkpoints of `fit`: read without running code, written while training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from pig.errors import InputError
from pig.files import replacing


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `fit`, on the CPU. Raises InputError where there is none, or a torn one."""
    if not path.is_file():
        raise InputError(f"no checkpoint file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the bytes of a torn pickle make of it
        raise InputError(
            f"{path} is no checkpoint, or a torn one: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    if not isinstance(state, dict):
        raise InputError(f"{path} is no checkpoint of fit")
    return state


# What Lightning goes on from.
RESUMED = {
    "pytorch-lightning_version": str,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}


def averaged_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The EMA weights of a checkpoint, or its weights where it has none."""
    averages = [
        saved["average"]
        for saved in (state.get("callbacks") or {}).values()
        if isinstance(saved, dict) and "average" in saved
    ]
    return averages[0] if averages else state["state_dict"]


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or not there. (Lightning's own are written into TMPDIR; moved from there across file
    systems, the new one is copied over the old, and a kill meanwhile leaves neither.)"""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):  # fsspec's business
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as aside, aside.open("wb") as stream:  # which says when the disk is full
            torch.save(checkpoint, stream)


class AsyncCheckpoints(WholeCheckpoints):
    """Checkpoints written while training goes on, one at a time, from a copy on the CPU. (Lightning's own takes copies
    on the GPU, which may have no room for weights and moments twice, and as many as are waiting.)"""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.teardown()
        copy = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self._writing = self._writer.submit(super().save_checkpoint, copy, path, storage_options)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.teardown()
        return super().load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.teardown()
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        """Wait until the last one is written; its error is raised here."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()
