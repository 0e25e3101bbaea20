"""What all stages share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, Dataset

from pig.models.backbone import half_is_fast


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where it is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half_is_fast(device.type))


class Stage(LightningModule):
    """Shared by all stages: AdamW with warm-up, cosine decay to zero in `cycles` equal parts, and the data loader."""

    steps: ClassVar[int]
    cycles: ClassVar[int] = 1
    batch_size: ClassVar[int]
    lr: ClassVar[float]
    ema: ClassVar[float] = 0.998

    def dataset(self) -> Dataset[Any]:
        raise NotImplementedError

    def save(self, out: Path) -> None:
        """Write what was learnt in its public format below `out`."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset(), self.batch_size, shuffle=True, drop_last=True)

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a share of `lr`."""
        length = self.steps // self.cycles
        since = step % length if step < self.steps else length
        return min(1.0, (since + 1) / 200) * 0.5 * (1 + math.cos(math.pi * since / length))

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
