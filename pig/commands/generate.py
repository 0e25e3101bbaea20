"""`generate`: draw one subject, or a whole benchmark into the images folder of the contract (`pig.data.images`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pig.commands.drawing import Order, Workers, draw_order, load_for
from pig.commands.options import Output, Subjects
from pig.data.images import MANIFEST, Job
from pig.data.subjects import Segment, SubjectFolder, load_cutout
from pig.errors import InputError
from pig.files import make_folder
from pig.methods import Source, default_device, find_model, load_pipeline, pipeline_class
from pig.models.cutting_out import CuttingOut
from pig.models.names import TOYWORLD
from pig.sampling.delta import deltas_of, kept_steps

log = logging.getLogger(__name__)
CUTOUTS = "cutouts"  # the folder for `--save_references`


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
    if what.subjects is None:
        for flag, given in (("--shard", parts > 1), ("--workers", output.workers > 1)):
            if given:
                raise InputError(f"{flag} is for --subjects")
        if source.tuned:
            load_pipeline(model)  # says what to give instead
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
        saved = out if output.save_references else None
        cutouts = cut_out_all(mine, what.references_per_subject, cutting_out.make(), saved)
    deltas = deltas_of_subjects(source, mine, what)
    workers = Workers(output.workers, output.executor, output.threads)
    order = Order(
        out=out,
        model=model,
        cutouts=cutouts,
        given={**chosen.as_json(), "height": output.height, "width": output.width, **pictures},
        deltas=deltas,
        keep_loops=output.save_loops,
        reference_cache=output.reference_cache,
    )
    pipeline = load_for(order, default_device() if workers.count == 1 else "cpu")
    size = (output.height, output.width)
    if pictures:
        size = (pictures["image"].height, pictures["image"].width)
    for doubt in pipeline.doubts([job.prompt for job in jobs], *size):
        log.warning(doubt)
    manifest = MANIFEST if parts == 1 else f"manifest-{part}-of-{parts}.jsonl"
    draw_order(order, pipeline, jobs, batch_size=output.batch_size, manifest=manifest, workers=workers)
    if what.subjects is None:
        for job in jobs:
            print(out / job.file)


def refuse_steps(source: Source, what: Subjects) -> None:
    """
    Raises:
        InputError: steps of a tuning are named, and the model has none, or is blended of others.
    """
    named = {"--step": what.step, "--early": what.early, "--late": what.late}
    fitting = () if not source.tuned else ("--early", "--late") if source.blended else ("--step",)
    for flag, value in named.items():
        if value is not None and flag not in fitting:
            wanted = "a folder made by `tune`" if flag == "--step" else "--model dreamblend:FOLDER"
            raise InputError(f"{flag} is for {wanted}")


def deltas_of_subjects(
    source: Source, subjects: Sequence[SubjectFolder], what: Subjects
) -> dict[str, tuple[Path, ...]]:
    """Of a folder of tuned subjects: each one's own weights; early and late ones where they are blended."""
    refuse_steps(source, what)
    if not source.tuned:
        return {}
    assert source.folder is not None
    names = [subject.name for subject in subjects]
    if not source.blended:
        return {name: (one,) for name, one in deltas_of(source.folder, names, what.step).items()}
    steps = list(kept_steps(source.folder / names[0]))
    early = steps[0] if what.early is None and steps else what.early
    pairs = [deltas_of(source.folder, names, step, flag) for flag, step in (("--early", early), ("--late", what.late))]
    late = steps[-1] if what.late is None else what.late
    assert early is not None
    if early > late:
        raise InputError(f"--early {early} is later than --late {late}: exchange them")
    return {name: (pairs[0][name], pairs[1][name]) for name in names}


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N` with 0 <= I < N."""
    part, slash, parts = text.partition("/")
    if not (slash and text.isascii() and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise InputError(f"--shard must be I/N with I from 0 to N - 1, such as 0/4, got {text!r}")
    return int(part), int(parts)


def cut_out_all(
    subjects: Sequence[SubjectFolder], count: int | None, segment: Segment | None = None, out: Path | None = None
) -> dict[str, list[Image.Image]]:
    """Subject -> RGBA cut-outs of its first `count` pictures; into `out`, too, where given."""
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
                cutout.save(shown)
    if mistakes:
        more = f" (and {len(mistakes) - 5} more)" if len(mistakes) > 5 else ""
        raise InputError("\n".join(mistakes[:5]) + more)
    return found
