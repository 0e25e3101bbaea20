"""Lightning data modules: what training reads, and the jobs of `predict`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pig.data.encoded import decode_encoded, how_encoded
from pig.data.images import SEEDS, Job
from pig.data.loading import ResumableLoader, TripletDataset, as_it_is
from pig.data.schema import Batch
from pig.data.shards import BadSampleError, Shard, decode_triplet, find_shards, read_shard
from pig.data.subjects import read_subjects
from pig.data.transforms import ReferenceAugmentation
from pig.errors import InputError, check_ranges

log = logging.getLogger(__name__)


class PersonalisationData(LightningDataModule):
    """Base of the data modules: what training asks of them.

    batch_size: samples of an optimizer step, over all processes. resolution: side of the pictures in pixels.
    """

    batch_size: int
    resolution: int

    def encoded(self) -> list[Mapping[str, Any] | None]:
        """How the training and the validation samples were encoded; None: they were not."""
        return [None]


def seed_of_run(seed: int | None) -> int:
    """data.seed, or the number that Lightning's `seed_everything` leaves in the environment."""
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
    if not 0 <= seed < SEEDS:
        raise InputError(f"data.seed (by default seed_everything) must lie between 0 and 2^32, got {seed}")
    return seed


class TripletDataModule(PersonalisationData):
    """Triplets for `fit`, `validate` and `test`; subjects and prompts for `predict`.

    Args:
        shards: training shards: a folder, glob, brace pattern or URL, or a list of such.
        batch_size: samples of an optimizer step, over all processes.
        resolution: side of targets and references in pixels.
        val_shards: held-out shards for the validation (and test) loss.
        predict_subjects: a folder of subjects (`pig.data.subjects`); `predict` draws each under all its prompts.
        augmentation: of the reference; the paper's by default.
        num_workers: loader processes; 0 reads in the training process.
        seed: of order, augmentation, noise and dropout; by default `seed_everything`.
        shuffle_block: samples that are read and permuted at a time, in each worker.
        max_bad_samples: how many unusable samples one worker may replace in an epoch; one more stops the training.
    """

    def __init__(
        self,
        shards: str | list[str],
        *,
        batch_size: int,
        resolution: int,
        val_shards: str | list[str] | None = None,
        predict_subjects: str | None = None,
        augmentation: ReferenceAugmentation | None = None,
        num_workers: int = 4,
        seed: int | None = None,
        shuffle_block: int = 1000,
        max_bad_samples: int = 100,
    ) -> None:
        super().__init__()
        if resolution % 8 or resolution <= 0:
            raise InputError(f"data.resolution must be a multiple of 8, got {resolution}")
        if batch_size < 1 or shuffle_block < 1:
            raise InputError("data.batch_size and data.shuffle_block must be at least 1")
        check_ranges(
            **{"data.num_workers": (num_workers, 0, 1024), "data.max_bad_samples": (max_bad_samples, 0, 10**9)}
        )
        self.shards, self.val_shards, self.predict_subjects = shards, val_shards, predict_subjects
        self.batch_size, self.resolution, self.num_workers = batch_size, resolution, num_workers
        self.augmentation = augmentation or ReferenceAugmentation()
        self.seed = seed_of_run(seed)
        self.shuffle_block, self.max_bad_samples = shuffle_block, max_bad_samples

    def encoded(self) -> list[Mapping[str, Any] | None]:
        return [how_encoded(self.find(spec)[0]) for spec in (self.shards, self.val_shards) if spec]

    def find(self, spec: str | list[str]) -> tuple[list[Shard], list[str]]:
        """`find_shards`, where several processes train by the first one for all: a listing that fails for one of them
        would give it another plan, and the others would wait for its steps for ever."""
        strategy = self.trainer.strategy if self.trainer else None
        if strategy is None or not torch.distributed.is_initialized():
            return find_shards(spec)
        found: tuple[list[Shard], list[str]] | str = ""
        if self.trainer.is_global_zero:
            try:
                found = find_shards(spec)
            except InputError as error:
                found = str(error)
        found = strategy.broadcast(found)
        if isinstance(found, str):
            raise InputError(found)
        return found

    def prepare_data(self) -> None:
        """Look at the first sample of some shards, before anything long starts."""
        if self.trainer and self.trainer.predicting:
            return
        for spec in filter(None, (self.shards, self.val_shards)):
            found, _ = find_shards(spec)
            errors = []
            for shard in found[:8]:
                try:
                    first = next(iter(read_shard(shard)))
                    if isinstance(first, BadSampleError):
                        raise first
                    decode_encoded(first) if shard.stats.encoded else decode_triplet(first)
                except BadSampleError as error:
                    errors.append(str(error))
            if len(errors) == len(found[:8]):
                raise InputError(f"no usable sample at the start of any shard looked at: {errors[0]}")

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.shards, training=True)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        return self._loader(self.val_shards, training=False) if self.val_shards else []

    def test_dataloader(self) -> ResumableLoader:
        if not self.val_shards:
            raise InputError("`test` needs data.val_shards")
        return self._loader(self.val_shards, training=False)

    def predict_dataloader(self) -> DataLoader[Job]:
        if not self.predict_subjects:
            raise InputError("`predict` needs data.predict_subjects")
        subjects = read_subjects(self.predict_subjects)
        jobs = [Job(subject, index, self.seed) for subject in subjects for index in range(len(subject.prompts))]
        return DataLoader(jobs, batch_size=None, collate_fn=as_it_is)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Only a Batch holds tensors; the jobs of `predict` stay as they are."""
        return super().transfer_batch_to_device(batch, device, dataloader_idx) if isinstance(batch, Batch) else batch

    def _loader(self, spec: str | list[str], *, training: bool) -> ResumableLoader:
        shards, left_out = self.find(spec)
        for line in left_out:
            log.warning("shard left out: %s", line)
        dataset = TripletDataset(
            shards,
            batch_size=self.batch_size,
            resolution=self.resolution,
            augmentation=self.augmentation,
            seed=self.seed,
            shuffle_block=self.shuffle_block,
            max_bad_samples=self.max_bad_samples,
            drop_last=training,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )
        return ResumableLoader(
            dataset,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            same_every_time=not training,
        )
