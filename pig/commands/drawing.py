"""Drawing many images into a folder: what is finished stays, the rest is drawn here or by workers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from pig.data.images import MANIFEST, Job, forget, note, read_manifest, save_picture
from pig.data.transforms import is_whole
from pig.errors import InputError
from pig.executors import ExecutorName, execute
from pig.files import digest_of, make_folder
from pig.methods import load_blend, load_pipeline
from pig.sampling.delta import load_weights
from pig.sampling.pipeline import SubjectPipeline
from pig.sampling.references import ReferenceCache, digest
from pig.sampling.settings import SamplingSettings

LOOPS = "loops"  # the folder for `--save_loops`
console = Console()


@dataclass(frozen=True)
class Workers:
    """How many processes draw. count 1: this process, with its own pipeline; else so many processes (or Ray's actors),
    each of which loads the order's. threads: CPU threads of each."""

    count: int = 1
    executor: ExecutorName = "local"
    threads: int = 1


HERE = Workers()


@dataclass(frozen=True)
class Order:
    """What is drawn, and how: all that a worker needs to know.

    model: as `load_pipeline` takes it. cutouts: the references of each subject, by its name. given: settings, size and
    inpainting, for the pipeline's call. deltas: where a subject has weights of its own: their folder, or two of them
    that are blended. keep_loops: write each loop's picture, too. reference_cache: in GiB.
    """

    out: Path
    model: str
    cutouts: Mapping[str, Sequence[Image.Image]]
    given: Mapping[str, Any]
    deltas: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    keep_loops: bool = False
    reference_cache: float = 0.0


class Drawer:
    """Draws the jobs of an order, a batch at a time; base parts are loaded once, whatever the number of subjects."""

    def __init__(self, order: Order, pipeline: SubjectPipeline) -> None:
        self.order, self.pipeline, self.subject = order, pipeline, ""
        if order.reference_cache > 0:
            pipeline.reference_cache = ReferenceCache(int(order.reference_cache * 2**30))

    def take(self, subject: str) -> None:
        """Load the weights of a subject that has its own."""
        if subject in self.order.deltas and subject != self.subject:
            for part, folder in zip(self.pipeline.tuned_parts, self.order.deltas[subject], strict=True):
                load_weights(part, folder)
            self.subject = subject

    def call(self, batch: Sequence[Job], **more: Any) -> Any:
        self.take(batch[0].subject.name)
        return self.pipeline(
            [job.prompt for job in batch],
            [self.order.cutouts[job.subject.name] for job in batch],
            class_noun=[job.subject.class_noun for job in batch],
            **{**self.order.given, **more},
        )

    def draw(self, batch: Sequence[Job]) -> Sequence[Job]:
        """Draw these and save them; returns them."""
        generators = [torch.Generator().manual_seed(job.seed) for job in batch]
        drawn = self.call(batch, generator=generators, keep_loops=self.order.keep_loops)
        for row, (job, picture) in enumerate(zip(batch, drawn.images, strict=True)):
            if drawn.loops is not None:
                save_loops(self.order.out, job, drawn.loops[row])
            save_picture(self.order.out / job.file, picture)
        return batch


def load_for(order: Order, device: str) -> SubjectPipeline:
    """The order's pipeline; where each subject has its own weights, with those of the first one."""
    weights = next(iter(order.deltas.values()), ())
    if len(weights) == 2:
        return load_blend(*weights, device)
    return load_pipeline(weights[0] if weights else order.model, device)


def make_drawer(order: Order, threads: int, cwd: str, device: str) -> Callable[[Sequence[Job]], Sequence[Job]]:
    """Called in each worker: loads the order's pipeline and returns its draw function."""
    os.chdir(cwd)  # models may be named relative to it
    torch.set_num_threads(threads)
    pipeline = load_for(order, device)
    pipeline.set_progress_bar_config(disable=True)
    return Drawer(order, pipeline).draw


def draw_jobs(
    pipeline: SubjectPipeline,
    jobs: Sequence[Job],
    cutouts: Mapping[str, Sequence[Image.Image]],
    out: Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    more: Mapping[str, Any] | None = None,
    manifest: str = MANIFEST,
    keep_loops: bool = False,
) -> None:
    """Draw the images that `out` does not have yet in this process, with these settings; see `draw_order`.

    more: what else the pipeline's call gets (size, inpainting).
    """
    given = {**pipeline.settings(**settings).as_json(), **(more or {})}
    order = Order(out, "", cutouts, given, keep_loops=keep_loops)
    draw_order(order, pipeline, jobs, batch_size=batch_size, manifest=manifest)


def draw_order(
    order: Order,
    pipeline: SubjectPipeline,
    jobs: Sequence[Job],
    *,
    batch_size: int,
    manifest: str = MANIFEST,
    workers: Workers = HERE,
) -> None:
    """Draw the images that `order.out` does not have yet. (One that is there is left out, even if its loops are not.)

    pipeline: the order's model, loaded.

    Raises:
        InputError: the folder holds images of other settings, another model or other references.
    """
    out = order.out
    make_folder(out)
    chosen = pipeline.Settings.given({}, {name: order.given[name] for name in pipeline.settings().as_json()})
    used = settings_used(order, pipeline, jobs, chosen)
    lines = read_manifest(out)
    todo = [job for job in jobs if not is_finished(out, job, lines.get(job.file), used[job])]
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} images are finished already")
    forget(out, {job.file for job in todo if job.file in lines}, manifest)
    batches = list(in_batches(todo, order, batch_size))
    several = len(batches) > 2
    pipeline.set_progress_bar_config(disable=several or None)
    try:
        if workers.count > 1:
            console.print(f"{len(todo)} images by {workers.count} workers")
            make = partial(make_drawer, replace(order, out=out.absolute()), workers.threads, os.getcwd())
            how: Any = {"executor": workers.executor, "workers": workers.count, "threads": workers.threads}
            drawn: Iterable[Sequence[Job]] = filter(None, execute(make, batches, **how))
        else:
            drawer = Drawer(order, pipeline)
            if len(batches) > 20:  # on fewer, its trial steps would take a good part of the time
                announce(drawer, batches[0], chosen, len(todo))
            drawn = map(drawer.draw, batches)
        for batch in track(drawn, f"drawing {out.name}", len(batches), console=console, disable=not several):
            for job in batch:
                note(out, job, method=pipeline.method, settings=used[job], manifest=manifest)
    except InputError:
        with contextlib.suppress(OSError):
            out.rmdir()  # nothing was drawn: leave no empty folder behind
        raise


def settings_used(
    order: Order, pipeline: SubjectPipeline, jobs: Sequence[Job], chosen: SamplingSettings
) -> dict[Job, dict[str, Any]]:
    """For the manifest: all that a picture depends on besides its prompt and seed, as JSON gives it back."""
    common = {name: picture_digest(one) if isinstance(one, Image.Image) else one for name, one in order.given.items()}
    common["scheduler"] = type(pipeline.scheduler_of(chosen)).__name__
    names = {job.subject.name for job in jobs}
    references = {name: [picture_digest(one) for one in order.cutouts[name]] for name in names}
    if order.deltas:
        models = {name: folders_digest(order.deltas[name]) for name in names}
    else:
        models = dict.fromkeys(names, model_digest(pipeline))
    told = {name: {**common, "model": models[name], "references": references[name]} for name in names}
    told = {name: json.loads(json.dumps(one)) for name, one in told.items()}
    return {job: told[job.subject.name] for job in jobs}


def save_loops(out: Path, job: Job, versions: Sequence[Image.Image]) -> None:
    """`loops/SUBJECT/PROMPT_INDEX/SEED/NUMBER.png`: 00 before the first loop."""
    folder = out / LOOPS / Path(job.file).with_suffix("")
    make_folder(folder)
    for number, version in enumerate(versions):
        version.save(folder / f"{number:02d}.png")


def is_finished(out: Path, job: Job, line: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> bool:
    """Whether the image is there, whole, and drawn as it would be drawn now."""
    if line is None or not (out / job.file).exists():
        return False
    now = {"prompt": job.prompt, **settings}
    then = {"prompt": line.get("prompt"), **line.get("settings", {})}
    # The model's digest last: it says least.
    names = sorted({*now, *then}, key=lambda name: (name == "model", name))
    other = [name for name in names if now.get(name) != then.get(name)]
    if other:
        raise InputError(
            f"{out} holds images that were drawn otherwise: {job.file} with {other[0]}={then.get(other[0])!r}, now "
            f"{now.get(other[0])!r}. Give another --out, or delete the folder"
        )
    return is_whole(out / job.file)  # a torn one is drawn again


def in_batches(jobs: Sequence[Job], order: Order, size: int) -> Iterator[list[Job]]:
    """Neighbours; those of a batch have equally many references, and the same weights."""

    def kind(job: Job) -> tuple[int, str]:
        name = job.subject.name
        return len(order.cutouts[name]), name if order.deltas else ""

    for _, group in groupby(jobs, key=kind):
        alike = list(group)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


def announce(drawer: Drawer, batch: Sequence[Job], chosen: SamplingSettings, count: int) -> None:
    """Say how long `count` images will take, at most, from a few real steps of the first batch."""
    pipeline = drawer.pipeline
    pipeline.set_progress_bar_config(disable=True)
    seconds, steps, edits = {}, {}, drawer.order.given.get("image") is not None
    for number in (1, 2, 4):  # the first one warms up
        settings = replace(chosen, num_inference_steps=number)
        began = time.perf_counter()
        drawer.call(batch, **settings.as_json())
        seconds[number], steps[number] = time.perf_counter() - began, pipeline.steps_of(settings, edits=edits)
    per_step = max(0.0, seconds[4] - seconds[2]) / (steps[4] - steps[2])
    per_batch = seconds[4] + per_step * (pipeline.steps_of(chosen, edits=edits) - steps[4])
    console.print(f"{count} images, on this machine about {per_batch * count / len(batch) / 60:.1f} minutes")


def model_digest(pipeline: SubjectPipeline) -> str:
    """Of all that a model brings to a picture: weights, settings, noise schedule, vocabulary."""
    modules = [one for _, one in sorted(pipeline.components.items()) if isinstance(one, torch.nn.Module)]
    weights = digest(*(weight for module in modules for weight in module.parameters()))
    told = {"method": pipeline.method, "settings": pipeline.config.settings, **pipeline.model_options()}
    texts = (told, dict(pipeline.scheduler.config), pipeline.tokenizer.get_vocab())
    words = json.dumps(texts, sort_keys=True, default=str)
    return hashlib.sha256((weights + words).encode()).hexdigest()[:16]


def folders_digest(folders: Sequence[Path]) -> str:
    """Of the files of some deltas."""
    files = [sorted(path for path in folder.rglob("*") if path.is_file()) for folder in folders]
    return digest_of([path for of in files for path in of])


def picture_digest(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()[:16]
