"""Stage 5: a shard is a fixed slice of the samples, brought through the stages until each passes or is dropped."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_gen import images, masks, quality
from data_gen.captions import FILE, Caption, read_captions
from data_gen.config import DatagenConfig, captioner, masker
from data_gen.samples import Sample, read_lines, read_samples, write_lines, write_samples
from pig.data.schema import Triplet
from pig.data.shards import write_shard
from pig.data.transforms import load_image
from pig.errors import InputError, check_kinds
from pig.models.encoders import load_clip

STAGES = ("images", "masks", "quality", "shards")


@dataclass
class ShardReport:
    """What a worker says of a shard it has finished."""

    number: int
    count: int
    rejected: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    drawn: int = 0  # pictures


Accepted = dict[str, tuple[Path, dict[str, Any]]]  # key -> folder and scores


def verdicts(folder: Path) -> tuple[Accepted, Counter[str]]:
    """What `quality.jsonl` of a folder accepts, and how often it rejects for each reason."""
    rows = read_lines(folder / quality.DONE)
    for row in rows:
        check_kinds(row, {"key": str, "scores": dict}, str(folder / quality.DONE))
    accepted = {row["key"]: (folder, row["scores"]) for row in rows if not row.get("reason")}
    return accepted, Counter(str(row["reason"]) for row in rows if row.get("reason"))


def tar_of(output: Path, number: int) -> Path:
    return output / f"train-{number:06d}.tar"


def work_of(output: Path, number: int) -> Path:
    return output / "work" / f"{number:06d}"


def sample_count(config: DatagenConfig) -> int:
    return config.captions.count * config.images.per_caption


def shard_count(config: DatagenConfig) -> int:
    return -(-sample_count(config) // config.shards.size)


def shard_size(config: DatagenConfig, number: int) -> int:
    return min(config.shards.size, sample_count(config) - number * config.shards.size)


def samples_of(config: DatagenConfig, captions: Sequence[Caption], number: int) -> list[tuple[int, Caption]]:
    """Index and caption of the samples of a shard. Neighbours have different captions."""
    first = number * config.shards.size
    return [(i, captions[i % len(captions)]) for i in range(first, first + shard_size(config, number))]


def seed_of(config: DatagenConfig, index: int, attempt: int) -> int:
    """Of sample `index` when it is drawn for the `attempt`-th time; below 2^32."""
    return int(np.random.SeedSequence([config.seed, index, attempt]).generate_state(1)[0])


class ShardMaker:
    """Holds the models, each loaded when first needed, and makes one shard after another."""

    def __init__(self, config: DatagenConfig, device: str) -> None:
        self.config, self.device, self.output = config, device, Path(config.output)
        torch.set_num_threads(config.threads)

    @cached_property
    def painter(self) -> images.Painter:
        return images.Painter(self.config.images, self.device)

    @cached_property
    def segmenter(self) -> masks.Segmenter:
        return masks.make_segmenter(self.config.masks, self.device)

    @cached_property
    def clip(self) -> Any:
        return load_clip(self.config.quality.clip, self.device)

    @cached_property
    def captions(self) -> list[Caption]:
        return read_captions(self.output / FILE)

    def load(self) -> None:
        """Load all models that are not loaded yet."""
        _ = self.painter, self.segmenter, self.clip

    def run_stage(self, stage: str, folder: Path, report: Callable[[int], None]) -> None:
        """One stage on a folder, from disk to disk; nothing where it is done already."""
        done = {"images": images.DONE, "masks": masks.DONE, "quality": quality.DONE}[stage]
        if (folder / done).exists():
            report(len(read_samples(folder)))
        elif stage == "images":
            images.draw_images(folder, self.painter, self.config.images, report)
        elif stage == "masks":
            masks.find_masks(folder, self.segmenter, self.config.masks, report)
        else:
            quality.judge(folder, self.clip, self.config.quality, report)

    def make(self, number: int) -> ShardReport:
        """Make shard `number`, going on where an interrupted worker left its folder.

        Raises:
            OSError: no space is left. Nothing half-written counts; started again, the shard goes on.
        """
        work = work_of(self.output, number)
        try:
            work.mkdir(parents=True, exist_ok=True)
            # An orphan of a killed run may still be at it, for a second: wait until it is gone.
            with (work.parent / f"{number:06d}.lock").open("w", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                report = self._make(number, work)
                shutil.rmtree(work)
                Path(lock.name).unlink()
            return report
        except OSError as error:
            error.filename = error.filename or str(self.output)  # for the message
            raise

    def _make(self, number: int, work: Path) -> ShardReport:
        config, report = self.config, ShardReport(number, 0, {})
        progress, rejected, accepted = Progress(work), Counter[str](), Accepted()
        pending = samples_of(config, self.captions, number)
        order = [f"{index:09d}" for index, _ in pending]
        for attempt in range(config.shards.attempts):
            folder = work / str(attempt)
            samples = [
                Sample(f"{index:09d}", caption.caption, caption.object, seed_of(config, index, attempt))
                for index, caption in pending
            ]
            if not (folder / "samples.jsonl").exists():
                write_samples(folder, samples)
            self.load()  # none of the stages' time
            for stage in STAGES[:3]:
                with clock(report.seconds, stage):
                    self.run_stage(stage, folder, progress.stepped(stage))
            report.drawn += len(samples)
            passed, failed = verdicts(folder)
            accepted |= passed
            rejected += failed
            progress.rejected(rejected.total())
            pending = [(index, caption) for index, caption in pending if f"{index:09d}" not in accepted]
            if not pending:
                break
        if pending:
            rejected["dropped after all attempts"] += len(pending)
        with clock(report.seconds, "shards"):
            keys = [key for key in order if key in accepted]
            stats = write_shard(tar_of(self.output, number), self._triplets(keys, accepted), rejected)
        report.count, report.rejected = stats.count, dict(stats.rejected)
        return report

    def pack(self, folder: Path) -> ShardReport:
        """Stage 5 alone: what `quality.jsonl` of a folder accepts, as shard 0 of `config.output`."""
        accepted, rejected = verdicts(folder)
        if not accepted:
            raise InputError(f"{folder}: quality.jsonl accepts none of its {rejected.total()} samples")
        stats = write_shard(tar_of(self.output, 0), self._triplets(sorted(accepted), accepted), rejected)
        return ShardReport(0, stats.count, dict(stats.rejected))

    def _triplets(self, keys: Sequence[str], accepted: Accepted) -> Iterator[Triplet]:
        config = self.config
        models = {
            "caption": captioner(config.captions),
            "image": config.images.model,
            "mask": masker(config.masks),
        }
        samples = {
            (folder, sample.key): sample
            for folder in {folder for folder, _ in accepted.values()}
            for sample in read_samples(folder)
        }
        for key in keys:
            folder, scores = accepted[key]
            if (folder, key) not in samples:
                raise InputError(f"{folder / quality.DONE} accepts {key!r}, which samples.jsonl does not hold")
            sample = samples[folder, key]
            target = load_image(folder / "images" / f"{key}.png").convert("RGB")
            reference = target.copy()
            reference.putalpha(_alpha(folder / "masks" / f"{key}.png"))
            yield Triplet(
                key=key,
                target=target,
                reference=reference,
                caption=sample.caption,
                object=sample.object,
                metadata={"seed": sample.seed, "models": models, "scores": scores},
            )


def _alpha(mask: Path) -> Image.Image:
    part, _ = quality.largest_part(np.asarray(load_image(mask).convert("L")) > 127)
    return Image.fromarray(part.astype(np.uint8) * 255)


@contextmanager
def clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began


class Progress:
    """Counts of an unfinished shard in its work folder, for whoever watches; on a cluster, through the shared disk."""

    def __init__(self, work: Path) -> None:
        self.file = work / "progress.json"
        self.counts: dict[str, int] = dict.fromkeys((*STAGES[:3], "rejected"), 0)

    def stepped(self, stage: str) -> Callable[[int], None]:
        def step(samples: int) -> None:
            self.counts[stage] += samples
            self._write()

        return step

    def rejected(self, count: int) -> None:
        self.counts["rejected"] = count
        self._write()

    def _write(self) -> None:
        write_lines(self.file, [self.counts])


def read_progress(output: Path, number: int) -> dict[str, int]:
    try:
        return json.loads((work_of(output, number) / "progress.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def check_models(config: DatagenConfig) -> None:
    """Load every model once, before any worker starts. Raises InputError that names the one that cannot be had."""
    ShardMaker(config, "cpu").load()
