"""DreamBlend against DreamBooth's own checkpoints on the toy world: `make dreamblend`.

    python -m benchmarks.dreamblend [--out runs/dreamblend] [--subjects 12] [--rows NAME ...] [--swept NAME]

Each row is one tuning of all subjects. Its kept checkpoints are drawn plainly, then each late one is guided by each
early one, and held against two rivals that cost almost nothing: the early network takes the first steps, and mixed
weights. `--swept`: the row whose outermost pair is drawn with every other control, too. All with one sampler
(DPM-Solver++), the same noise, a scene in every prompt. Then come the word maps' measures, time and memory, figures.
Intervals are of the mean over subjects, differences paired by subject (95 %, bootstrap). What is finished is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import combinations
from pathlib import Path
from statistics import fmean

import matplotlib
import torch
import transformers
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks.dreambooth import BASE, NO_PRIOR, Scores, draw, made_subjects, markdown, paths, plain, score, tune
from benchmarks.sampling import cost
from benchmarks.sweep import brackets
from pig import diffusion
from pig.attention.maps import distance, recording
from pig.cli import run
from pig.costs import flops_of, machine
from pig.data.images import read_generated
from pig.data.subjects import SubjectFolder
from pig.data.transforms import load_image, to_tensor
from pig.demo import toy_scorer
from pig.methods import load_blend, load_pipeline
from pig.models.backbone import encode_images
from pig.models.encoders import tokenize
from pig.models.identifier import identifier_token, with_identifier
from pig.sampling.delta import step_folder, tuned_subjects
from pig.toyworld.captions import IDENTIFIER

Found = dict[str, dict[str, Scores]]  # row -> drawing -> scores

ROWS: dict[str, list[str]] = {
    "plain": [NO_PRIOR],
    "regularised": [NO_PRIOR, "--model.attention_regularisation=1"],
}
RIVALS = {f"early network for {share:.0%}": ["--step_size=0", f"--early_share={share}"] for share in (0.2, 0.4)}
MIXED = (0.5, 0.75)  # early + share (late - early)
SWEEP: dict[str, list[str]] = {
    "step size .003": ["--step_size=0.003"],
    "step size .03": ["--step_size=0.03"],
    "step size .1": ["--step_size=0.1"],
    "step size .02, first half": ["--step_size=0.02", "--guided_share=0.5"],
    "all words but the identifier": ["--words=not_identifier"],
    "identifier and noun": ["--words=subject"],
    "coarse layers": ["--coarse"],
}
PROMPTS, STEPS = 3, 12
SAMPLER = "--scheduler=dpm++"
LEVELS = (100, 300, 500, 700, 900)  # timesteps at which the word maps are measured
SHOWN = 5  # subjects in the figures
console = Console(soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/dreamblend"))
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--swept", choices=list(ROWS), default="plain")
    chosen = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    out: Path = chosen.out
    console.print(f"{len(chosen.rows)} tunings of {chosen.subjects} subjects, about half an hour each on a CPU core")
    subjects, scorer = made_subjects(out, chosen.subjects, PROMPTS), toy_scorer(out / "eval")
    found: Found = {BASE: {"": score(scorer, draw(out, BASE, "base:toyworld", SAMPLER), subjects)}}
    measures: dict[str, dict[str, float]] = {}
    for row in chosen.rows:
        tuned = tune(out, row, "dreambooth/toyworld", ROWS[row])
        steps = list(next(iter(tuned_subjects(tuned).values())))
        swept = SWEEP if row == chosen.swept else {}
        found[row] = {
            name: score(scorer, draw(tuned.parent, name, *words), subjects)
            for name, words in drawings(tuned, steps, swept).items()
        }
        (out / "dreamblend.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        measures |= measure_maps(out, row, tuned, subjects)
        (out / "maps.json").write_text(json.dumps(measures, indent=1), encoding="utf-8")
        compare(out, tuned, subjects, steps)
    parts = [
        markdown(flat(found)),
        gaps(found),
        map_table(measures),
        costs(out / plain(chosen.rows[0]) / "models", subjects[0]),
    ]
    (out / "dreamblend.md").write_text("\n".join(parts), encoding="utf-8")
    figure(found, out / "front.png")
    console.print(f"{out / 'dreamblend.md'}, {out / 'dreamblend.json'}, {out / 'maps.json'}, {out / 'front.png'}")


def drawings(tuned: Path, steps: list[int], swept: dict[str, list[str]]) -> dict[str, list[str]]:
    """What is drawn of a row: name -> model and other words of `generate`."""
    found = {f"{step}": [str(tuned), f"--step={step}", SAMPLER] for step in steps}
    blend = [f"dreamblend:{tuned}", SAMPLER]
    for early, late in combinations(steps, 2):
        found[f"{early} guides {late}"] = [*blend, f"--early={early}", f"--late={late}"]
    for name, told in (RIVALS | swept).items():
        found[name] = [*blend, f"--early={steps[0]}", f"--late={steps[-1]}", *told]
    for share in MIXED:
        mixed = mix(tuned, tuned.parent / plain(f"mixed {share:.0%}"), share)
        found[f"mixed weights, {share:.0%} late"] = [str(mixed), SAMPLER]
    return found


def flat(found: Found) -> dict[str, Scores]:
    return {f"{row}, {name}" if name else row: scores for row, of in found.items() for name, scores in of.items()}


def mix(tuned: Path, mixed: Path, share: float) -> Path:
    """A tuned folder whose weights are early + share (late - early), of the first and the last kept step."""
    for subject, steps in tuned_subjects(tuned).items():
        folder = step_folder(mixed / subject, 1)
        if folder.exists():
            continue
        first, last = (load_file(steps[step] / "delta.safetensors") for step in (min(steps), max(steps)))
        aside = folder.with_name("aside")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(steps[max(steps)], aside)
        weights = {name: torch.lerp(one, last[name], share).contiguous() for name, one in first.items()}
        save_file(weights, aside / "delta.safetensors")
        aside.rename(folder)
    return mixed


@torch.no_grad()
def measure_maps(out: Path, row: str, tuned: Path, subjects: list[SubjectFolder]) -> dict[str, dict[str, float]]:
    """Of each checkpoint, on the base model's own pictures with noise added: the identifier's share of the attention
    among the words, the entropy over the words (nats), and the squared distance of all maps to the base model's."""
    base, found = load_pipeline("base:toyworld"), {}
    tokenizer, pictures = base.tokenizer, read_generated(out / "images" / plain(BASE), subjects)
    no_words = torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id])
    for subject in subjects:
        own = [one for one in pictures if one.subject.name == subject.name]
        z_0 = encode_images(base.vae, torch.stack([to_tensor(load_image(one.path)) for one in own]))
        noun = subject.class_noun
        texts = [with_identifier(subject.prompts[one.prompt_index], noun, IDENTIFIER) for one in own]
        ids = tokenize(tokenizer, texts)
        words, identifier = ~torch.isin(ids, no_words), ids == identifier_token(tokenizer, IDENTIFIER)
        text = base.text_encoder(ids)[0]
        for step, folder in {0: None, **tuned_subjects(tuned)[subject.name]}.items():
            unet = base.unet if folder is None else load_pipeline(str(folder)).unet
            kept = found.setdefault(f"{row}, {step}" if step else BASE, {})
            for level in LEVELS:
                t = torch.full((len(z_0),), level)
                alpha, sigma = diffusion.alpha_sigma(base.scheduler.alphas_cumprod, t)
                noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(level))
                z_t = diffusion.add_noise(z_0, noise, alpha, sigma)
                with recording(base.unet, len(ids)) as wanted, recording(unet, len(ids)) as maps:
                    base.unet(z_t, t, text)
                    unet(z_t, t, text)
                kept.setdefault("distance", []).append(
                    distance(maps, wanted, torch.ones_like(words), mean=True).mean().item()
                )
                for layer in maps.values():
                    p = layer * words[:, None, None]
                    p = p / p.sum(-1, keepdim=True)
                    kept.setdefault("identifier", []).append((p * identifier[:, None, None]).sum(-1).mean().item())
                    kept.setdefault("entropy", []).append(-torch.xlogy(p, p).sum(-1).mean().item())
    return {name: {key: fmean(values) for key, values in of.items()} for name, of in found.items()}


def map_table(measures: dict[str, dict[str, float]]) -> str:
    lines = ["| | identifier's share | entropy over words | distance to the base model's maps |", "|---|---|---|---|"]
    for name, of in measures.items():
        lines.append(f"| {name} | {of['identifier']:.3f} | {of['entropy']:.3f} | {of['distance']:.3f} |")
    return "\n".join(lines) + "\n"


def gaps(found: Found) -> str:
    """Every guided, mixed or early-first drawing against the late checkpoint's own."""
    columns = {"dino": "DINO", "clip_t": "CLIP-T", "prompt_accuracy": "background", "px": "pixels"}
    lines = [f"| against the late checkpoint | {' | '.join(columns.values())} |", "|---" * 5 + "|"]
    for row, of in found.items():
        steps = [name for name in of if name.isdigit()]
        for name, scores in of.items():
            if row == BASE or name in steps:
                continue
            late = name.rpartition(" ")[2] if " guides " in name else steps[-1]
            pairs = ([a - b for a, b in zip(scores[one], of[late][one], strict=True)] for one in columns)
            cells = [f"{fmean(pair):+.3f} {brackets(pair, '+.3f')}" for pair in pairs]
            lines.append(f"| {row}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def costs(tuned: Path, subject: SubjectFolder) -> str:
    """Of a picture, five together, on one thread: plainly, guided in the first half of the steps, and in all."""
    steps = tuned_subjects(tuned)[subject.name]
    pipeline = load_blend(steps[min(steps)], steps[max(steps)])
    pipeline.set_progress_bar_config(disable=True)
    few = [*subject.prompts, *subject.prompts][:5]
    lines = ["| | s / picture | GFLOP / picture | x plain: time | FLOPs | peak |", "|---|---|---|---|---|---|"]
    first: dict[str, float] = {}
    for name, told in {
        "plain": {"step_size": 0.0},
        "guided, first half": {"guided_share": 0.5},
        "guided": {},
    }.items():

        def work(told: dict[str, float] = told) -> None:
            generators = [torch.Generator().manual_seed(seed) for seed in range(len(few))]
            pipeline(few, class_noun=subject.class_noun, num_inference_steps=STEPS, generator=generators, **told)

        work()
        of = cost(work, flops_of(work), len(few))
        first = first or of
        times, flops = (of[key] / first[key] for key in ("seconds_per_image", "flops_per_image"))
        lines.append(
            f"| {name} | {of['seconds_per_image']:.2f} | {of['flops_per_image'] / 1e9:.1f} | {times:.2f} | {flops:.2f} "
            f"| {of['peak_memory_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines) + f"\n\n{machine()}, {torch.get_num_threads()} thread(s), {STEPS} steps\n"


def compare(out: Path, tuned: Path, subjects: list[SubjectFolder], steps: list[int]) -> None:
    """The paper's Fig. 6, a line a subject; and its Fig. 2: the word maps of the early and the late checkpoint."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    early, late = steps[0], steps[-1]
    columns = {
        BASE: out / "images" / plain(BASE),
        f"{early} steps": tuned.parent / "images" / f"{early}",
        f"{late} steps": tuned.parent / "images" / f"{late}",
        "guided": tuned.parent / "images" / plain(f"{early} guides {late}"),
        "early for 20 %": tuned.parent / "images" / plain("early network for 20%"),
        "mixed, 75 % late": tuned.parent / "images" / plain("mixed weights, 75% late"),
    }
    width = len(columns) + 1
    plot, axes = pyplot.subplots(SHOWN, width, figsize=(1.4 * width, 1.7 * SHOWN), layout="constrained")
    for line, (subject, cells) in enumerate(zip(subjects, axes, strict=False)):
        which = line % PROMPTS
        shown = [subject.images[0]]
        for folder in columns.values():
            drawn = [one for one in read_generated(folder, subjects) if one.subject.name == subject.name]
            shown.append(next(one.path for one in drawn if one.prompt_index == which))
        for cell, title, path in zip(cells, ("subject", *columns), shown, strict=True):
            cell.axis("off")
            cell.imshow(Image.open(path))
            cell.set_title(title if line == 0 else "", fontsize=9)
        cells[1].text(0, 66, subject.prompts[which], fontsize=8, va="top", in_layout=False)
    plot.savefig(tuned.parent / "pictures.png", dpi=110)
    pyplot.close(plot)
    for step in (early, late):
        words = [
            f"--model={step_folder(tuned / subjects[0].name, step)}",
            f"--prompt={subjects[0].prompts[0]}",
            f"--class_noun={subjects[0].class_noun}",
            f"--out={tuned.parent / f'maps_{step}.png'}",
        ]
        run(["attention", *words])


def figure(found: Found, file: Path) -> None:
    """The paths of the plain checkpoints, and where guided and rival drawings lie."""
    rows = [row for row in found if row != BASE]
    steps = {row: {name: of for name, of in found[row].items() if name.isdigit()} for row in rows}
    plot, (left, right) = paths(flat({BASE: found[BASE], **steps}), rows)
    marks = {" guides ": "*", "early network": "s", "mixed": "D"}
    for number, row in enumerate(rows):
        for name, of in found[row].items():
            mark = next((mark for part, mark in marks.items() if part in name), None)
            for axes, across in ((left, "clip_t"), (right, "px")) if mark else ():
                axes.plot(fmean(of[across]), fmean(of["dino"]), mark, color=f"C{number}", markersize=7, alpha=0.6)
    right.set_title("star: guided; square: early network first; diamond: mixed weights", fontsize=9)
    plot.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
