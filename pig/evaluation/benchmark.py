"""Score a folder of generated images against a folder of subjects. Reads image files only, whatever made them."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pig.data.images import drawn_subject
from pig.data.subjects import Segment, SubjectFolder, read_subjects
from pig.errors import InputError, check_ranges, check_text
from pig.evaluation.checks import check, missing_message, some
from pig.evaluation.comparison import Comparison, copy_notes, groups, size_notes
from pig.evaluation.embeddings import Embedder
from pig.evaluation.protocols import DREAMBOOTH, Protocol, ProtocolName, protocol_named
from pig.evaluation.report import write_report
from pig.evaluation.results import Result, summarise
from pig.evaluation.tables import score_table, write_tables
from pig.files import digest, make_folder
from pig.models.encoders import Clip, ImageEncoder, load_clip, load_dino
from pig.models.foreground import make_segmenter
from pig.models.names import DETECTOR, TOYWORLD, RembgModel, SegmenterName

LIBRARIES = ("torch", "torchvision", "pillow", "transformers", "open_clip_torch", "timm", "torchmetrics")
console = Console(soft_wrap=True)


class Scorer:
    """Scores folders by one protocol with the same networks.

    Args:
        cache: folder for what the networks saw (see `Embedder`).
        segment: finds the object, for scores without the background.
        allow_missing: score what is there, where images are missing or unreadable, and say so in the result.
        left_out: subjects whose images may lie in the folders, too, and do not count.
    """

    def __init__(
        self,
        clip: Clip,
        dino: ImageEncoder,
        cache: Path,
        protocol: Protocol = DREAMBOOTH,
        segment: Segment | None = None,
        *,
        allow_missing: bool = False,
        batch_size: int = 32,
        left_out: Collection[str] = (),
    ) -> None:
        self.clip, self.protocol, self.allow_missing = clip, protocol, allow_missing
        self.left_out = left_out
        self.networks: dict[str, Any] = {"clip": clip.identity, "dino": dino.identity}
        if segment is not None:
            self.networks["segmenter"] = segment.identity
        self.cache, self.embed = cache, Embedder(clip, dino, cache, segment, batch_size)

    def score(
        self,
        images: Path,
        subjects: Sequence[SubjectFolder],
        *,
        images_per_prompt: int | None = None,
        text_only: Path | None = None,
        name: str | None = None,
    ) -> Result:
        """
        Args:
            images: `SUBJECT/PROMPT_INDEX/SEED.png`.
            images_per_prompt: expected number of images per prompt; default: the largest number that any prompt has.
            text_only: the base model's images, in the same layout.

        Raises:
            InputError: names what is missing, unreadable or contradictory; see `check`.
        """
        found, notes, missing = check(images, subjects, images_per_prompt, self.left_out)
        base, _, base_missing = check(text_only, subjects, None, self.left_out) if text_only else ([], [], [])
        missing += base_missing
        if missing and not self.allow_missing:
            raise InputError(missing_message(missing))
        nouns = {path: subject.class_noun for subject in subjects for path in subject.images}
        nouns |= {one.path: one.subject.class_noun for one in (*found, *base)}
        looked, unreadable = self.embed(nouns)
        if unreadable and not self.allow_missing:
            raise InputError(
                f"{some([f'{path}: {reason}' for path, reason in unreadable.items()])}\n"
                "Mend or remove them, or give --allow_missing to score the rest. What was looked at is kept: the next "
                "run takes seconds"
            )
        missing += [str(path) for path in unreadable]
        if missing:
            notes.append(f"scored is what is there: {len(missing)} entries under `missing`")
        comparison = Comparison(subjects, self.protocol, self.clip, looked)
        for subject, paths in comparison.photographs.items():
            if not paths:
                raise InputError(f"no photograph of {subject!r} can be read: nothing can be compared with it")
        rows = comparison.rows(found)
        if not rows:
            raise InputError(f"none of the images in {images} can be read")
        metrics = comparison.metrics(rows)
        scores, by_subject = summarise(metrics), comparison.by_subject(metrics)
        limits = comparison.bounds(by_subject)
        bounds = {name: summarise(of) for name, of in limits.items()}
        if base:
            of_base = comparison.metrics(comparison.rows(base))
            bounds["text_only"] = summarise(of_base)
            if unlike := set(by_subject) ^ set(comparison.by_subject(of_base)):
                notes.append(f"the base model's images are of other subjects: {', '.join(sorted(unlike))}")
        notes += size_notes(rows) + copy_notes(rows, by_subject, comparison.by_subject(limits["real"]))
        if "dino_masked" in scores and (blind := sum("dino_masked" not in row.told for row in rows)):
            notes.append(f"no object was found in {blind} images: they have no masked scores")
        moves = {
            "protocol": asdict(self.protocol),
            **self.networks,
            "subjects": {
                one.name: [one.prompts, one.templates, [looked[path].key for path in comparison.photographs[one.name]]]
                for one in subjects
            },
            "libraries": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        }
        return Result(
            protocol=self.protocol.name,
            hash=digest(moves, sort_keys=True),
            name=name or images.resolve().name,
            scores=scores,
            subjects=by_subject,
            groups={group: comparison.summary(of) for group, of in groups(rows).items()},
            bounds=bounds,
            images=[row.told for row in rows],
            photographs={
                subject: [{"file": str(path.absolute()), "key": looked[path].key} for path in paths]
                for subject, paths in comparison.photographs.items()
            },
            missing=missing,
            notes=notes,
            images_folder=str(images.absolute()),
            moves=moves,
            folder=self.cache,
        )


@dataclass
class Photographs:
    """What the images are compared with: the pictures of a benchmark's subjects, or of one subject."""

    subjects: Path | None = None
    """A folder of subjects in DreamBooth's layout."""
    references: list[Path] | None = None
    """In place of --subjects: the pictures that you gave to `generate --references`."""
    class_noun: str = ""
    """With --references and --segmenter grounded-sam: the class of the object, such as mug."""
    prompts: Path | None = None
    """The prompts file, by default the subjects folder's own `prompts_and_classes.txt`."""
    only: list[str] | None = None
    """Score only these subjects, by their folders' names."""

    def read(self, images: Path) -> list[SubjectFolder]:
        """
        Raises:
            InputError: what is given does not fit together, or cannot be read.
        """
        if self.subjects is not None and self.references is None:
            return read_subjects(self.subjects, self.prompts, self.only)
        if self.references is None or self.subjects is not None:
            raise InputError(
                "give --subjects, a benchmark's folder, or --references, the pictures that were drawn from"
            )
        if self.prompts is not None or self.only is not None:
            raise InputError("--prompts and --only are for --subjects")
        return [drawn_subject(self.references, images, self.class_noun)]

    def left_out(self) -> set[str]:
        """Names of the folder's subjects that are not scored."""
        if self.subjects is None or self.only is None:
            return set()
        return {one.name for one in read_subjects(self.subjects, self.prompts)} - set(self.only)


@dataclass
class Scoring:
    """By which rules and networks."""

    protocol: ProtocolName = "dreambooth"
    """The scoring rules. `dreambooth` is the standard; the others reproduce deviations that others' results have."""
    clip: str = TOYWORLD
    """`toyworld`; a folder in transformers' or open_clip's format; a hub id; `open_clip:MODEL/WEIGHTS`."""
    dino: str = TOYWORLD
    """`toyworld`; a folder in transformers' or timm's format; a hub id; `timm:MODEL`."""
    segmenter: SegmenterName = "none"
    """Also score the objects alone, on white: sam, grounded-sam, rembg; or none."""
    sam: str = TOYWORLD
    """For --segmenter sam and grounded-sam: `toyworld` or Meta's file, such as sam_vit_h_4b8939.pth."""
    detector: str = DETECTOR
    """For --segmenter grounded-sam: a Grounding DINO model in transformers' format."""
    rembg_model: RembgModel = "isnet-general-use"
    """For --segmenter rembg: u2netp, isnet-general-use or birefnet-general; see `generate --help`."""
    batch_size: int = 32
    """Images per forward pass."""

    def scorer(self, cache: Path, *, allow_missing: bool, left_out: Collection[str]) -> Scorer:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        rules = protocol_named(self.protocol)
        return Scorer(
            load_clip(self.clip, device),
            load_dino(self.dino, device, crop=rules.crop),
            cache,
            rules,
            make_segmenter(
                self.segmenter, sam=self.sam, detector=self.detector, rembg_model=self.rembg_model, device=device
            ),
            allow_missing=allow_missing,
            batch_size=self.batch_size,
            left_out=left_out,
        )

    def notes_on(self, scorer: Scorer) -> list[str]:
        """Why the numbers may not be what the protocol's name promises."""
        notes = []
        if TOYWORLD in (self.clip, self.dino):
            notes.append("scored with networks of the toy world: the numbers mean nothing outside of it")
        found, patch = scorer.networks["dino"]["network"], scorer.protocol.dino_patch
        if found != f"ViT, patches of {patch}":
            notes.append(f"{self.protocol} means DINO ViT-S/{patch}; this is a {found}")
        return notes


def evaluate(
    images: Path,
    out: Path,
    photographs: Photographs | None = None,
    scoring: Scoring | None = None,
    text_only: Path | None = None,
    images_per_prompt: int | None = None,
    allow_missing: bool = False,
    name: str | None = None,
) -> None:
    """Score a folder of generated images: results.json, tables (CSV, Markdown, LaTeX) and report.html.

    Args:
        images: folder of generated images, `SUBJECT/PROMPT_INDEX/SEED.png`, from any program.
        out: where the results go. Embeddings are cached there: a second run takes seconds, and a stopped run continues.
        text_only: images of the base model without references, for comparison (`generate --model base:NAME`).
        images_per_prompt: expected number of images per prompt; default: the largest number that any prompt has.
        allow_missing: if images are missing or unreadable, score the others and say so in the result.
        name: the method's name in the tables; default: the name of the images folder.
    """
    photographs, scoring = photographs or Photographs(), scoring or Scoring()
    check_ranges(
        batch_size=(scoring.batch_size, 1, 4096),
        images_per_prompt=(1 if images_per_prompt is None else images_per_prompt, 1, float("inf")),
    )
    check_text(name or "")
    if out.resolve().is_relative_to(images.resolve()):
        raise InputError(f"--out: {out} lies in the images folder {images}: give one outside of it")
    known, left_out = photographs.read(images), photographs.left_out()
    # Told before the networks are loaded, which may take long.
    for folder in (images, *([text_only] if text_only else [])):
        _, _, missing = check(folder, known, images_per_prompt if folder == images else None, left_out)
        if missing and not allow_missing:
            raise InputError(missing_message(missing))
    make_folder(out)
    scorer = scoring.scorer(out, allow_missing=allow_missing, left_out=left_out)
    result = scorer.score(images, known, images_per_prompt=images_per_prompt, text_only=text_only, name=name)
    if scorer.embed.rank > 0:
        return
    result.notes += scoring.notes_on(scorer)
    keep_result(result, out)


def keep_result(result: Result, out: Path) -> None:
    """Into files, and a summary onto the screen."""
    result.write(out)
    write_tables([result], out)
    write_report([result], out)
    console.print(score_table(result))
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    for file in ("report.html", "results.json", "table.md"):
        console.print(f"  {out / file}", highlight=False)
