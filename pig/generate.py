"""`generate`: draw one subject, or a whole benchmark into the images folder of the contract (`pig.data.images`)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError

from pig.attention import Pooling
from pig.data.images import MANIFEST, Job, forget, make_folder, read_manifest, save_generated
from pig.data.subjects import Segment, SubjectFolder, load_cutout, read_subjects
from pig.data.transforms import load_image, reference_picture
from pig.errors import InputError, check_ranges
from pig.methods.bootpig import BootPIG
from pig.models.backbone import TOYWORLD, Backbone, SchedulerName, check_backbone
from pig.models.foreground import DETECTOR, SegmenterName, make_segmenter
from pig.pipelines import BootPIGPipeline
from pig.pipelines.bootpig import ReferenceCaption, ReferenceNoise
from pig.pipelines.inpainting import check_mask
from pig.pipelines.references import ReferenceCache, digest

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".th", ".joblib", ".npy", ".npz")
CUTOUTS = "cutouts"  # the folder for `--save_references`
console = Console()


def load_pipeline(model: str | Path) -> BootPIGPipeline:
    """An exported model's folder, or `toyworld` for the embedded one; on the GPU if there is one.

    Raises:
        InputError: it is no such folder, a torn one, or one that holds pickles, which can run code when loaded.
    """
    folder = Path(model)
    if str(model) == TOYWORLD:
        pipeline = BootPIG.embedded().pipeline()
    elif not (folder / "model_index.json").is_file():
        raise InputError(f"{model} is no exported model: it has no model_index.json (make one with `export`)")
    else:
        pickles = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICKLES)
        if pickles:
            raise InputError(
                f"{model} holds {pickles[0].relative_to(folder)}, a pickle, which can run any code: only safetensors "
                "are loaded. Convert it where you trust it, or remove it"
            )
        try:
            pipeline = BootPIGPipeline.from_pretrained(model, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
            raise InputError(f"{model} is no exported BootPIG, or a torn one: {str(error).splitlines()[0]}") from error
        parts = (pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.base_unet, pipeline.scheduler)
        check_backbone(Backbone(*parts))
    pipeline.set_progress_bar_config(disable=None)
    return pipeline.to(default_device())


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def generate(
    out: Path,
    references: list[Path] | None = None,
    prompt: list[str] | None = None,
    subjects: Path | None = None,
    prompts: Path | None = None,
    model: str = TOYWORLD,
    text_only: str | None = None,
    images_per_prompt: int = 4,
    seed: int = 0,
    image_guidance: float | None = None,
    text_guidance: float | None = None,
    strength: float = 1.0,
    negative_prompt: str = "",
    guidance_rescale: float = 0.0,
    steps: int = 50,
    scheduler: SchedulerName | None = None,
    height: int | None = None,
    width: int | None = None,
    pooling: Pooling | None = None,
    reference_caption: ReferenceCaption | None = None,
    reference_noise: ReferenceNoise = "fresh",
    guidance_interval: list[float] | None = None,
    reference_every: int = 1,
    deep_every: int = 1,
    image: Path | None = None,
    mask: Path | None = None,
    segmenter: SegmenterName = "none",
    sam: str = TOYWORLD,
    detector: str = DETECTOR,
    class_noun: str = "",
    box: list[float] | None = None,
    point: list[float] | None = None,
    save_references: bool = False,
    references_per_subject: int | None = None,
    batch_size: int = 8,
    shard: str = "0/1",
    reference_cache: float = 0.0,
) -> None:
    """Draw the subject of the reference pictures; or, with --subjects, a whole benchmark.

    Args:
        out: folder for the images, `SUBJECT/PROMPT_INDEX/SEED.png` (`references` is the subject's name where
            --references are given), and `manifest.jsonl`. What is finished in it is not drawn again.
        references: pictures of one subject. The object is found by the picture's own alpha, else by a
            `NAME.mask.png` beside it, else by the segmenter.
        prompt: one or several, such as "a photo of a mug, on a beach".
        subjects: in place of references and prompt: a folder of subjects in DreamBooth's layout.
        prompts: for --subjects: the prompts file, by default the folder's own `prompts_and_classes.txt`.
        model: an exported model's folder, or `toyworld`.
        text_only: in place of a model: a Stable Diffusion (folder, hub id or `toyworld`), which draws the prompts
            without looking at the references; what a benchmark's scores are measured from.
        images_per_prompt: with seeds `seed`, `seed + 1`, ...
        seed: of the first image of each prompt.
        image_guidance: how closely to follow the references (eta_im of Eq. 4); by default as the model says: 5 in the
            paper.
        text_guidance: how closely to follow the prompt (eta_text+im of Eq. 4); by default as the model says: 7.5 in
            the paper, 1.5 for the toy.
        strength: of the references: from 0, the base model alone, to 1.
        negative_prompt: what to keep away from.
        guidance_rescale: from 0 to 1; against the overdone contrast of strong guidance.
        steps: of the sampler.
        scheduler: the sampler: unipc, ddim or dpm++; by default the model's own (unipc in the paper).
        height: in pixels, a multiple of 8; the model's own by default.
        width: likewise.
        pooling: how several references are merged: softmax, argmax, mean or concat; by default the model's own.
        reference_caption: what the Reference UNet is told: the whole caption, or the object alone (up to the first
            comma), for which all prompts of a subject share its passes; by default the model's own.
        reference_noise: fresh at every step, or fixed.
        guidance_interval: faster, with a loss: two shares of the steps between which guidance is used.
        reference_every: faster, with a loss: read the references only at every so many steps.
        deep_every: faster, with a loss: compute deep features only at every so many steps.
        image: inpainting: the picture to draw into.
        mask: inpainting: of the picture's size, white where to draw.
        segmenter: none (the picture is taken as it is), sam, grounded-sam (needs a class noun) or rembg.
        sam: `toyworld` or Meta's file, such as sam_vit_h_4b8939.pth.
        detector: of grounded-sam: a Grounding DINO in transformers' format.
        class_noun: what the references show; with --subjects the classes are known.
        box: for sam: where the object is, x0 y0 x1 y1 in pixels (all references alike).
        point: for sam: x y of a pixel of the object.
        save_references: write what was cut out into `OUT/cutouts`.
        references_per_subject: use the first so many pictures; all by default.
        batch_size: images drawn at a time.
        shard: for --subjects, I/N: draw the I-th of N equal parts (I from 0), on as many devices or machines.
        reference_cache: GiB of memory for what was read of references, to be used again.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, not a folder")
    if not 0 <= seed < 2**63 - images_per_prompt:
        raise InputError(f"--seed must lie between 0 and 2^63, got {seed}")
    if images_per_prompt < 1 or batch_size < 1:
        raise InputError("--images_per_prompt and --batch_size must be at least 1")
    check_ranges(reference_cache=(reference_cache, 0, 4096))
    if guidance_interval is not None and len(guidance_interval) != 2:
        raise InputError(f"--guidance_interval is two shares of the steps, got {guidance_interval}")
    if (image is None) != (mask is None):
        raise InputError("inpainting needs both --image and --mask")
    part, parts = parse_shard(shard)
    if subjects is not None:
        if references or prompt or image is not None:
            raise InputError("--subjects has references and prompts of its own; leave --references, --prompt, --image")
        known = read_subjects(subjects, prompts)
    elif references and prompt:
        if not all(text.strip() for text in prompt):
            raise InputError("--prompt: an empty prompt")
        if prompts is not None or parts > 1:
            raise InputError("--prompts and --shard are for --subjects")
        templates = tuple(text.replace("{", "{{").replace("}", "}}") for text in prompt)
        known = [SubjectFolder("references", class_noun, tuple(references), templates)]
    else:
        raise InputError("give --references and --prompt; or --subjects, for a whole benchmark")

    pictures: dict[str, Any] = {}
    if image is not None and mask is not None:
        pictures = {"image": load_image(image).convert("RGB"), "mask_image": load_image(mask)}
        check_mask(pictures["image"], pictures["mask_image"])
    jobs = [
        Job(subject, index, one)
        for subject in known
        for index in range(len(subject.prompts))
        for one in range(seed, seed + images_per_prompt)
    ]
    jobs = jobs[len(jobs) * part // parts : len(jobs) * (part + 1) // parts]
    # Cut out now, before anything long: a photograph without an object must not end a benchmark in the middle.
    segment = make_segmenter(segmenter, sam=sam, detector=detector, box=box, point=point, device=default_device())
    mine = list(dict.fromkeys(job.subject for job in jobs))
    cutouts = cut_out_all(mine, references_per_subject, segment, out if save_references else None)
    pipeline = load_pipeline(model) if text_only is None else BootPIG(text_only).pipeline().to(default_device())
    if scheduler is not None:
        pipeline.use_scheduler(scheduler)
    if reference_cache > 0:
        pipeline.reference_cache = ReferenceCache(int(reference_cache * 2**30))
    settings: dict[str, Any] = {
        "image_guidance": image_guidance,
        "text_guidance": text_guidance,
        "strength": strength if text_only is None else 0.0,
        "negative_prompt": negative_prompt,
        "guidance_rescale": guidance_rescale,
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "pooling": pooling,
        "reference_caption": reference_caption,
        "reference_noise": reference_noise,
        "guidance_interval": (0.0, 1.0) if guidance_interval is None else tuple(guidance_interval),
        "reference_every": reference_every,
        "deep_every": deep_every,
    }
    manifest = MANIFEST if parts == 1 else f"manifest-{part}-of-{parts}.jsonl"
    draw_jobs(pipeline, jobs, cutouts, out, settings, pictures=pictures, batch_size=batch_size, manifest=manifest)
    if subjects is None:
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
    pipeline: BootPIGPipeline,
    jobs: Sequence[Job],
    cutouts: Mapping[str, Sequence[Image.Image]],
    out: Path,
    settings: Mapping[str, Any],
    *,
    pictures: Mapping[str, Any] | None = None,
    batch_size: int,
    manifest: str = MANIFEST,
) -> None:
    """Draw the images that `out` does not have yet, with these settings of the pipeline's call.

    cutouts: the references of each subject, by its name. pictures: what else the call gets (inpainting).

    Raises:
        InputError: `out` holds images of other settings, another model or other references.
    """
    make_folder(out)
    common = {
        **settings,
        **{name: picture_digest(one) for name, one in (pictures or {}).items()},
        "scheduler": type(pipeline.scheduler).__name__,
        "model": model_digest(pipeline),
    }
    digests = {name: [picture_digest(one) for one in cutouts[name]] for name in {job.subject.name for job in jobs}}
    used = {job: json.loads(json.dumps({**common, "references": digests[job.subject.name]})) for job in jobs}
    lines = read_manifest(out)
    todo = [job for job in jobs if not is_finished(out, job, lines.get(job.file), used[job])]
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} images are finished already")
    forget(out, {job.file for job in todo if job.file in lines})
    batches = list(in_batches(todo, cutouts, batch_size))
    several = len(batches) > 2
    pipeline.set_progress_bar_config(disable=several or None)
    try:
        if several:
            announce(pipeline, batches[0], cutouts, settings, len(todo))
        for batch in track(batches, f"drawing {out.name}", console=console) if several else batches:
            drawn = pipeline(
                [job.prompt for job in batch],
                [cutouts[job.subject.name] for job in batch],
                generator=[torch.Generator().manual_seed(job.seed) for job in batch],
                **settings,
                **(pictures or {}),
            )
            for job, picture in zip(batch, drawn.images, strict=True):
                save_generated(out, job, picture, method="BootPIG", settings=used[job], manifest=manifest)
    except InputError:
        with contextlib.suppress(OSError):
            out.rmdir()  # nothing was drawn: leave no empty folder behind
        raise


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
    pipeline: BootPIGPipeline,
    batch: Sequence[Job],
    cutouts: Mapping[str, Sequence[Image.Image]],
    settings: Mapping[str, Any],
    count: int,
) -> None:
    """Say how long `count` images will take, from one and two real steps of the first batch."""
    pipeline.set_progress_bar_config(disable=True)
    seconds = []
    for steps in (1, 1, 2):  # the first one warms up
        began = time.perf_counter()
        references = [cutouts[job.subject.name] for job in batch]
        pipeline([job.prompt for job in batch], references, **{**settings, "num_inference_steps": steps})
        seconds.append(time.perf_counter() - began)
    per_step = max(0.0, seconds[2] - seconds[1])
    per_batch = seconds[1] + per_step * (settings.get("num_inference_steps", 50) - 1)
    console.print(f"{count} images, on this machine about {per_batch * count / len(batch) / 60:.1f} minutes")


def model_digest(pipeline: BootPIGPipeline) -> str:
    """Of all that a model brings to a picture: weights, settings, noise schedule, vocabulary."""
    modules = (pipeline.base_unet, pipeline.reference_unet, pipeline.vae, pipeline.text_encoder)
    weights = digest(*(weight for module in modules for weight in module.parameters()))
    told = {name: value for name, value in pipeline.config.items() if not name.startswith("_")}
    texts = (told, dict(pipeline.scheduler.config), pipeline.tokenizer.get_vocab())
    words = json.dumps(texts, sort_keys=True, default=str)
    return hashlib.sha256((weights + words).encode()).hexdigest()[:16]


def picture_digest(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()[:16]
