"""`generate`: draw one subject, or a whole benchmark into the images folder of the contract (`pig.data.images`)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from pig.commands.options import CuttingOut, Output, Subjects
from pig.data.images import MANIFEST, Job, forget, make_folder, read_manifest, save_generated
from pig.data.subjects import Segment, SubjectFolder, load_cutout
from pig.data.transforms import load_image, reference_picture
from pig.errors import InputError
from pig.methods import find_model, load_pipeline, pipeline_class
from pig.models.backbone import TOYWORLD
from pig.sampling.pipeline import SubjectPipeline
from pig.sampling.references import ReferenceCache, digest
from pig.sampling.settings import SamplingSettings

CUTOUTS, LOOPS = "cutouts", "loops"  # the folders for `--save_references` and `--save_loops`
console = Console()


def generate(
    out: Path,
    model: str = TOYWORLD,
    what: Subjects | None = None,
    cutting_out: CuttingOut | None = None,
    output: Output | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Draw the subject of the reference pictures; or, with --subjects, a whole benchmark.

    Args:
        out: folder for the images, `SUBJECT/PROMPT_INDEX/SEED.png` (`references` is the subject's name where
            --references are given), and `manifest.jsonl`. What is finished in it is not drawn again.
        model: MODEL_FORMS. `--model X --help` lists that model's own controls.
        settings: the model's controls.
    """
    what, cutting_out, output = what or Subjects(), cutting_out or CuttingOut(), output or Output()
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, not a folder")
    output.check()
    source = find_model(model)
    kind = pipeline_class(source.method)
    if output.reference_cache > 0 and not kind.reads_references:
        raise InputError(f"--reference_cache: {model} reads no references")
    if output.save_loops and not kind.has_loops:
        raise InputError(f"--save_loops: {model} draws without loops")
    chosen = kind.Settings.given(source.settings, settings or {})
    part, parts = parse_shard(output.shard)
    known = what.read(kind.reads_references)
    if what.subjects is None and parts > 1:
        raise InputError("--shard is for --subjects")
    pictures = what.pictures()
    jobs = [
        Job(subject, index, one)
        for subject in known
        for index in range(len(subject.prompts))
        for one in range(output.seed, output.seed + output.images_per_prompt)
    ]
    jobs = jobs[len(jobs) * part // parts : len(jobs) * (part + 1) // parts]
    for job in jobs:
        kind.check_prompt(job.prompt, job.subject.class_noun, chosen)
    # Cut out now, before anything long: a photograph without an object must not end a benchmark in the middle.
    mine = list(dict.fromkeys(job.subject for job in jobs))
    cutouts: dict[str, list[Image.Image]] = {subject.name: [] for subject in mine}
    if kind.reads_references:
        saved = out if cutting_out.save_references else None
        cutouts = cut_out_all(mine, what.references_per_subject, cutting_out.make(), saved)
    pipeline = load_pipeline(model)
    if output.reference_cache > 0:
        pipeline.reference_cache = ReferenceCache(int(output.reference_cache * 2**30))
    manifest = MANIFEST if parts == 1 else f"manifest-{part}-of-{parts}.jsonl"
    more = {"height": output.height, "width": output.width, **pictures}
    draw_jobs(
        pipeline,
        jobs,
        cutouts,
        out,
        chosen.as_json(),
        more=more,
        batch_size=output.batch_size,
        manifest=manifest,
        keep_loops=output.save_loops,
    )
    if what.subjects is None:
        for job in jobs:
            print(out / job.file)


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N` with 0 <= I < N."""
    part, slash, parts = text.partition("/")
    if not (slash and text.isascii() and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise InputError(f"--shard must be I/N with I from 0 to N - 1, such as 0/4, got {text!r}")
    return int(part), int(parts)


def cut_out_all(
    subjects: Sequence[SubjectFolder], count: int | None, segment: Segment | None = None, out: Path | None = None
) -> dict[str, list[Image.Image]]:
    """Subject -> RGBA cut-outs of its first `count` pictures; on white into `out`, where given."""
    if count is not None and count < 1:
        raise InputError(f"--references_per_subject must be at least 1, got {count}")
    found: dict[str, list[Image.Image]] = {}
    mistakes = []
    for subject in subjects:
        found[subject.name] = []
        for number, path in enumerate(subject.images[:count]):
            try:
                cutout = load_cutout(path, segment, subject.class_noun)
            except InputError as error:
                mistakes.append(str(error))
                continue
            found[subject.name].append(cutout)
            if out is not None:
                shown = out / CUTOUTS / subject.name / f"{number:02d}_{path.stem}.png"
                make_folder(shown.parent)
                reference_picture(cutout, max(cutout.size)).save(shown)
    if mistakes:
        more = f" (and {len(mistakes) - 5} more)" if len(mistakes) > 5 else ""
        raise InputError("\n".join(mistakes[:5]) + more)
    return found


def draw_jobs(
    pipeline: SubjectPipeline,
    jobs: Sequence[Job],
    cutouts: Mapping[str, Sequence[Image.Image]],
    out: Path,
    settings: Mapping[str, Any],
    *,
    more: Mapping[str, Any] | None = None,
    batch_size: int,
    manifest: str = MANIFEST,
    keep_loops: bool = False,
) -> None:
    """Draw the images that `out` does not have yet, with these settings; the rest as the model has it.

    cutouts: the references of each subject, by its name. more: what else the pipeline's call gets (size, inpainting).
    keep_loops: write each loop's picture, too; those of finished images are not drawn again.

    Raises:
        InputError: `out` holds images of other settings, another model or other references.
    """
    make_folder(out)
    chosen, more = pipeline.settings(**settings), more or {}
    given = {**chosen.as_json(), **more}
    common = {
        **{name: picture_digest(one) if isinstance(one, Image.Image) else one for name, one in given.items()},
        "scheduler": type(pipeline.scheduler_of(chosen)).__name__,
        "model": model_digest(pipeline),
    }
    digests = {name: [picture_digest(one) for one in cutouts[name]] for name in {job.subject.name for job in jobs}}
    used = {job: json.loads(json.dumps({**common, "references": digests[job.subject.name]})) for job in jobs}
    lines = read_manifest(out)
    todo = [job for job in jobs if not is_finished(out, job, lines.get(job.file), used[job])]
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} images are finished already")
    forget(out, {job.file for job in todo if job.file in lines}, manifest)
    batches = list(in_batches(todo, cutouts, batch_size))
    several = len(batches) > 2
    pipeline.set_progress_bar_config(disable=several or None)
    try:
        if several:
            announce(pipeline, batches[0], cutouts, chosen, more, len(todo))
        for batch in track(batches, f"drawing {out.name}", console=console) if several else batches:
            drawn = pipeline(
                [job.prompt for job in batch],
                [cutouts[job.subject.name] for job in batch],
                class_noun=[job.subject.class_noun for job in batch],
                generator=[torch.Generator().manual_seed(job.seed) for job in batch],
                keep_loops=keep_loops,
                **given,
            )
            for row, (job, picture) in enumerate(zip(batch, drawn.images, strict=True)):
                if drawn.loops is not None:
                    save_loops(out, job, drawn.loops[row])
                save_generated(out, job, picture, method=pipeline.method, settings=used[job], manifest=manifest)
    except InputError:
        with contextlib.suppress(OSError):
            out.rmdir()  # nothing was drawn: leave no empty folder behind
        raise


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
    try:
        load_image(out / job.file)
    except InputError:  # torn: it is drawn again
        return False
    return True


def in_batches(jobs: Sequence[Job], cutouts: Mapping[str, Sequence[Image.Image]], size: int) -> Iterator[list[Job]]:
    """Neighbours; the references of a batch must be equally many for all."""
    for _, group in groupby(jobs, key=lambda job: len(cutouts[job.subject.name])):
        alike = list(group)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


def announce(
    pipeline: SubjectPipeline,
    batch: Sequence[Job],
    cutouts: Mapping[str, Sequence[Image.Image]],
    chosen: SamplingSettings,
    more: Mapping[str, Any],
    count: int,
) -> None:
    """Say how long `count` images will take, at most, from a few real steps of the first batch."""
    pipeline.set_progress_bar_config(disable=True)
    prompts, references = [job.prompt for job in batch], [cutouts[job.subject.name] for job in batch]
    nouns = [job.subject.class_noun for job in batch]
    seconds, steps, edits = {}, {}, more.get("image") is not None
    for number in (1, 2, 4):  # the first one warms up
        settings = replace(chosen, num_inference_steps=number)
        began = time.perf_counter()
        pipeline(prompts, references, class_noun=nouns, **more, **settings.as_json())
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


def picture_digest(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()[:16]
