"""What every method's LightningModule shares: checkpoints of trainable weights only, parameter groups, logging."""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from pig.data.schema import Batch
from pig.errors import InputError

Schedule = Literal["constant", "cosine"]
MAX_SKIPPED = 20  # steps of a run whose gradients are not finite


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `fit`, on the CPU. Raises InputError where there is none, or a torn one."""
    if not path.is_file():
        raise InputError(f"no checkpoint file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"{path} is no checkpoint, or a torn one: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} is no checkpoint of fit")
    return state


class PersonalisationModule(LightningModule):
    """Base of the methods. A method calls `train_only` in its constructor and defines `training_step` and `pipeline`.

    Checkpoints hold the trainable weights and nothing of the frozen parts, which come from the base model's folder.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: dict[str, list[str]] = {}
        self.schedule: Schedule = "constant"
        self.learning_rates: dict[str, float] = {}
        self._samples, self._since = 0, time.perf_counter()
        self._losses: list[tuple[list[str], Tensor]] = []  # of the micro-batches since the last optimizer step
        self.skipped_steps = 0

    def pipeline(self) -> DiffusionPipeline:
        """The sampling pipeline on this module's own (not copied) parts."""
        raise NotImplementedError

    def train_only(
        self, groups: Mapping[str, Mapping[str, nn.Parameter]], learning_rates: Mapping[str, float], schedule: Schedule
    ) -> None:
        """Train the named parameters and freeze all others; a group with learning rate 0 is frozen too.

        Args:
            groups: group -> name of the parameter in this module -> parameter.
        """
        if not any(learning_rates.values()) or min(learning_rates.values()) < 0:
            raise InputError(f"learning rates must be at least 0, and one above it, got {dict(learning_rates)}")
        self.requires_grad_(False)
        self.learning_rates = {group: rate for group, rate in learning_rates.items() if rate > 0}
        self.groups = {group: list(groups[group]) for group in self.learning_rates}
        for group in self.groups:
            for parameter in groups[group].values():
                parameter.requires_grad_(True)
        self.schedule = schedule

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def configure_optimizers(self) -> Any:
        """AdamW as in appendix B of BootPIG, with one learning rate for each group."""
        parameters = self.trainable()
        optimizer = torch.optim.AdamW(
            [
                {"name": group, "params": [parameters[name] for name in names], "lr": self.learning_rates[group]}
                for group, names in self.groups.items()
            ],
            betas=(0.9, 0.999),
            weight_decay=1e-2,
            eps=1e-8,
        )
        if self.schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)

        def cosine(step: int) -> float:
            return min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kept = self.trainable()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in kept}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load trainable weights.

        Raises:
            InputError: the names differ from the trainable ones; says which.
        """
        wanted, given = set(self.trainable()), set(state_dict)
        if wanted != given:
            raise InputError(
                f"the checkpoint's weights are not this model's: {len(wanted - given)} missing "
                f"{sorted(wanted - given)[:3]}, {len(given - wanted)} unknown {sorted(given - wanted)[:3]}"
            )
        for name, parameter in self.trainable().items():
            if parameter.shape != state_dict[name].shape:
                raise InputError(
                    f"{name}: the checkpoint has shape {tuple(state_dict[name].shape)}, the base model "
                    f"{tuple(parameter.shape)}: it was trained on another base model"
                )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pig_method"] = type(self).__name__

    def log_by_timestep(self, prefix: str, loss: Tensor, t: Tensor) -> None:
        """Log the mean of `loss` (B,) and its means over the four quarters of the timesteps that occur."""
        size = len(loss)
        self.log(f"{prefix}/loss", loss.mean(), prog_bar=True, batch_size=size, sync_dist=prefix != "train")
        for quarter in range(4):
            inside = (t // 250 == quarter).float()
            if prefix == "train":  # NaN where the batch has no such timestep
                self.log(f"{prefix}/loss_t{250 * quarter:03d}", (loss * inside).sum() / inside.sum(), batch_size=size)

    def training_loss(self, batch: Batch, loss: Tensor, t: Tensor) -> Tensor:
        """The mean of `loss` (B,), logged; its samples are remembered until the optimizer has stepped."""
        self._losses.append((batch.keys, loss.detach()))
        self.log_by_timestep("train", loss.detach(), t)
        return loss.mean()

    def on_train_start(self) -> None:
        self._samples, self._since = 0, time.perf_counter()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradients' norms, and skip a step whose gradients are not finite.

        The gradients are summed over processes, so all of them skip together.
        """
        parameters, norms = self.trainable(), {}
        for group, names in self.groups.items():
            gradients = [g for name in names if (g := parameters[name].grad) is not None]
            # None where all references of the batch were dropped.
            norms[group] = torch.stack(torch._foreach_norm(gradients)).norm() if gradients else torch.zeros(())
        if not all(norm.isfinite() for norm in norms.values()):
            self._skip_step(optimizer)
        elif (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            for group, norm in norms.items():
                self.log(f"grad_norm/{group}", norm, batch_size=1)
        self._losses.clear()

    def _skip_step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)  # what has no gradient does not move
        self.skipped_steps += 1
        keys = [key for keys, loss in self._losses for key, one in zip(keys, loss, strict=True) if not one.isfinite()]
        every = ", ".join(key for keys, _ in self._losses for key in keys)
        samples = ", ".join(keys) or f"losses are finite here; the samples were {every}"
        told = f"step {self.trainer.global_step}: gradients are not finite, the step is skipped: {samples}"
        logging.getLogger("pig").warning(told)
        self.log("skipped_steps", float(self.skipped_steps), batch_size=1)
        if self.skipped_steps >= MAX_SKIPPED:
            raise InputError(
                f"{told}\n{self.skipped_steps} steps were skipped since the start: look at these samples, or lower the "
                "learning rates; the last checkpoint is whole"
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._samples += len(batch.seeds) * self.trainer.world_size
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            now = time.perf_counter()
            self.log("samples_per_second", self._samples / (now - self._since), prog_bar=True, batch_size=1)
            self._samples, self._since = 0, now
            if self.device.type == "cuda":
                gib = torch.cuda.max_memory_allocated(self.device) / 2**30
                self.log("gpu_memory_gib", gib, batch_size=1)
