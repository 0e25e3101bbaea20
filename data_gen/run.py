"""The whole chain from a config: plan, captions, shards by the executor, data card."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from data_gen import captions as caption_stage
from data_gen.config import DatagenConfig, captioner, masker, settle
from data_gen.samples import Sample, write_samples
from data_gen.shards import (
    STAGES,
    ShardMaker,
    ShardReport,
    check_models,
    clock,
    read_progress,
    sample_count,
    seed_of,
    shard_count,
    shard_size,
    tar_of,
    verdicts,
)
from pig.data.shards import ShardStats, rejections, stats_path
from pig.errors import InputError
from pig.executors import device_of, execute
from pig.files import check_folder, locked, make_folder, sha256_of, write_text

console = Console()
CARD = "README.md"
# Of a sample's time, roughly: for the estimate of what is left of unfinished shards.
TIME_SHARES = {"images": 0.8, "masks": 0.15, "quality": 0.05}
HOPELESS = 64  # samples tried without one that passes, after which a run ends


def generate(config: DatagenConfig) -> None:
    """Make all shards that are not there yet.

    Raises:
        InputError: before any work, what the config gets wrong or the machine lacks.
    """
    out = Path(config.output)
    check_device(config)
    make_folder(out)
    with locked(out):
        settle(config)
        console.print(plan(config))
        caption_stage.make_captions(out, config.captions, config.seed)
        missing = [number for number in range(shard_count(config)) if not complete(config, number)]
        if missing:
            check_models(config)
            reports = make_shards(config, missing)
            console.print(speed_table(config, reports))
        shutil.rmtree(out / "work", ignore_errors=True)
        refuse_if_hopeless(config)
        write_card(config)
    stats = all_stats(config)
    console.print(
        f"{sum(s.count for s in stats)} triplets in {len(stats)} shards, {sum(s.bytes for s in stats) / 1e6:.1f} MB -> "
        f"{out}\nlook at them: python -m data_gen inspect {out}"
    )


def check_device(config: DatagenConfig) -> None:
    if torch.cuda.is_available() and config.executor == "local" and config.workers > torch.cuda.device_count():
        raise InputError(f"workers={config.workers}, but this machine has {torch.cuda.device_count()} GPUs: one each")


def work(config: DatagenConfig, numbers: Sequence[int]) -> Iterator[ShardReport | None]:
    """Make these shards: each one's report as it is done, and None at every poll.

    Raises:
        InputError, OSError: as a worker met them.
        WorkerDiedError: a worker was lost.
    """
    if config.executor == "ray":  # whose actors have working folders of their own
        config = replace(config, output=str(Path(config.output).absolute()))
    how: Any = {"executor": config.executor, "workers": config.workers, "threads": config.threads}
    yield from execute(partial(_make_shards, config), numbers, **how)


def _make_shards(config: DatagenConfig, device: str) -> Callable[[int], ShardReport]:
    return ShardMaker(config, device).make


def stats_of(config: DatagenConfig, number: int) -> ShardStats | None:
    """What stands beside a shard; None where nothing readable does."""
    try:
        return ShardStats(
            **json.loads(Path(stats_path(str(tar_of(Path(config.output), number)))).read_text(encoding="utf-8"))
        )
    except (OSError, ValueError, TypeError):
        return None


def complete(config: DatagenConfig, number: int) -> bool:
    """Whether a shard has its stats, and the tar the bytes that they name. A torn one does not."""
    tar, stats = tar_of(Path(config.output), number), stats_of(config, number)
    try:
        return stats is not None and tar.stat().st_size == stats.bytes and sha256_of(tar) == stats.sha256
    except OSError:
        return False


def plan(config: DatagenConfig) -> Table:
    """What will be made, by what, and how much disk it takes."""
    samples, size = sample_count(config), config.images.size
    # A JPEG of quality 95 and a PNG of an object on nothing: about 1.6 bytes a pixel, plus the tar's headers.
    disk = samples * (1.6 * size**2 + 4096)
    work = config.workers * config.shards.size * size**2 * 4
    table = Table(title="plan", show_header=False)
    for name, value in {
        "samples": f"{samples} ({config.captions.count} captions, {config.images.per_caption} pictures of each)",
        "shards": f"{shard_count(config)} of {config.shards.size} in {config.output}",
        "captions by": captioner(config.captions),
        "pictures by": f"{config.images.model}, {size} px, {config.images.steps} steps",
        "masks by": masker(config.masks),
        "judged by": config.quality.clip,
        "workers": f"{config.workers} ({config.executor}, {device_of(0).split(':')[0]})",
        "disk": f"about {size_of(disk)}, and {size_of(work)} while at work",
    }.items():
        table.add_row(name, value)
    return table


def size_of(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def estimate(config: DatagenConfig) -> tuple[float, float]:
    """Seconds that all samples take here, if none is rejected, and share that is; from one real batch of each stage."""
    batch = max(config.images.batch_size, config.masks.batch_size)
    words = caption_stage.Caption("a photo of a mug, on a beach", "mug")
    maker, seconds = ShardMaker(config, device_of(0)), dict[str, float]()
    maker.load()  # paid once
    with tempfile.TemporaryDirectory() as name:
        for attempt in range(2):  # the first warms up
            folder, seconds = Path(name) / str(attempt), {}
            samples = [Sample(f"{i}", words.caption, words.object, seed_of(config, i, attempt)) for i in range(batch)]
            write_samples(folder, samples)
            for stage in STAGES[:3]:
                with clock(seconds, stage):
                    maker.run_stage(stage, folder, lambda _: None)
        _, rejected = verdicts(folder)
    return sum(seconds.values()) / batch * sample_count(config) / config.workers, rejected.total() / batch


def dry_run(config: DatagenConfig) -> None:
    """Print the plan and, where the models can be loaded here, the time that a real batch makes one expect."""
    check_folder(Path(config.output))
    console.print(plan(config))
    check_device(config)
    if config.captions.captioner == "grammar":
        caption_stage.grammar_captions(config.captions, config.seed)  # refused if there are too few
    try:
        seconds, rejected = estimate(config)
        console.print(
            f"estimated time here: {seconds / 60:.1f} minutes for pictures, masks and quality, besides loading and "
            f"captions (from one batch, of which {rejected:.0%} would be drawn again)"
        )
    except InputError as error:
        console.print(f"estimated time: not to be measured here: {error}", soft_wrap=True)


def make_shards(config: DatagenConfig, missing: Sequence[int]) -> list[ShardReport]:
    """Run the executor under a display of progress over all workers: rate, rejections, time left."""
    out, reports, began = Path(config.output), list[ShardReport](), time.perf_counter()
    sizes = {number: shard_size(config, number) for number in missing}
    total, told = sum(sizes.values()), began
    with Live(console=console, refresh_per_second=2, transient=not console.is_terminal) as live:
        for report in work(config, missing):
            if report is not None:
                reports.append(report)
                if not any(done.count for done in reports):
                    refuse_if_hopeless(config)
            finished = {done.number for done in reports}
            running = [read_progress(out, number) for number in missing if number not in finished]
            # Quality comes last; a sample drawn again is counted again, so the share is capped by the shard's size.
            done = sum(sizes[n] for n in finished) + sum(progress.get("quality", 0) for progress in running)
            drawn = sum(r.drawn for r in reports) + sum(progress.get("images", 0) for progress in running)
            rejected = sum(r.drawn - r.count for r in reports) + sum(p.get("rejected", 0) for p in running)
            seconds = time.perf_counter() - began
            steps = sum(sizes[n] for n in finished) + sum(
                sum(p.get(stage, 0) * share for stage, share in TIME_SHARES.items()) for p in running
            )
            left = (total - steps) * seconds / steps if steps else None
            line = (
                f"shards {len(reports)}/{len(missing)}  samples {min(done, total)}/{total}  "
                f"pictures {drawn}  rejected {rejected}  {drawn / seconds:.2f} pictures/s  "
                f"left {'?' if left is None else f'{max(0, left) / 60:.1f} min'}"
            )
            live.update(line)
            if not console.is_terminal and time.perf_counter() - told > 30:  # a log file wants lines
                told = time.perf_counter()
                print(line, flush=True)
    return reports


def refuse_if_hopeless(config: DatagenConfig) -> None:
    """Raise InputError, with the reasons, once enough samples were tried and not one has passed."""
    stats = {number: found for number in range(shard_count(config)) if (found := stats_of(config, number))}
    tried = sum(shard_size(config, number) for number in stats)
    if tried >= min(HOPELESS, sample_count(config)) and not any(shard.count for shard in stats.values()):
        reasons = dict(rejections(stats.values()))
        raise InputError(
            f"not one of the first {tried} samples passed: {reasons}. Look at masks.* and quality.* in the config (`no "
            "object`: the phrase was not found), and try them out in another output"
        )


def speed_table(config: DatagenConfig, reports: Sequence[ShardReport]) -> Table:
    """Pictures a second of each stage, over all workers."""
    table = Table("stage", "seconds of work", "samples/s, all workers", title="speed")
    drawn, workers = sum(report.drawn for report in reports), min(config.workers, len(reports))
    for stage in STAGES:
        seconds = sum(report.seconds.get(stage, 0.0) for report in reports)
        table.add_row(stage, f"{seconds:.1f}", f"{drawn / seconds * workers:.1f}" if seconds else "-")
    return table


def all_stats(config: DatagenConfig) -> list[ShardStats]:
    return [stats for number in range(shard_count(config)) if (stats := stats_of(config, number))]


def markdown_table(head: tuple[str, str], rows: Mapping[str, object]) -> str:
    lines = [head, ("---", "---"), *(rows or {"none": 0}).items()]
    return "".join(f"| {name} | {value} |\n" for name, value in lines)


def write_card(config: DatagenConfig) -> None:
    """The data card beside the shards: what they hold, how they were made, what was rejected."""
    stats, out = all_stats(config), Path(config.output)
    rejected = rejections(stats)
    dropped = rejected.pop("dropped after all attempts", 0)
    caption_rejects = json.loads((out / caption_stage.STATS).read_text(encoding="utf-8"))["rejected"]
    facts = {
        "captions": f"{config.captions.count}, by {captioner(config.captions)}",
        "pictures of each": config.images.per_caption,
        "pictures": f"{config.images.model}, {config.images.steps} steps, guidance {config.images.guidance}",
        "masks": masker(config.masks),
        "judged by": config.quality.clip,
        "seeds": f"{config.seed}; each sample's own from it, its index and the attempt",
        f"samples dropped after {config.shards.attempts} attempts": dropped,
        "licence of the data": config.card.licence,
        "terms of the captions": config.card.caption_terms,
        "terms of the pictures": config.card.image_terms,
    }
    size = sum(s.bytes for s in stats) / 1e6
    text = (
        f"# Synthetic triplets\n\n{sum(s.count for s in stats)} triplets (target, reference, caption) of "
        f"{config.images.size} px in {len(stats)} webdataset shards, {size:.1f} MB,\n"
        "made by `python -m data_gen` from `datagen.yaml` beside it. Each shard's `_stats.json` has its sha256.\n\n"
        + markdown_table(("", ""), facts)
        + "\nPictures rejected, by reason (thresholds in `datagen.yaml`):\n\n"
        + markdown_table(("reason", "pictures"), dict(sorted(rejected.items())))
        + "\nCaptions rejected, by reason:\n\n"
        + markdown_table(("reason", "captions"), caption_rejects)
    )
    write_text(out / CARD, text)


def stage_alone(stage: str, config: DatagenConfig, folder: Path | None = None) -> None:
    """One stage, from disk to disk: `captions` into `config.output`, the others on a folder with `samples.jsonl`.

    `shards` packs the folder as the one shard of a new `config.output`.
    """
    out = Path(config.output)
    if stage == "captions":
        make_folder(out)
        with locked(out):
            settle(config)
            made = caption_stage.make_captions(out, config.captions, config.seed)
        console.print(f"{len(made)} captions -> {out / caption_stage.FILE}")
        return
    if folder is None:
        raise InputError(
            f"stage {stage} works on a folder with samples.jsonl: python -m data_gen {stage} CONFIG FOLDER"
        )
    maker = ShardMaker(config, device_of(0))
    if stage == "shards":
        if any(out.glob("*.tar")):
            raise InputError(f"{out} holds shards already; choose another output")
        make_folder(out)
        report = maker.pack(folder)
        console.print(f"{report.count} triplets -> {tar_of(out, 0)}; rejected: {report.rejected}")
        return
    maker.run_stage(stage, folder, lambda _: None)
    console.print(f"{stage} done in {folder}")
