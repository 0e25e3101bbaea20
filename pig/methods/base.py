"""What every method's LightningModule shares: parameter groups, micro-batches, checkpoints of what is trained."""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from pig.data.modules import largest_share
from pig.data.schema import Batch
from pig.errors import InputError, check_named

log = logging.getLogger("pig")
Schedule = Literal["constant", "cosine"]
OptimizerName = Literal["adamw", "adamw_8bit", "adamw_sharded"]
PRECISIONS = ("bf16-mixed", "32-true")  # no loss scaling, so that gradients say at once whether they are finite
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


def adamw(name: OptimizerName, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW as in appendix B of BootPIG: `adamw` (fused), `adamw_8bit` (bitsandbytes: a quarter of its memory), or
    `adamw_sharded` (torch's ZeroRedundancyOptimizer: each process keeps and updates its share of the state)."""
    settings: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}
    if name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise InputError("model.optimizer=adamw_8bit needs bitsandbytes: pip install 'pig[8bit]'") from error
        return AdamW8bit(groups, **settings)
    optimizer: torch.optim.Optimizer
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    elif torch.distributed.is_initialized():
        optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings, fused=True)
    else:
        raise InputError("model.optimizer=adamw_sharded is for several processes: set trainer.strategy to ddp")
    optimizer.register_load_state_dict_post_hook(_settle)
    return optimizer


def _settle(optimizer: torch.optim.Optimizer) -> None:
    """Fused kernels want a loaded state as they would have made it: the step count on the parameter's device (the
    sharded optimizer loads it onto the CPU), the moments laid out like the parameter, whatever it was in the run that
    saved them."""
    for parameter, state in getattr(optimizer, "optim", optimizer).state.items():
        for name, value in state.items():
            like = parameter if value.shape == parameter.shape else value
            state[name] = torch.empty_like(like, dtype=value.dtype, device=parameter.device).copy_(value)


def lay_out(module: nn.Module, precision: str, device: torch.device) -> None:
    """Arrange the weights for training on `device`; what is computed stays the same.

    Under bf16-mixed, the frozen weights of products are kept in bf16, as autocast would round them at each use (norms
    stay float32). Convolutions want channels_last, but in bf16 on CPUs, which are slower with it.
    """
    if precision == "bf16-mixed":
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                for parameter in layer.parameters(recurse=False):
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.bfloat16()
    if device.type == "cuda" or precision == "32-true":
        module.to(memory_format=torch.channels_last)


class PersonalisationModule(LightningModule):
    """Base of the methods. A method calls `train_only` in its constructor and defines `loss` and `pipeline`.

    A process's share of the global batch is taken in micro-batches, as large as the memory allows: at an
    out-of-memory error the micro-batch is halved and the step begun again. Checkpoints hold the trainable weights and
    nothing of the frozen parts, which come from the base model's folder.

    Args:
        optimizer: see `adamw`.
        micro_batch: samples whose activations are held at a time, in each process; None: its share of the batch.
    """

    def __init__(self, optimizer: OptimizerName = "adamw", micro_batch: int | None = None) -> None:
        super().__init__()
        check_named("model.optimizer", optimizer, get_args(OptimizerName))
        if micro_batch is not None and micro_batch < 1:
            raise InputError(f"model.micro_batch must be at least 1, got {micro_batch}")
        self.optimizer_name, self.micro_batch = optimizer, micro_batch
        self.groups: dict[str, list[str]] = {}
        self.schedule: Schedule = "constant"
        self.learning_rates: dict[str, float] = {}
        self._samples, self._since = 0, time.perf_counter()
        self._batches: list[Batch] = []  # since the last optimizer step
        self._losses: list[Tensor] = []  # of their samples
        self._norms: dict[str, Tensor] = {}  # of each group's gradients
        self.skipped_steps = 0
        self.shown: dict[str, float] = {}  # on the progress bar; fetched at the steps that are logged
        self._steps = self._rehearsed = 0  # in this run

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and timestep of each sample, both (B,)."""
        raise NotImplementedError

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
        """AdamW with one learning rate for each group."""
        parameters = self.trainable()
        groups = [
            {"name": group, "params": [parameters[name] for name in names], "lr": self.learning_rates[group]}
            for group, names in self.groups.items()
        ]
        optimizer = adamw(self.optimizer_name, groups)
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
        checkpoint["pig_optimizer"] = self.optimizer_name
        checkpoint["pig_skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("pig_optimizer", self.optimizer_name)
        if (saved == "adamw_8bit") != (self.optimizer_name == "adamw_8bit"):
            raise InputError(
                f"the checkpoint holds the state of model.optimizer={saved}, which {self.optimizer_name} cannot go on "
                "with: resume with the same one"
            )
        self.skipped_steps = checkpoint.get("pig_skipped_steps", 0)

    def log_by_timestep(self, prefix: str, loss: Tensor, t: Tensor) -> None:
        """Log the mean of `loss` (B,) and its means over the four quarters of the timesteps that occur."""
        size, training = len(loss), prefix == "train"
        # What a progress bar shows is fetched from the GPU at every step: `shown` is instead.
        self.log(f"{prefix}/loss", loss.mean(), prog_bar=not training, batch_size=size, sync_dist=not training)
        for quarter in range(4):
            inside = (t // 250 == quarter).float()
            if training:  # NaN where the batch has no such timestep
                self.log(f"{prefix}/loss_t{250 * quarter:03d}", (loss * inside).sum() / inside.sum(), batch_size=size)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            if self.trainer.precision not in PRECISIONS:
                raise InputError(
                    f"trainer.precision={self.trainer.precision} is not supported: use {' or '.join(PRECISIONS)}"
                )
            lay_out(self, self.trainer.precision, self.trainer.strategy.root_device)

    def on_train_start(self) -> None:
        self._samples, self._since = 0, time.perf_counter()
        self._tell_split()

    def _tell_split(self) -> None:
        world, accumulated = self.trainer.world_size, self.trainer.accumulate_grad_batches
        size = self._global_batch()
        micro = self.micro_size(share := largest_share(size, world))
        split = f"processes {world} x micro-batches {-(-share // micro) * accumulated} x samples {micro}"
        rest = "" if size % (world * micro) == 0 else " at most"
        rank_zero_info(f"global batch {size * accumulated}: {split}{rest}")

    def _global_batch(self) -> int:
        return int(self.trainer.train_dataloader.dataset.batch_size)

    # -- one step: micro-batches, memory, gradients ---------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss; its gradients are there. Only where processes exchange gradients the last micro-batch's are
        not: that is done in the backward pass which Lightning starts."""
        self._batches.append(batch)
        exchanged = isinstance(self.trainer.strategy.model, DistributedDataParallel)
        # In an exchange nobody can begin again, so two steps are first done without: the first, and the second, when
        # the optimizer has taken its memory.
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
            loss, t = self.training_loss(part)
            # Processes' gradients are averaged, each of its share of the batch.
            share = loss.sum() * (self.trainer.world_size / self._global_batch())
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
        self._samples += self._global_batch()
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            now = time.perf_counter()
            speed = self._samples / (now - self._since)
            self.log("samples_per_second", speed, batch_size=1)
            self.shown = {"loss": float(self.trainer.callback_metrics["train/loss"]), "samples/s": speed}
            self._samples, self._since = 0, now
            if self.device.type == "cuda":
                gib = torch.cuda.max_memory_allocated(self.device) / 2**30
                self.log("gpu_memory_gib", gib, batch_size=1)
