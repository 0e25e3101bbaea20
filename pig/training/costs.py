"""What a training costs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pig.costs import flops_of, forget_peak_memory, machine, peak_memory
from pig.data.modules import PersonalisationData
from pig.files import make_folder, write_text
from pig.training.memory import blank_batch, nothing_dropped, on_meta
from pig.training.module import PersonalisationModule
from pig.training.tuned import TunedModule


def flops_per_sample(module: PersonalisationModule, data: PersonalisationData) -> int:
    """Of a sample's forward and backward passes and, where each is encoded anew, its encoding; counted on the meta
    device, nothing is computed."""
    _ = module.encoders_digest  # of the weights themselves
    with on_meta(module), nothing_dropped(module), torch.compiler.set_stance("force_eager"):
        module.float()  # autocast, which lets frozen weights be of another precision, does not reach the meta device
        batch = blank_batch(module, data, 1)
        flops = flops_of(lambda: module.losses(batch, training=True)[0].mean().backward())
        if isinstance(module, TunedModule):  # which has encoded its few pictures before the first step
            flops -= flops_of(lambda: module.latents_of(batch))
        return flops


class Costs(Callback):
    """Write what a training has cost into `cost.json` in the trainer's `default_root_dir`: the number of trained
    weights, samples, seconds, FLOPs, memory.

    `seconds` are those of the steps and their data, without validation and checkpoints; a resumed run goes on counting.
    The file is written at each checkpoint, too: a run that was killed behind its last one is not trained again.
    """

    def __init__(self) -> None:
        self.seconds, self.samples, self._since = 0.0, 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PersonalisationModule)
        self.flops = flops_per_sample(pl_module, trainer.datamodule)
        forget_peak_memory()  # of what came before, such as class pictures

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._since = self._since or time.perf_counter()  # a validation or a checkpoint has stopped the clock

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PersonalisationModule)
        now = time.perf_counter()
        self.seconds += now - self._since
        self.samples += pl_module.global_batch()
        self._since = now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = 0.0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write(trainer, pl_module)
        self._since = 0.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PersonalisationModule)
        if trainer.is_global_zero:
            told = {
                "trained_weights": sum(weight.numel() for weight in pl_module.trainable().values()),
                **self.state_dict(),
                "flops_per_sample": self.flops,
                "peak_memory_bytes": peak_memory(),
                "machine": machine(),
            }
            folder = Path(trainer.default_root_dir)
            make_folder(folder)  # this may come before all else that is written there
            write_text(folder / "cost.json", json.dumps(told, indent=1) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.samples = state["seconds"], state["samples"]
