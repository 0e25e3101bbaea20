"""InstantBooth's Tables 3 and 4 (arXiv 2304.03411) on the toy world: `make ablations-instantbooth`.

    python -m benchmarks.ablations_instantbooth [--out runs/ablations_instantbooth] [--steps 600] [--subjects 50]

Table 3: what each part is good for, every setting trained equally long and drawn at the paper's beta and alpha.
Table 4: beta and alpha. As in the paper, *align* is CLIP-T under other prompts (here: the held-out background), and
*reconstruct* CLIP-I under "a photo of a CLASS"; all from the subject's four pictures, and once from one. Other than in
the paper, references are masked in drawing, too. What is finished is kept; a training that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import transformers
from rich.console import Console

from benchmarks.ablations import draw_data, folder_of, train
from benchmarks.sweep import brackets
from pig.commands.drawing import draw_jobs
from pig.commands.generate import cut_out_all
from pig.data.images import Job
from pig.data.subjects import read_subjects
from pig.demo import held_out_jobs, toy_scorer
from pig.methods import load_pipeline

Scores = dict[str, list[float]]  # of each subject
CONFIG = "configs/instantbooth/toyworld.yaml"
SETTING = {"text_guidance": 1.5, "num_inference_steps": 20, "beta": 0.3, "alpha": 0.4}
# Config over toyworld.yaml -> the row of Table 3, and the paper's align / reconstruct.
CHANGED = {
    "no_train_mask": ("without train mask", ".3127 / .7485"),
    "no_patch_feature": ("without patch feature", ".3269 / .6494"),
    "no_adapter": ("without adapter", ".3242 / .5468"),
    "before_text": ("before the text encoder", ".3127 / .7495"),
    "tuned_clip": ("tuned CLIP encoder", ".3266 / .6425"),
    "tuned_unet": ("tuned UNet", ".3142 / .7265"),
}
# (beta, alpha) -> the paper's.
PLANE = {
    (0.3, 0.1): ".3242 / .6631",
    (0.3, 0.3): ".3232 / .7002",
    (0.3, 0.4): ".3140 / .7329",
    (0.3, 0.5): ".3032 / .7544",
    (0.3, 1.0): ".2087 / .7905",
    (0.5, 0.1): ".3127 / .7051",
    (0.5, 0.3): ".3076 / .7480",
    (0.5, 0.5): ".2874 / .7778",
    (1.0, 1.0): ".2017 / .7944",
}
console = Console(soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations_instantbooth"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--subjects", type=int, default=50)
    chosen = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    out: Path = chosen.out
    rows = ["full", *CHANGED]
    sets = 2 * (len(rows) + 1 + len(PLANE))
    console.print(f"{len(rows)} trainings of {chosen.steps} steps, then {sets} sets of images")
    draw_data(out / "data", chosen.subjects)
    for name in rows:
        told = [f"--config=configs/instantbooth/{name}.yaml"] if name in CHANGED else []
        train(folder_of(out, name, 0), CONFIG, told, 0, chosen.steps)
    subjects, scorer = read_subjects(out / "data/subjects"), toy_scorer(out / "eval")
    plain = [replace(one, templates=("a photo of a {0} {1}",)) for one in subjects]
    cutouts = {count: cut_out_all(subjects, count) for count in (1, None)}

    def score(name: str, folder: Path, references: int | None = None, **settings: Any) -> Scores:
        pipeline = load_pipeline(folder_of(out, name, 0) / "export")
        align, reconstruct = held_out_jobs(subjects, (0,)), [Job(one, 0, 0) for one in plain]
        told = SETTING | settings
        draw_jobs(pipeline, align, cutouts[references], folder / "align", told, batch_size=12)
        draw_jobs(pipeline, reconstruct, cutouts[references], folder / "reconstruct", told, batch_size=12)
        found = scorer.score(folder / "align", subjects).per_subject()
        return {
            "align": found["clip_t"],
            "dino": found["dino"],
            "reconstruct": scorer.score(folder / "reconstruct", plain).per_subject()["clip_i"],
        }

    table_3 = {"full": score("full", out / "full/images")}
    table_3 |= {name: score(name, out / name / "images") for name in CHANGED}
    table_3["one picture"] = score("full", out / "full/images_of_one", references=1)
    table_4 = {
        f"{beta:g}, {alpha:g}": score("full", out / f"plane/{beta:g}_{alpha:g}", beta=beta, alpha=alpha)
        for beta, alpha in PLANE
    }
    paper = {"full": ".3140 / .7329", "one picture": ".3140 / .7261", **{name: of for name, (_, of) in CHANGED.items()}}
    lines = table("Table 3", {name: (scores, paper[name]) for name, scores in table_3.items()})
    planes = {name: (table_4[name], of) for name, of in zip(table_4, PLANE.values(), strict=True)}
    lines += ["", *table("beta, alpha", planes)]
    (out / "ablations.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "ablations.json").write_text(json.dumps({**table_3, **table_4}, indent=1), encoding="utf-8")
    console.print(f"{out / 'ablations.md'}, {out / 'ablations.json'}")


def table(title: str, rows: Mapping[str, tuple[Scores, str]]) -> list[str]:
    lines = [f"| {title} | align | reconstruct | DINO | paper: align / reconstruct |", "|---|---|---|---|---|"]
    for name, (scores, paper) in rows.items():
        cells = [f"{fmean(scores[one]):.3f} {brackets(scores[one])}" for one in ("align", "reconstruct", "dino")]
        lines.append("| " + " | ".join([CHANGED.get(name, (name,))[0], *cells, paper]) + " |")
    return lines


if __name__ == "__main__":
    main()
