"""Stream triplet shards into training: seeded order, split over ranks and workers, resumable in mid-epoch.

The order of an epoch is a plan made from counts alone: the shards in an order drawn from (seed, epoch), their samples
at positions 0, 1, 2, ... behind one another. Each rank owns a span of positions and each of its workers a span of
batches; inside a span, blocks of `shuffle_block` samples are read and permuted. So the position reached says exactly
which samples were seen: a resumed run passes over finished blocks without reading their shards.
"""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pig.data.encoded import EncodedTriplet, decode_encoded, how_encoded
from pig.data.schema import Batch, Triplet
from pig.data.shards import BadSampleError, Raw, Shard, decode_triplet, read_shard
from pig.data.transforms import ReferenceAugmentation, target_picture, to_tensor
from pig.errors import InputError
from pig.files import digest

log = logging.getLogger(__name__)


class TripletDataset(IterableDataset[Batch]):
    """One rank's batches of one epoch; `start` says which epoch, and where in it.

    Args:
        batch_size: samples of a step over all ranks; each takes its share, `share` samples, one more or less than the
            others where it cannot be even.
        drop_last: leave out the samples that fill no whole batch (other ones in each epoch), so that all ranks take
            equally many steps.
        max_bad_samples: how many different unusable samples a worker replaces before it gives up.
    """

    def __init__(
        self,
        shards: list[Shard],
        *,
        batch_size: int,
        resolution: int,
        augmentation: ReferenceAugmentation,
        seed: int,
        shuffle_block: int,
        max_bad_samples: int,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.shards, self.batch_size, self.resolution = shards, batch_size, resolution
        self.augmentation, self.seed, self.shuffle_block = augmentation, seed, shuffle_block
        self.encoded = how_encoded(shards)
        if self.encoded:
            self._check_encoded(self.encoded)
        self.max_bad_samples, self.bad = max_bad_samples, set[str]()
        self.epoch, self.first_batch = 0, 0
        self.layout = (world_size, drop_last)
        self.total = total = sum(shard.stats.count for shard in shards)
        if total < (batch_size if drop_last else world_size):
            raise InputError(
                f"the shards hold {total} samples, less than one batch of {batch_size} over {world_size} processes: "
                "lower data.batch_size or make more shards"
            )
        if batch_size < world_size:
            raise InputError(
                f"data.batch_size={batch_size} is less than one sample for each of {world_size} processes: raise it, "
                "or lower trainer.devices"
            )
        begin, end = rank * batch_size // world_size, (rank + 1) * batch_size // world_size
        if drop_last:
            steps, self.share = total // batch_size, end - begin
            self.span = (steps * begin, steps * end)
        else:
            self.share = largest_share(batch_size, world_size)
            self.span = (rank * total // world_size, (rank + 1) * total // world_size)

    def _check_encoded(self, encoded: Mapping[str, Any]) -> None:
        if encoded["resolution"] != self.resolution:
            raise InputError(
                f"the shards were encoded at {encoded['resolution']} px, data.resolution is {self.resolution}: set it "
                "so, or encode the triplets again"
            )
        wanted = self.augmentation.as_json()
        made = {**ReferenceAugmentation().as_json(), **(encoded["augmentation"] or {})}
        if encoded["variants"] and made != wanted:
            raise InputError(
                f"the references were encoded augmented by {made}, data.augmentation is {wanted}: "
                "set it so, or encode the triplets again"
            )

    def __len__(self) -> int:
        return -(-(self.span[1] - self.span[0]) // self.share)

    def start(self, *, epoch: int, first_batch: int) -> None:
        """Let the next iteration give this epoch from this batch (of the rank) on."""
        self.epoch, self.first_batch = epoch, first_batch

    def fingerprint(self) -> str:
        """Changes with whatever changes the order of samples; the same on all ranks."""
        plan = [
            [shard.stats.sha256 for shard in self.shards],
            self.batch_size,
            self.seed,
            self.shuffle_block,
            self.layout,
        ]
        return digest(plan)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader takes batches from its workers in turn, beginning with worker 0 also when it resumes: so the part
        # whose turn it is goes to worker 0, and the first `len % workers` parts are one batch longer.
        index = (index + self.first_batch) % workers
        batches = [len(self) // workers + (i < len(self) % workers) for i in range(workers)]
        seen = self.first_batch // workers + (index < self.first_batch % workers)
        anchor = self.span[0] + sum(batches[:index]) * self.share
        end = min(anchor + batches[index] * self.share, self.span[1])
        samples = self._samples(anchor, anchor + seen * self.share, end)
        while batch := list(itertools.islice(samples, self.share)):
            yield self._collate(batch)

    def _samples(self, anchor: int, begin: int, end: int) -> Iterator[tuple[Triplet | EncodedTriplet, int]]:
        """(triplet, seed) for the positions from `begin` to `end`, in blocks counted from `anchor`."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.shards))
        # Where the epoch begins: what `drop_last` leaves out at its end is another part in each epoch.
        offset = int(rng.integers(self.total))
        for block in range(anchor, end, self.shuffle_block):
            stop = min(block + self.shuffle_block, end)
            if stop <= begin:
                continue
            raw = list(self._read([self.shards[i] for i in order], (block + offset) % self.total, stop - block))
            shuffled = np.random.default_rng([self.seed, self.epoch, block]).permutation(len(raw))
            for position in range(max(block, begin), stop):
                triplet = self._first_good(raw, np.roll(shuffled, block - position))
                seed = np.random.SeedSequence([self.seed, self.epoch, position]).generate_state(1, np.uint64)[0]
                yield triplet, int(seed >> 1)

    @staticmethod
    def _read(shards: list[Shard], begin: int, count: int) -> Iterator[Raw | BadSampleError]:
        """`count` samples from position `begin` on, going on at the first shard behind the last."""
        starts = list(itertools.accumulate((shard.stats.count for shard in shards), initial=0))
        first = bisect.bisect_right(starts, begin) - 1
        skip = begin - starts[first]
        for shard in itertools.islice(itertools.cycle(shards), first, None):
            stop = min(shard.stats.count, skip + count)
            yield from itertools.islice(read_shard(shard), skip, stop)
            count -= stop - skip
            skip = 0
            if not count:
                return

    def _first_good(self, raw: list[Raw | BadSampleError], order: np.ndarray) -> Triplet | EncodedTriplet:
        """The first of the samples that is usable: a bad one is named, counted and replaced by its neighbour."""
        for index in order:
            sample = raw[index]
            try:
                if isinstance(sample, BadSampleError):
                    raise sample
                return decode_encoded(sample) if self.encoded else decode_triplet(sample)
            except BadSampleError as error:
                if str(error) not in self.bad:
                    self.bad.add(str(error))
                    log.warning("bad sample %d, replaced: %s", len(self.bad), error)
                if len(self.bad) > self.max_bad_samples:
                    raise InputError(
                        f"{len(self.bad)} bad samples, more than data.max_bad_samples={self.max_bad_samples}; "
                        f"the last: {error}. Make the shards again, or raise the limit"
                    ) from error
        raise InputError(f"none of {len(raw)} samples in a row is usable; the last: {max(self.bad, default='')}")

    def _collate(self, samples: list[tuple[Triplet | EncodedTriplet, int]]) -> Batch:
        triplets, seeds = zip(*samples, strict=True)
        texts = [torch.from_numpy(triplet.text).float() for triplet in triplets if isinstance(triplet, EncodedTriplet)]
        return Batch(
            target=torch.stack([self._target(triplet) for triplet in triplets]),
            reference=torch.stack([self._reference(triplet, seed) for triplet, seed in samples])[:, None],
            text=torch.stack(texts) if texts else None,
            encoded_by=self.encoded["base"] if self.encoded else None,
            captions=[triplet.caption for triplet in triplets],
            objects=[triplet.object for triplet in triplets],
            seeds=torch.tensor(seeds, dtype=torch.int64),
            keys=[triplet.key for triplet in triplets],
        )

    def _target(self, triplet: Triplet | EncodedTriplet) -> Tensor:
        if isinstance(triplet, EncodedTriplet):
            return torch.from_numpy(triplet.target).float()
        return to_tensor(target_picture(triplet.target, self.resolution))

    def _reference(self, triplet: Triplet | EncodedTriplet, seed: int) -> Tensor:
        rng = np.random.default_rng(seed)
        if isinstance(triplet.reference, np.ndarray):  # N variants
            return torch.from_numpy(triplet.reference[rng.integers(len(triplet.reference))]).float()
        target = triplet.target if isinstance(triplet, Triplet) else None
        return to_tensor(self.augmentation(triplet.reference, target, self.resolution, rng))


class ResumableDataset(Protocol):
    """An iterable dataset that can start anywhere; see `TripletDataset`."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...
    def start(self, *, epoch: int, first_batch: int) -> None: ...
    def fingerprint(self) -> str: ...


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader whose `state_dict` says which batch comes next; Lightning saves and restores it by itself.

    With `same_every_time` it starts afresh at each pass, with the same order and seeds: for validation.
    """

    dataset: Any  # a ResumableDataset

    def __init__(
        self, dataset: ResumableDataset, *, num_workers: int, pin_memory: bool, same_every_time: bool = False
    ) -> None:
        super().__init__(
            cast(Any, dataset), batch_size=None, num_workers=num_workers, pin_memory=pin_memory, collate_fn=as_it_is
        )
        self.epoch, self.batch, self.same_every_time = 0, 0, same_every_time

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self.same_every_time:
            self.epoch, self.batch = 0, 0
        self.dataset.start(epoch=self.epoch, first_batch=self.batch)
        for batch in super().__iter__():
            self.batch += 1
            if self.batch == len(self.dataset):
                self.epoch, self.batch = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "num_workers": self.num_workers,
            "fingerprint": self.dataset.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = self.state_dict()
        changed = [name for name in ("num_workers", "fingerprint") if state[name] != now[name]]
        if changed and state["batch"]:
            raise InputError(
                "the checkpoint stands in mid-epoch of other data: "
                + "; ".join(f"{name} was {state[name]}, is {now[name]}" for name in changed)
                + ". The fingerprint covers shards (or pictures), batch_size, seed, shuffle_block and number of "
                "processes; resume with the same ones, or start a new run from the weights"
            )
        self.epoch, self.batch = state["epoch"], state["batch"]


def largest_share(batch_size: int, world_size: int) -> int:
    """Samples of a step that a process takes, where they cannot be shared evenly the most that one takes."""
    return -(-batch_size // world_size)


def as_it_is(batch: Any) -> Any:
    return batch
