"""One optimizer step: micro-batches, running out of memory, gradients that are not finite, what is logged."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pig.data.loading import largest_share
from pig.data.schema import Batch
from pig.errors import InputError
from pig.training.optimizers import OptimizerName, lay_out

log = logging.getLogger("pig")
MAX_SKIPPED = 20  # steps of a run whose gradients are not finite


class MicroBatchedModule(LightningModule):
    """A LightningModule whose step takes a process's share of the global batch in micro-batches.

    They are as large as the memory allows: at an out-of-memory error the micro-batch is halved and the step begun
    again.

    Args:
        micro_batch: samples whose activations are held at a time, in each process; None: its share of the batch.
    """

    optimizer_name: OptimizerName
    groups: dict[str, list[str]]  # of the trainable parameters, by name
    train_timesteps: int  # of the noise schedule: t lies in [0, train_timesteps)

    def __init__(self, micro_batch: int | None) -> None:
        super().__init__()
        if micro_batch is not None and micro_batch < 1:
            raise InputError(f"model.micro_batch must be at least 1, got {micro_batch}")
        self.micro_batch = micro_batch
        self._samples, self._since = 0, time.perf_counter()
        self._batches: list[Batch] = []  # since the last optimizer step
        self._losses: list[Tensor] = []  # of their samples
        self._norms: dict[str, Tensor] = {}  # of each group's gradients
        self.skipped_steps = 0
        self.shown: dict[str, float] = {}  # on the progress bar; fetched at the steps that are logged
        self._steps = self._rehearsed = 0  # in this run

    def losses(self, batch: Batch, *, training: bool) -> tuple[Tensor, Tensor]:
        """Loss and timestep of each sample, both (B,). training: with dropout."""
        raise NotImplementedError

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_train_start(self) -> None:
        self._samples, self._since = 0, time.perf_counter()
        self._tell_split()

    def _tell_split(self) -> None:
        world, accumulated = self.trainer.world_size, self.trainer.accumulate_grad_batches
        size = self.global_batch()
        micro = self.micro_size(share := largest_share(size, world))
        split = f"processes {world} x micro-batches {-(-share // micro) * accumulated} x samples {micro}"
        rest = "" if size % (world * micro) == 0 else " at most"
        rank_zero_info(f"global batch {size * accumulated}: {split}{rest}")

    def global_batch(self) -> int:
        return int(self.trainer.train_dataloader.dataset.batch_size)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Runs the backward passes itself and returns the mean loss. Only where processes exchange gradients, the last
        micro-batch's backward pass is left to Lightning."""
        self._batches.append(batch)
        exchanged = isinstance(self.trainer.strategy.model, DistributedDataParallel)
        # A step that runs out of memory cannot be retried during all-reduce, so the first step and the second (when
        # the optimizer has taken its memory) run without it first.
        rehearse = exchanged and self.trainer.accumulate_grad_batches == 1
        while True:
            try:
                if rehearse and self._rehearsed == self._steps < 2:
                    self._accumulate(exchanged=False)
                    self.zero_grad(set_to_none=True)
                    self._rehearsed += 1
                loss, losses, t = self._accumulate(exchanged)
                self._losses.append(losses)
                self.log_by_timestep("train", losses, t)
                return loss
            except torch.OutOfMemoryError as error:
                self._halve(error)
            # Outside of `except`, whose traceback would keep the tensors alive.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def backward(self, loss: Tensor) -> None:
        """Lightning's hook."""
        if loss.requires_grad:
            try:
                loss.backward()
            except torch.OutOfMemoryError as error:  # the other processes wait for this one's part
                raise self._no_memory(error) from error

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Lightning would do it between `training_step` and `backward`; it is done behind the step instead."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().optimizer_step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"out of memory for the optimizer's state: set model.optimizer=adamw_8bit, or adamw_sharded. {error}"
            ) from error
        if self.optimizer_name == "adamw_8bit":  # which leaves the weights contiguous
            lay_out(self, self.trainer.precision, self.device)
        self._steps += 1
        self._clear()

    def micro_size(self, share: int) -> int:
        """Samples of a micro-batch, where a process has `share` of the global batch."""
        return min(self.micro_batch or share, share)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        return batch.split(self.micro_size(len(batch.keys)))

    def _accumulate(self, exchanged: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward passes of the newest batch, but for the last backward pass if gradients are exchanged
        in it. Returns the loss to be returned, and loss and timestep of each sample."""
        found, parts = [], self.micro_batches(self._batches[-1])
        for part in parts:
            loss, t = self.losses(part, training=True)
            # Processes' gradients are averaged, each of its share of the batch.
            share = loss.sum() * (self.trainer.world_size / self.global_batch())
            found.append((loss.detach(), t))
            if not exchanged or part is not parts[-1]:
                (share / self.trainer.accumulate_grad_batches).backward()
        losses, t = (torch.cat(column) for column in zip(*found, strict=True))
        return share if exchanged else losses.mean(), losses, t

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        size = self.micro_size(len(self._batches[-1].keys))
        if size == 1 or self.trainer.accumulate_grad_batches > 1:  # whose earlier gradients would be lost
            raise self._no_memory(error) from error
        self.micro_batch = size // 2
        log.warning(
            "out of memory with a micro-batch of %d: halved to %d, and the step begun again", size, self.micro_batch
        )
        # Gradients of a part of the batch may be there; all draws follow from the samples' seeds, so nothing is lost.
        self.zero_grad(set_to_none=True)

    def _no_memory(self, error: torch.OutOfMemoryError) -> InputError:
        size = self.micro_size(len(self._batches[-1].keys))
        remedy = (
            f"start again with model.micro_batch={size // 2}"
            if size > 1
            else "set model.gradient_checkpointing=true, model.optimizer=adamw_8bit, or a lower data.resolution"
        )
        return InputError(f"out of memory with a micro-batch of {size}: {remedy}. {error}")

    def _clear(self) -> None:
        self.zero_grad(set_to_none=True)
        self._batches.clear()
        self._losses.clear()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradients' norms, and skip a step whose gradients are not finite.

        The gradients are summed over processes, so all of them skip together.
        """
        parameters = self.trainable()
        self._norms = {
            group: torch.nn.utils.get_total_norm([g for name in names if (g := parameters[name].grad) is not None])
            for group, names in self.groups.items()
        }
        if not torch.stack(list(self._norms.values())).isfinite().all():
            self._skip_step()
        elif (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            for group, norm in self._norms.items():
                self.log(f"grad_norm/{group}", norm, batch_size=1)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm over all groups. (Lightning's own refuses fused optimizers, for the sake of loss scaling.)"""
        if gradient_clip_algorithm not in (None, "norm"):
            raise InputError("trainer.gradient_clip_algorithm must be norm")
        if gradient_clip_val:
            norm = torch.stack(list(self._norms.values())).norm()
            nn.utils.clip_grads_with_norm_(self.trainable().values(), gradient_clip_val, norm)

    def _skip_step(self) -> None:
        self.zero_grad(set_to_none=True)  # what has no gradient does not move
        self.skipped_steps += 1
        every = [key for batch in self._batches for key in batch.keys]
        finite = torch.cat(self._losses).isfinite().tolist()
        bad = [key for key, good in zip(every, finite, strict=True) if not good]
        samples = ", ".join(bad) or f"losses are finite here; the samples were {', '.join(every)}"
        told = f"step {self.trainer.global_step}: gradients are not finite, the step is skipped: {samples}"
        log.warning(told)
        self.log("skipped_steps", float(self.skipped_steps), batch_size=1)
        if self.skipped_steps >= MAX_SKIPPED:
            raise InputError(
                f"{told}\n{self.skipped_steps} steps were skipped since the start: look at these samples, or lower the "
                "learning rates; the last checkpoint is whole"
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._samples += self.global_batch()
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            now = time.perf_counter()
            speed = self._samples / (now - self._since)
            self.log("samples_per_second", speed, batch_size=1)
            self.shown = {"loss": float(self.trainer.callback_metrics["train/loss"]), "samples/s": speed}
            self._samples, self._since = 0, now
            if self.device.type == "cuda":
                gib = torch.cuda.max_memory_allocated(self.device) / 2**30
                self.log("gpu_memory_gib", gib, batch_size=1)

    def log_by_timestep(self, prefix: str, loss: Tensor, t: Tensor) -> None:
        """Log the mean of `loss` (B,) and its means over the four quarters of the timesteps that occur."""
        size, training = len(loss), prefix == "train"
        # What a progress bar shows is fetched from the GPU at every step: `shown` is instead.
        self.log(f"{prefix}/loss", loss.mean(), prog_bar=not training, batch_size=size, sync_dist=not training)
        for quarter in range(4):
            inside = (4 * t // self.train_timesteps == quarter).float()
            if training:  # NaN where the batch has no such timestep
                name = f"{prefix}/loss_t{self.train_timesteps * quarter // 4:03d}"
                self.log(name, (loss * inside).sum() / inside.sum(), batch_size=size)
