"""What each setting of the sampling does to the scores, on the toy world: `make sweep`.

    python -m benchmarks.sweep [--out runs/sweep] [--subjects 50] [--model toyworld]

50 held-out subjects, each under the one background that no training picture of its category has, three seeds; one
setting changed at a time. Intervals are of the mean over subjects (95 %, bootstrap), differences are paired by subject.
What is drawn is kept: a sweep that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import transformers
from rich.console import Console

from data_gen.toyworld import draw_subjects
from pig.commands.generate import cut_out_all, draw_jobs
from pig.data.subjects import read_subjects
from pig.demo import held_out_jobs, toy_scorer
from pig.evaluation.figures import Point, plane_svg
from pig.evaluation.statistics import interval
from pig.methods import load_pipeline

SEEDS = (0, 1, 2)
USUAL: dict[str, Any] = {"image_guidance": 5.0, "text_guidance": 1.5, "num_inference_steps": 20}
USUAL_NAME = "usual: 1 reference, fresh noise, caption, 5 / 1.5, UniPC, 20 steps"
IMAGE_GUIDANCE, TEXT_GUIDANCE = (1.0, 3.0, 5.0, 7.0), (1.0, 1.5, 3.0)
FASTER = {"reference_every": 2, "deep_every": 2}

# table -> row -> (references, scheduler, settings besides the usual ones)
Row = tuple[int, str, dict[str, Any]]
TABLES: dict[str, dict[str, Row]] = {
    "References": {f"{count} references": (count, "unipc", {}) for count in (2, 3, 4)},
    "Pooling, 4 references": {name: (4, "unipc", {"pooling": name}) for name in ("argmax", "mean", "concat")},
    "Noise and caption of the references": {
        "fixed noise": (1, "unipc", {"reference_noise": "fixed"}),
        "caption: object": (1, "unipc", {"reference_caption": "object"}),
    },
    "Strength": {f"strength {s}": (1, "unipc", {"strength": s}) for s in (0.0, 0.25, 0.5, 0.75)},
    "Scheduler": {name: (1, name, {}) for name in ("ddim", "dpm++")},
    "Guidance": {
        f"{im:g} / {text:g}": (1, "unipc", {"image_guidance": im, "text_guidance": text})
        for im in IMAGE_GUIDANCE
        for text in TEXT_GUIDANCE
        if (im, text) != (5.0, 1.5)
    },
    "Faster, with a loss": {
        "guidance in the first 60 %": (1, "unipc", {"guidance_interval": [0.0, 0.6]}),
        "guidance from 20 to 80 %": (1, "unipc", {"guidance_interval": [0.2, 0.8]}),
        "references every 2nd step": (1, "unipc", {"reference_every": 2}),
        "references every 4th step": (1, "unipc", {"reference_every": 4}),
        "deep features every 2nd step": (1, "unipc", {"deep_every": 2}),
        "deep features every 3rd step": (1, "unipc", {"deep_every": 3}),
        "10 steps": (1, "unipc", {"num_inference_steps": 10}),
        "guidance from 20 to 80 %, references and deep features every 2nd step": (
            1,
            "unipc",
            {"guidance_interval": [0.2, 0.8], **FASTER},
        ),
        "3 / 3, references and deep features every 2nd step": (
            1,
            "unipc",
            {"image_guidance": 3.0, "text_guidance": 3.0, **FASTER},
        ),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--subjects", type=int, default=50)
    parser.add_argument("--model", default="toyworld")
    chosen = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    console, out = Console(soft_wrap=True), chosen.out
    draw_subjects(out / "subjects", chosen.subjects, 64)
    subjects = read_subjects(out / "subjects")
    jobs = held_out_jobs(subjects, SEEDS)
    rows = {"": {USUAL_NAME: (1, "unipc", {})}, **TABLES}
    count = sum(map(len, rows.values()))
    console.print(f"{count} settings x {len(jobs)} images")
    pipeline, scorer = load_pipeline(chosen.model), toy_scorer(out / "eval")
    cutouts = {count: cut_out_all(subjects, count) for count in (1, 2, 3, 4)}
    found: dict[str, dict[str, list[float]]] = {}
    for table in rows.values():
        for name, (references, scheduler, settings) in table.items():
            folder = out / name.replace("/", "-").replace(" ", "_").replace(":", "").replace("%", "pc")
            told = {**USUAL, "scheduler": scheduler, **settings}
            draw_jobs(pipeline, jobs, cutouts[references], folder, told, batch_size=12)
            found[name] = scorer.score(folder, subjects).per_subject()
            console.print(f"{name}: DINO {fmean(found[name]['dino']):.3f}  CLIP-T {fmean(found[name]['clip_t']):.3f}")
    (out / "sweep.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    text = "\n\n".join(markdown(title, list(table), found) for title, table in TABLES.items())
    (out / "sweep.md").write_text(text + "\n", encoding="utf-8")
    points = [
        Point("5 / 1.5" if name == USUAL_NAME else name, found[name]) for name in (USUAL_NAME, *TABLES["Guidance"])
    ]
    (out / "guidance.svg").write_text(plane_svg(points), encoding="utf-8")
    for name in ("sweep.json", "sweep.md", "guidance.svg"):
        console.print(f"  {out / name}")


def markdown(title: str, names: list[str], found: dict[str, dict[str, list[float]]]) -> str:
    """A row for each setting, the usual one first: score [interval], and DINO's difference to the usual [interval]."""
    lines = [
        f"**{title}**",
        "",
        "| | DINO | against usual | CLIP-I | CLIP-T | prompt found |",
        "|---|---|---|---|---|---|",
    ]
    for name in (USUAL_NAME, *names):
        scores = found[name]
        gaps = [a - b for a, b in zip(scores["dino"], found[USUAL_NAME]["dino"], strict=True)]
        gap = "" if name == USUAL_NAME else f"{fmean(gaps):+.3f} {brackets(gaps, '+.3f')}"
        cells = [f"{fmean(scores[s]):.3f} {brackets(scores[s])}" for s in ("dino", "clip_i", "clip_t")]
        cells.insert(1, gap)
        lines.append(f"| {name} | {' | '.join(cells)} | {fmean(scores['prompt_accuracy']):.3f} |")
    return "\n".join(lines)


def brackets(values: list[float], form: str = ".3f") -> str:
    low, high = interval(values)
    return f"[{low:{form}}, {high:{form}}]"


if __name__ == "__main__":
    main()
