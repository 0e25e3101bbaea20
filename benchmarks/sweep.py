"""What each setting of the sampling does to the scores, on the toy world: `make sweep`.

    python -m benchmarks.sweep [--out runs/sweep] [--subjects 50] [--seeds 3] [--model toyworld] [--beside MODEL]
        [--tables TITLE ...]

50 held-out subjects, each under the one background that no training picture of its category has, three seeds; one
setting changed at a time: those of the model's method. `--beside`: a BootPIG, to be scored beside it at several
guidances. Intervals are of the mean over subjects (95 %, bootstrap), differences are paired by
subject. What is drawn is kept: a sweep that was stopped goes on. The table of partial pictures (three in four show a
part of the subject) is compared with one of them, not with the usual row.
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
from pig.commands.drawing import draw_jobs
from pig.commands.generate import cut_out_all
from pig.data.subjects import read_subjects
from pig.demo import held_out_jobs, toy_scorer
from pig.evaluation.figures import Point, plane_svg
from pig.evaluation.statistics import interval
from pig.methods import find_model, load_pipeline

USUAL: dict[str, Any] = {"image_guidance": 5.0, "text_guidance": 1.5, "num_inference_steps": 20, "scheduler": "unipc"}
IMAGE_GUIDANCE, TEXT_GUIDANCE = (1.0, 3.0, 5.0, 7.0), (1.0, 1.5, 3.0)
FASTER = {"reference_every": 2, "deep_every": 2}

# Row -> settings besides the usual ones; `references`: how many, one by default; `partial`: of the partial pictures.
Table = dict[str, dict[str, Any]]
GUIDANCE: Table = {
    f"{im:g} / {text:g}": {"image_guidance": im, "text_guidance": text}
    for im in IMAGE_GUIDANCE
    for text in TEXT_GUIDANCE
    if (im, text) != (5.0, 1.5)
}
PARTIAL = "Partial pictures"  # this table's first row is its own: what the others have is no partial picture
BOOTPIG: dict[str, Table] = {
    "References": {f"{count} references": {"references": count} for count in (2, 3, 4)},
    PARTIAL: {
        f"{count} partial picture{'s' * (count > 1)}": {"references": count, "partial": True} for count in (1, 2, 3, 4)
    },
    "Pooling, 4 references": {name: {"references": 4, "pooling": name} for name in ("argmax", "mean", "concat")},
    "Noise and caption of the references": {
        "fixed noise": {"reference_noise": "fixed"},
        "caption: object": {"reference_caption": "object"},
    },
    "Strength": {f"strength {s}": {"strength": s} for s in (0.0, 0.25, 0.5, 0.75)},
    "Scheduler": {name: {"scheduler": name} for name in ("ddim", "dpm++")},
    "Guidance": GUIDANCE,
    "Faster, with a loss": {
        "guidance in the first 60 %": {"guidance_interval": [0.0, 0.6]},
        "guidance from 20 to 80 %": {"guidance_interval": [0.2, 0.8]},
        "references every 2nd step": {"reference_every": 2},
        "references every 4th step": {"reference_every": 4},
        "deep features every 2nd step": {"deep_every": 2},
        "deep features every 3rd step": {"deep_every": 3},
        "10 steps": {"num_inference_steps": 10},
        "guidance from 20 to 80 %, references and deep features every 2nd step": {
            "guidance_interval": [0.2, 0.8],
            **FASTER,
        },
        "3 / 3, references and deep features every 2nd step": {"image_guidance": 3.0, "text_guidance": 3.0, **FASTER},
    },
}
RUNS: Table = {
    "transfer everywhere": {"transfer_everywhere": True},
    "one pass": {"loops": 0},
    "3 loops": {"loops": 3},
    "5 loops": {"loops": 5},
}
EZIGEN: dict[str, Table] = {
    f"Image guidance {im:g}": {f"{run}, {im:g}": {**told, "image_guidance": im} for run, told in RUNS.items()}
    for im in (1.0, 3.0)
} | {
    "Image guidance 3, shorter layout": {
        f"{run}, layout 40 %": {**told, "image_guidance": 3.0, "layout_share": 0.4}
        for run, told in RUNS.items()
        if run != "transfer everywhere"
    }
}
FOUR = {"references": 4}
INSTANTBOOTH: dict[str, Table] = {
    "beta / alpha": {
        f"{beta:g} / {alpha:g}": {"beta": beta, "alpha": alpha} for beta, alpha in ((0.3, 0.4), (0.3, 1.0), (1.0, 0.4))
    },
    "References": {"4 references": FOUR},
    "Text guidance": {f"text guidance {text:g}": {"text_guidance": text} for text in (1.0, 3.0, 5.0)},
}
IP_ADAPTER: dict[str, Table] = {
    "Scale": {f"scale {scale:g}": {"scale": scale} for scale in (0.0, 0.5, 1.5)},
    "References": {"4 references": FOUR},
    "Text guidance": {f"text guidance {text:g}": {"text_guidance": text} for text in (1.0, 3.0, 5.0)},
}
# Method -> name of the usual row, its settings, and the tables.
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Table]]] = {
    "bootpig": ("usual: 1 reference, fresh noise, caption, 5 / 1.5, UniPC, 20 steps", {}, BOOTPIG),
    "instantbooth": ("usual: beta 1, alpha 1, 1 reference, 1.5, UniPC, 20 steps", {}, INSTANTBOOTH),
    "ip_adapter": ("usual: scale 1, 1 reference, 1.5, UniPC, 20 steps", {}, IP_ADAPTER),
    "ezigen": ("adapters off", {"adapter_scale": 0.0, "loops": 0, "image_guidance": 1.0}, EZIGEN),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--subjects", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="toyworld")
    parser.add_argument("--beside")
    parser.add_argument("--tables", nargs="+", help="these only, by their titles")
    chosen = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    console, out = Console(soft_wrap=True), chosen.out
    usual, first, tables = METHODS[find_model(chosen.model).method]
    if chosen.tables is not None:
        if unknown := [title for title in chosen.tables if title not in tables]:
            parser.error(f"--tables {unknown[0]!r} is none of: {'; '.join(tables)}")
        tables = {title: tables[title] for title in chosen.tables}
    folders = {partial: out / ("partial" if partial else "subjects") for partial in (False, True)}
    for partial, folder in folders.items():
        draw_subjects(folder, chosen.subjects, 64, partial=partial)
    subjects = read_subjects(folders[False])
    jobs = held_out_jobs(subjects, range(chosen.seeds))
    pipeline, scorer = load_pipeline(chosen.model), toy_scorer(out / "eval")
    tables = {title: table if title == PARTIAL else {usual: first, **table} for title, table in tables.items()}
    rows = {name: (pipeline, told) for table in tables.values() for name, told in table.items()}
    if chosen.beside is not None:
        other = load_pipeline(chosen.beside)
        beside = {f"BootPIG, {im:g}": {"image_guidance": im} for im in (1.0, 3.0, 5.0)}
        rows |= {usual: (pipeline, first)} | {name: (other, told) for name, told in beside.items()}
        tables["BootPIG"] = {usual: first, **beside}
    console.print(f"{len(rows)} settings x {len(jobs)} images")
    cutouts = {
        (partial, count): cut_out_all(read_subjects(folder), count)
        for partial, folder in folders.items()
        for count in (1, 2, 3, 4)
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name, (model, told) in rows.items():
        folder = out / name.replace("/", "-").replace(" ", "_").replace(":", "").replace("%", "pc").replace(",", "")
        usual_here = {control: value for control, value in USUAL.items() if hasattr(model.Settings, control)}
        settings = {**usual_here, **told}
        given = cutouts[settings.pop("partial", False), settings.pop("references", 1)]
        draw_jobs(model, jobs, given, folder, settings, batch_size=12)
        found[name] = scorer.score(folder, subjects).per_subject()
        console.print(f"{name}: DINO {fmean(found[name]['dino']):.3f}  CLIP-T {fmean(found[name]['clip_t']):.3f}")
    (out / "sweep.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    text = "\n\n".join(markdown(title, list(table), found) for title, table in tables.items())
    (out / "sweep.md").write_text(text + "\n", encoding="utf-8")
    written = ["sweep.json", "sweep.md"]
    if "Guidance" in tables:
        points = [Point("5 / 1.5" if name == usual else name, found[name]) for name in tables["Guidance"]]
        (out / "guidance.svg").write_text(plane_svg(points), encoding="utf-8")
        written.append("guidance.svg")
    for name in written:
        console.print(f"  {out / name}")


def markdown(title: str, names: list[str], found: dict[str, dict[str, list[float]]]) -> str:
    """A row for each setting: score [interval], and DINO's difference to the first row's [interval]."""
    lines = [
        f"**{title}**",
        "",
        "| | DINO | against the first | CLIP-I | CLIP-T | prompt found |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        scores = found[name]
        gaps = [a - b for a, b in zip(scores["dino"], found[names[0]]["dino"], strict=True)]
        gap = "" if name == names[0] else f"{fmean(gaps):+.3f} {brackets(gaps, '+.3f')}"
        shown = ("dino", "clip_i", "clip_t", "prompt_accuracy")
        cells = [f"{fmean(scores[one]):.3f} {brackets(scores[one])}" for one in shown]
        cells.insert(1, gap)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def brackets(values: list[float], form: str = ".3f") -> str:
    low, high = interval(values)
    return f"[{low:{form}}, {high:{form}}]"


if __name__ == "__main__":
    main()
