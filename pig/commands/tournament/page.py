"""The tournament's page: tables, planes, costs, and all methods' pictures side by side."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from pig.commands.tournament import plan
from pig.commands.tournament.config import Tournament
from pig.commands.tournament.plan import SCORES
from pig.commands.tournament.standings import (
    COMPARED,
    Standing,
    Tested,
    gaps,
    judge,
    ledger,
    main_standings,
    of_shared_seeds,
    ranks,
    read_standings,
    trials_of,
)
from pig.evaluation.compare import Difference, check_alike, signed
from pig.evaluation.figures import Point, label_points, plane_svg, svg_of
from pig.evaluation.report import Section, Table, ceiling_of, figures_of, fixed_of, write_report
from pig.evaluation.statistics import interval
from pig.evaluation.tables import BOUNDS, TITLES, cell, plain, short
from pig.files import write_text

PAGES = ("report.html", "tournament.md", "tournament.json", "plane.svg")
COSTS = {  # of the ledger: key -> heading, factor
    "trained_weights": ("trained weights, M", 1e-6),
    "training_samples": ("training: samples", 1),
    "training_seconds": ("minutes", 1 / 60),
    "training_flops": ("TFLOP", 1e-12),
    "training_memory_bytes": ("peak memory, GB", 1e-9),
    "tuning_samples": ("tuning a subject: samples", 1),
    "tuning_seconds": ("minutes", 1 / 60),
    "tuning_flops": ("TFLOP", 1e-12),
    "tuning_memory_bytes": ("peak memory, GB", 1e-9),
    "class_seconds": ("pictures of a class: minutes", 1 / 60),
    "class_flops": ("TFLOP", 1e-12),
    "flops_per_picture": ("picture: GFLOP", 1e-9),
    "seconds_per_picture": ("seconds", 1),
    "peak_memory_bytes": ("peak memory, GB", 1e-9),
    "disk_bytes": ("on disk, MB", 1e-6),
}


@dataclass(frozen=True)
class Findings:
    """All that the pages show. first: of each method and budget the first condition. gaps: score -> of these to
    `against`; condition_gaps: of all others whose condition `against` was drawn under, too. trials: method -> words ->
    score -> its mean over the validation subjects."""

    standings: Sequence[Standing]
    first: Sequence[Standing]
    against: Standing
    gaps: Mapping[str, Sequence[Difference]]
    condition_gaps: Mapping[str, Sequence[Difference]]
    ranks: Mapping[str, Mapping[str, tuple[int, int, int]]]
    claims: Sequence[Tested]
    trials: Mapping[str, Mapping[str, Mapping[str, float]]]
    costs: Sequence[Mapping[str, Any]]

    @property
    def kinds(self) -> list[str]:
        """Of prompts."""
        return sorted({image["kind"] for image in self.against.results[0].images})


def find(config: Tournament, guests: Sequence[Path]) -> Findings:
    standings = read_standings(config, guests)
    check_alike([result for one in standings for result in one.results])  # networks, protocol, subjects, prompts
    first = main_standings(standings)
    against = next(one for one in first if one.method == config.against)
    others = [one for one in first if one is not against]
    under_all = [one for one in standings if one.name == against.name]
    shared = {one.condition for one in under_all[1:]}
    further = [one for one in standings if one not in first and one not in under_all and one.condition in shared]
    return Findings(
        standings,
        first,
        against,
        gaps={score: gaps(under_all, others, score) for score in COMPARED},
        condition_gaps={score: gaps(under_all, further, score, conditions=True) for score in COMPARED},
        ranks={score: ranks(first, score) for score in COMPARED},
        claims=judge(config, standings),
        trials={
            name: {line: {score: of.scores[score]["mean"] for score in COMPARED} for line, of in tried.items()}
            for name, tried in ((name, trials_of(config, name)) for name in config.methods)
        },
        costs=ledger(config),
    )


def write_pages(config: Tournament, guests: Sequence[Path]) -> list[Path]:
    """`PAGES` in the tournament's folder."""
    found = find(config, guests)
    tables, drawn = all_tables(config, found), plane(found.first)
    lead = [
        Section("The planes", figures_of(drawn, *scatters(found.first, found.costs)), note=PLANES),
        *(Section(name, tables=[table], note=note) for name, table, note in tables),
    ]
    trained = any(method.kind == "trained" for method in config.methods.values())
    length = f"; trained on {config.samples:,} samples each" if trained else ""
    write_report(
        [one.results[0] for one in found.first if one.budget != plan.TIME],
        config.folder(),
        title="Tournament",
        summary=[f"{len(config.methods)} methods on {config.base}{length}.", FIRST_SEED],
        lead=lead,
    )
    out = config.folder()
    write_text(out / PAGES[1], markdown(tables))
    write_text(out / PAGES[2], json.dumps(numbers(found), indent=1) + "\n")
    write_text(out / PAGES[3], drawn)
    return [out / name for name in PAGES]


def all_tables(config: Tournament, found: Findings) -> list[tuple[str, Table, str]]:
    """(heading, table, note)."""
    tables = [
        ("Standings", scores_table(found), NOTE + " " + given(found.first)),
        (f"Differences to {config.against}", gaps_table(list(found.gaps.values())), GAPS),
    ]
    if found.claims:
        tables.insert(0, ("Claims", claims_table(found.claims), CLAIMS))
    if len(found.kinds) > 1:
        tables.append(("By kind of prompt", kinds_table(found), "Means over subjects."))
    if any(one not in found.first for one in found.standings):
        tables.append(("Other conditions", conditions_table(found.standings), CONDITIONS))
    if found.condition_gaps["dino"]:
        heading = f"Differences to {config.against} under other conditions"
        tables.append((heading, gaps_table(list(found.condition_gaps.values())), GAPS))
    machines = "; ".join(sorted({one for row in found.costs for one in row["machines"]}))
    tables.append(("Costs", costs_table(found.costs), f"{LEDGER} Trainings and tunings ran on: {machines}."))
    tables.append(("Settings", settings_table(config, found), SETTINGS))
    return tables


FIRST_SEED = (
    "The tables down to Settings are over all training seeds; the images, and the tables below them, are of the first "
    "one and of equal samples."
)
PLANES = "Costs of a subject's first picture. Training, which is done once for all subjects, is in the table of costs."
NOTE = (
    "Means over subjects, with 95 % intervals (subjects drawn again); of several training seeds the mean, and how far "
    "the seeds lie apart in DINO. Ranks with 95 % intervals. Copies: the share of images that DINO takes for one of "
    "the subject's pictures."
)
CLAIMS = (
    "Each difference is paired by subject, over the training seeds that both have; p: signs flipped at random, "
    "corrected by Holm for the number of claims. A claim holds, or does not hold (the difference has the other sign), "
    "where p is below .05; else it cannot be told."
)
CONDITIONS = (
    "What each was given; a partial picture shows a part of the subject. Of each method the mean over those training "
    "seeds that were drawn under all its conditions."
)
GAPS = (
    "Paired by subject; each to the scores under the same condition, where there are any, over the training seeds that "
    "both have. p: signs flipped at random, corrected by Holm for the number of rows."
)
SETTINGS = (
    "What each was drawn with, beside its model's own defaults, and the trials that this was chosen from, with their "
    "scores on the validation subjects."
)
LEDGER = (
    "Training: steps with their data. Tuning: without the class pictures, which the first tuning of a class draws. A "
    "picture: one at a time, reading the references included; the median of three. FLOPs are counted (2 for a "
    "multiplication with addition). Memory: of a GPU; without one, the most that the command held at any time."
)


def given(first: Sequence[Standing]) -> str:
    """What the trained methods have read."""
    of: dict[str, list[str]] = {}
    for one in first:
        if one.condition:
            of.setdefault(one.condition, []).append(one.name)
    return " ".join(f"Given {condition}: {'; '.join(names)}." for condition, names in of.items())


def scores_table(found: Findings) -> Table:
    head = ["", *(TITLES[score] for score in SCORES), "copies", "rank by DINO", "by CLIP-T", "seeds apart"]
    rows = []
    for one in found.first:
        cells = [with_interval(list(one.per_subject(score).values())) for score in SCORES]
        places = [
            f"{place} [{low}, {high}]" for place, low, high in (found.ranks[score][one.name] for score in COMPARED)
        ]
        apart = short(one.spread("dino")) if len(one.results) > 1 else ""
        rows.append(("", [one.name, *cells, f"{one.copied():.1%}", *places, apart]))
    for name, scores in found.against.results[0].bounds.items():
        rows.append(("bound", [BOUNDS[name], *(cell(scores, score) for score in SCORES)]))
    return Table(head, [(sort, [*cells, *[""] * (len(head) - len(cells))]) for sort, cells in rows])


def with_bounds(gap: Difference) -> str:
    return f"{signed(gap.mean)} [{signed(gap.low)}, {signed(gap.high)}]"


def with_interval(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = interval(values)
    return f"{short(fmean(values))} [{short(low)}, {short(high)}]"


def gaps_table(of: Sequence[Sequence[Difference]]) -> Table:
    head = ["", *(text for score in COMPARED for text in (TITLES[score], "p, Holm"))]
    rows = []
    for row in zip(*of, strict=True):
        cells = [text for gap in row for text in (with_bounds(gap), f"{gap.p_holm:.4f}")]
        rows.append(("", [row[0].other, *cells]))
    return Table(head, rows)


def claims_table(of: Sequence[Tested]) -> Table:
    rows = []
    for one in of:
        claim, gap = one.claim, one.gap
        what = f"{TITLES[claim.score]}: {claim.higher} - {claim.lower}"
        what += f" ({claim.prompts} prompts)" if claim.prompts else ""
        found = ["", ""] if gap is None else [with_bounds(gap), f"{gap.p_holm:.4f}"]
        rows.append(("", [claim.says, one.verdict, *found, what, claim.source]))
    return Table(["claim", "", "found", "p, Holm", "compared", "source"], rows)


def kinds_table(found: Findings) -> Table:
    rows = []
    for kind in found.kinds:
        for one in found.first:
            means = [list(one.per_subject(score, kind).values()) for score in SCORES]
            cells = [short(fmean(values)) if values else "" for values in means]
            rows.append(("", [one.name, kind, *cells, f"{one.copied(kind):.1%}"]))
    return Table(["", "prompts", *(TITLES[score] for score in SCORES), "copies"], rows)


def conditions_table(standings: Sequence[Standing]) -> Table:
    of: dict[str, list[Standing]] = {}
    for one in standings:
        if one.condition:
            of.setdefault(one.name, []).append(one)
    rows = []
    under_several = [each for each in of.values() if len(each) > 1]
    for one in chain.from_iterable(map(of_shared_seeds, under_several)):
        cells = [with_interval(list(one.per_subject(score).values())) for score in COMPARED]
        rows.append(("", [one.name, one.condition, *cells]))
    return Table(["", "given", *(TITLES[score] for score in COMPARED)], rows)


def settings_table(config: Tournament, found: Findings) -> Table:
    rows = []
    for name, trials in found.trials.items():
        words = plan.chosen(config, name)
        if not trials:
            rows.append(("", [name, shlex.join(words), "", "", "no trials"]))
        for line, means in trials.items():
            choice = "chosen" if plan.words_of(config, name, config.split(line)) == words else ""
            rows.append(("", [name, line, *(short(means[score]) for score in COMPARED), choice]))
    return Table(["", "drawn with", *(TITLES[score] for score in COMPARED), ""], rows)


def costs_table(costs: Sequence[Mapping[str, Any]]) -> Table:
    shown = [key for key in COSTS if any(row.get(key) is not None for row in costs)]
    rows = [("", [row["method"], *(_cost(row.get(key), COSTS[key][1]) for key in shown)]) for row in costs]
    return Table(["", *(COSTS[key][0] for key in shown)], rows)


def _cost(value: float | None, factor: float) -> str:
    return "" if value is None else f"{value * factor:,.3g}" if value * factor < 1000 else f"{value * factor:,.0f}"


def scatters(first: Sequence[Standing], costs: Sequence[Mapping[str, Any]]) -> list[str]:
    """DINO and CLIP-T over what a subject's first picture costs: tuning, the pictures of its class, and drawing. Of
    equal samples only."""
    parts = ("flops_per_picture", "tuning_flops", "class_flops")
    flops = {row["method"]: sum(row.get(part) or 0 for part in parts) for row in costs}
    shown = [one for one in first if one.budget != plan.TIME and one.name in flops]
    found = []
    for score in COMPARED:
        figure = Figure(figsize=(5.5, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="FLOPs of tuning, class pictures and one picture", xscale="log")
        axes.set_ylabel(TITLES[score])
        axes.grid(color="#e5e5e5")
        axes.margins(0.2)
        places = [(one.name, flops[one.name], fmean(one.per_subject(score).values())) for one in shown]
        for _, x, y in places:
            axes.plot(x, y, "o", color="#117755", markersize=5)
        label_points(figure, axes, places)
        found.append(svg_of(figure))
    return found


def plane(first: Sequence[Standing]) -> str:
    """DINO over CLIP-T of all methods."""
    of = {
        (one.method, one.budget): {score: list(one.per_subject(score).values()) for score in COMPARED} for one in first
    }
    points = [
        Point(method, scores, of.get((method, plan.TIME)))
        for (method, budget), scores in of.items()
        if budget != plan.TIME
    ]
    bounds = first[0].results[0]
    return plane_svg(points, fixed_of(bounds), ceiling_of(bounds), longer="equal time")


def markdown(tables: Sequence[tuple[str, Table, str]]) -> str:
    lines = []
    for heading, table, note in tables:
        lines += [f"## {heading}", "", f"| {' | '.join(map(plain, table.head))} |", "|---" * len(table.head) + "|"]
        lines += [f"| {' | '.join(plain(str(cell)) for cell in cells)} |" for _, cells in table.rows]
        lines += ["", note, ""]
    return "\n".join(lines)


def numbers(found: Findings) -> dict[str, Any]:
    """All that the tables round."""
    return {
        "hash": found.against.results[0].hash,
        "bounds": found.against.results[0].bounds,
        "standings": [
            {
                **{"method": one.method, "budget": one.budget, "condition": one.condition, "copied": one.copied()},
                **{score: one.per_subject(score) for score in SCORES},
                "kinds": {kind: {score: one.per_subject(score, kind) for score in SCORES} for kind in found.kinds},
            }
            for one in found.standings
        ],
        **{
            name: [asdict(gap) for of_score in of.values() for gap in of_score]
            for name, of in (("gaps", found.gaps), ("condition_gaps", found.condition_gaps))
        },
        "claims": [{**asdict(one), "verdict": one.verdict} for one in found.claims],
        "ranks": dict(found.ranks),
        "trials": dict(found.trials),
        "costs": list(found.costs),
    }
