"""`make demo`: the whole way on the toy world, from triplets to scores, by the commands that a user would give.

    python -m pig.demo [--out DIR] [--triplets SHARDS] [--beside DIR]

What is finished is kept: a demo that was stopped goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.progress import track

from pig.commands.drawing import draw_jobs
from pig.commands.generate import cut_out_all
from pig.data.grids import labelled_grid
from pig.data.images import MANIFEST, Job, save_generated
from pig.data.schema import Batch
from pig.data.shards import find_shards
from pig.data.subjects import SubjectFolder, read_subjects
from pig.data.transforms import load_image
from pig.evaluation.benchmark import Scorer
from pig.evaluation.figures import curve_svg, read_curve
from pig.evaluation.report import Section, figures_of, write_report
from pig.evaluation.tables import means_table
from pig.methods import load_pipeline
from pig.methods.bootpig import BootPIG
from pig.models.backbone import half_is_fast
from pig.models.encoders import load_clip, load_dino
from pig.models.names import TOYWORLD
from pig.pages import Markup, data_uri
from pig.toyworld import scene

CONFIG = Path("configs/bootpig/toyworld.yaml")
TRAINING_STEPS, BATCH_SIZE = 300, 16  # as in CONFIG; a test compares them
TRIPLETS, SUBJECTS, SEEDS = 8000, 24, (0, 1)
SAMPLING: dict[str, Any] = {"image_guidance": 5.0, "text_guidance": 1.5, "num_inference_steps": 20}
BASE = {"text_guidance": 3.0, "num_inference_steps": 20}  # the base model's usual guidance
SAMPLING_BATCH = 8
CONDITIONS = ("no_reference", "untrained", "trained_1_reference", "trained_3_references", "upper_bound")
# The other embedded models, which draw the grid's subjects only, from one reference: a column's head, and the settings
# that the tournament's trials chose.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ezigen": ("EZIGen", {"image_guidance": 3.0, "text_guidance": 1.5}),
    "instantbooth": ("InstantBooth", {"beta": 0.3, "alpha": 0.4, "text_guidance": 3.0}),
    "ip_adapter": ("IP-Adapter", {"scale": 1.5, "text_guidance": 5.0}),
}
OTHERS_SAMPLER = {"scheduler": "dpm++", "num_inference_steps": 20}
SHOWN = 8  # subjects of the grid
COLUMNS = (
    "reference",
    "reference",
    "reference",
    "base model",
    "before training",
    "trained, 1 ref.",
    "trained, 3 refs.",
    *(head for head, _ in OTHERS.values()),
)

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pig.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--triplets", type=Path, help="train on these shards; default: drawn ones, made first")
    parser.add_argument("--beside", type=Path, help="another demo's folder, to print its scores beside these")
    chosen = parser.parse_args()
    out: Path = chosen.out
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()

    began = time.perf_counter()
    data, triplets = out / "data", chosen.triplets or out / "data/triplets"
    if chosen.triplets is not None:
        find_shards(str(triplets))  # a mistyped folder is refused now, not after minutes
    announce(chosen.triplets)
    if chosen.triplets is None:
        run("data_gen", "triplets", out=triplets, count=TRIPLETS)
    run("data_gen", "triplets", out=data / "val", count=64, first_seed=scene.HELD_OUT_SEED + 10**8)
    run("data_gen", "subjects", out=data / "subjects", count=SUBJECTS)
    if not (out / "export/model_index.json").exists():
        last = out / "fit/checkpoints/last.ckpt"
        resume = {"ckpt_path": last} if last.exists() else {}
        run("pig.cli", "fit", **{"config": CONFIG, "run": out, "data.shards": triplets, **resume})
        run("pig.cli", "export", checkpoint=last, out=out / "export")
        for name in ("trained_1_reference", "trained_3_references"):  # another model's
            shutil.rmtree(condition_folder(out, name), ignore_errors=True)

    subjects = read_subjects(data / "subjects")
    draw_all(out, subjects)
    scorer = toy_scorer(out / "eval")
    results = [scorer.score(condition_folder(out, name), subjects, name=name) for name in CONDITIONS]
    scores = {result.name: {score: one["mean"] for score, one in result.scores.items()} for result in results}
    (out / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    summary = summarise(scores)
    draw_grid(out, subjects)
    # A run that was stopped before its first step has left no metrics.
    logs = [path.parent for path in (out / "fit").glob("version_*/metrics.csv")]
    logs.sort(key=lambda path: int(path.name.removeprefix("version_")))
    curve = read_curve([path / "metrics.csv" for path in logs], "train/loss")
    grid = data_uri((out / "grid.png").read_bytes(), "png")
    config = (logs[-1] / "config.yaml").read_text(encoding="utf-8")
    sections = [
        Section("Pictures", Markup('<img alt="grid of pictures" src="{}">').format(grid)),
        Section("Training loss", figures_of(curve_svg(curve))),
        Section("Settings", Markup("<pre>{}</pre>").format(config)),
    ]
    write_report(results, out, title="BootPIG on the toy world", summary=summary, sections=sections)
    console.print(means_table(scores))
    if chosen.beside is not None:
        other = chosen.beside / "scores.json"
        if other.exists():
            console.print(means_table(json.loads(other.read_text(encoding="utf-8")), f"{chosen.beside}"))
        else:
            console.print(f"(no {other} to put beside it: `make demo` makes one)")
    for line in summary:
        console.print(line)
    for name in ("report.html", "grid.png", "scores.json", "images", "export"):
        console.print(f"  {out / name}")
    console.print(f"took {(time.perf_counter() - began) / 60:.1f} minutes")


def announce(triplets: Path | None) -> None:
    """Say what will be done and, from one real training step and one real sampling step, how long it takes here."""
    module = BootPIG(TOYWORLD)
    pictures = torch.zeros(BATCH_SIZE, 3, 64, 64)
    seeds = torch.arange(BATCH_SIZE)
    words = ["a mug"] * BATCH_SIZE
    batch = Batch(pictures, pictures[:, None], words, words, seeds, words)
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast("cpu")):
            loss, _ = module.losses(batch, training=False)
        loss.mean().backward()
        per_step = time.perf_counter() - began
    pipeline = module.pipeline()
    reference = Image.new("RGB", (64, 64))
    began = time.perf_counter()
    pipeline(words[:SAMPLING_BATCH], [reference], num_inference_steps=1)
    images = SUBJECTS * len(SEEDS)
    # Three BootPIG conditions, one of them with three references; the base model costs about a third.
    sampling = (time.perf_counter() - began) * SAMPLING["num_inference_steps"] * images / SAMPLING_BATCH * 4
    training = per_step * TRAINING_STEPS * 1.15  # optimizer, loading, validation
    source = f"make {TRIPLETS} triplets" if triplets is None else f"take {triplets}, make validation triplets"
    minutes = (40 + training + sampling + 60) / 60
    console.print(
        f"{source} and {SUBJECTS} held-out subjects, train BootPIG for {TRAINING_STEPS} steps of\n{BATCH_SIZE}, export "
        f"it, draw {images} images under each of {len(CONDITIONS)} conditions, score them, and draw\n{SHOWN} by each "
        f"of {len(OTHERS)} other embedded models. On this machine about {minutes:.0f} minutes\n"
        f"({training / 60:.0f} of them training, {sampling / 60:.0f} drawing)\n"
    )


def run(module: str, command: str, **arguments: object) -> None:
    """Run and show `python -m MODULE COMMAND --NAME VALUE ...`; end with its exit code if it fails."""
    line = ["-m", module, command, *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))]
    console.print(f"[bold]$ python {' '.join(line)}[/bold]", highlight=False, soft_wrap=True)
    code = subprocess.run([sys.executable, *line], check=False).returncode
    if code:
        sys.exit(code)


def condition_folder(out: Path, condition: str) -> Path:
    """`images` is what the trained model makes of all three references; the others bound it."""
    return out / "images" if condition == "trained_3_references" else out / "conditions" / condition


def held_out_jobs(subjects: Sequence[SubjectFolder], seeds: Sequence[int]) -> list[Job]:
    """Each subject under the one background that no training picture of its category has, with each seed."""
    places = list(scene.BACKGROUNDS)
    return [
        Job(subject, places.index(scene.held_out_background(subject.class_noun)), seed)
        for subject in subjects
        for seed in seeds
    ]


def draw_all(out: Path, subjects: Sequence[SubjectFolder]) -> None:
    jobs = held_out_jobs(subjects, SEEDS)
    untrained, trained = BootPIG(TOYWORLD).pipeline(), load_pipeline(out / "export")
    for name, pipeline, references, settings in (
        ("no_reference", load_pipeline(f"base:{TOYWORLD}"), 1, BASE),
        ("untrained", untrained, 1, SAMPLING),
        ("trained_1_reference", trained, 1, SAMPLING),
        ("trained_3_references", trained, 3, SAMPLING),
    ):
        cutouts = cut_out_all(subjects, references)
        draw_jobs(pipeline, jobs, cutouts, condition_folder(out, name), settings, batch_size=SAMPLING_BATCH)
    cutouts = cut_out_all(subjects, 1)
    for name, (_, settings) in OTHERS.items():
        pipeline, folder = load_pipeline(f"{TOYWORLD}/{name}"), condition_folder(out, name)
        told = {**settings, **OTHERS_SAMPLER}
        draw_jobs(pipeline, grid_jobs(jobs), cutouts, folder, told, batch_size=SAMPLING_BATCH)
    draw_truth(jobs, condition_folder(out, "upper_bound"))


def fresh(folder: Path, jobs: Sequence[Job], size: int = SAMPLING_BATCH) -> Iterator[Sequence[Job]]:
    """The jobs in batches, into a folder with a new manifest."""
    (folder / MANIFEST).unlink(missing_ok=True)
    label = f"drawing {folder.name}"
    yield from track([jobs[i : i + size] for i in range(0, len(jobs), size)], description=label, console=console)


def draw_truth(jobs: Sequence[Job], folder: Path) -> None:
    """Real pictures of the subject as the prompt wants it: the toy world can draw them, so the bound is exact."""
    for (job,) in fresh(folder, jobs, size=1):
        number = int(job.subject.name.split("_")[1])
        subject = scene.held_out_subject(number)
        background = list(scene.BACKGROUNDS)[job.prompt_index]
        drawing = scene.draw(subject, background, seed=scene.HELD_OUT_SEED * 20 + number * len(SEEDS) + job.seed)
        save_generated(folder, job, Image.fromarray(drawing.image), method="drawn", settings={})


def toy_scorer(cache: Path) -> Scorer:
    """By the toy world's networks; of prompts that were not drawn nothing is asked."""
    return Scorer(load_clip(TOYWORLD), load_dino(TOYWORLD), cache, allow_missing=True)


def summarise(scores: dict[str, dict[str, float]]) -> list[str]:
    low, high = scores["no_reference"], scores["upper_bound"]
    lines = []
    for name in ("trained_1_reference", "trained_3_references"):
        closed = (scores[name]["dino"] - low["dino"]) / (high["dino"] - low["dino"])
        kept = scores[name]["prompt_accuracy"] / low["prompt_accuracy"]
        lines.append(
            f"{name}: closes {closed:.0%} of the way in DINO from no reference to real images of the subject, "
            f"and shows the prompted background {kept:.2f} times as often as the base model"
        )
    return lines


def grid_jobs(jobs: Sequence[Job]) -> Sequence[Job]:
    """The first seed's of the first subjects."""
    return jobs[:: len(SEEDS)][:SHOWN]


def draw_grid(out: Path, subjects: Sequence[SubjectFolder]) -> None:
    rows = []
    for job in grid_jobs(held_out_jobs(subjects, SEEDS)):
        file = Path(job.subject.name) / str(job.prompt_index) / f"{job.seed}.png"
        drawn = [load_image(condition_folder(out, name) / file) for name in (*CONDITIONS[:4], *OTHERS)]
        rows.append((job.prompt, [*(load_image(path) for path in job.subject.images[:3]), *drawn]))
    labelled_grid(COLUMNS, rows).save(out / "grid.png")


if __name__ == "__main__":
    main()
