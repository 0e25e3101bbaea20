"""Which commands a tournament is, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pig.commands.options import Output
from pig.commands.tournament.config import Method, Tournament
from pig.errors import InputError, check_kinds
from pig.files import read_json
from pig.mistakes import read_config, without
from pig.models.cutting_out import CuttingOut

SAMPLES, TIME, TUNED = "samples", "time", "tuned"  # what a training's length is equal in
SCORES = ("dino", "clip_i", "clip_t", "dino_masked", "diversity")
MODELS, VALIDATION = "models", "validation"  # folders of tuned models: of the benchmark, of the trials
CHOSEN, COST = "chosen.json", "cost.json"
COUNTED = "--trainer.callbacks+=pig.training.costs.Costs"


@dataclass(frozen=True)
class Step:
    """A command. name: of its record and its log. words: without `python -m`. resume: a checkpoint that `fit` goes on
    from where it is there. data: a folder that is linked to where the command looks for `data`. anew: given each time,
    as what it reads may have changed."""

    name: str
    words: tuple[str, ...]
    resume: Path | None = None
    data: tuple[Path, Path] | None = None
    anew: bool = False


Chain = Sequence[Step]  # one after the other; chains of a stage are independent


@dataclass(frozen=True)
class Entry:
    """A model that takes part. budget: what its training's length is equal in. folder: of all that is its own, the
    training or tuning that its method stands for included."""

    method: str
    budget: str
    seed: int
    folder: Path

    def model(self, config: Tournament) -> str:
        """As `generate --model` takes it."""
        method = config.methods[self.method]
        if method.kind == "base":
            return config.base
        name, source = config.weights_of(self.method)
        made = training_folder(config, name, self.budget, self.seed)
        if source.kind == "tuned":
            return f"{'dreamblend:' if method.kind == 'blended' else ''}{made / MODELS}"
        return str(made / "model")


@dataclass(frozen=True)
class Condition:
    """What a model is given. words: of `generate`."""

    name: str
    subjects: str
    words: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        return self.name.replace(", ", "_").replace(" ", "_")


def training_folder(config: Tournament, method: str, budget: str, seed: int) -> Path:
    return config.folder() / method / budget / str(seed)


def entries(config: Tournament) -> list[Entry]:
    found = []
    for name, method in config.methods.items():
        if method.kind == "base":
            found.append(Entry(name, "", config.seeds[0], config.folder() / name))
            continue
        timed = config.same_time and method.kind == "trained" and name != config.against
        own = SAMPLES if config.weights_of(name)[1].kind == "trained" else TUNED
        found += [
            Entry(name, budget, seed, training_folder(config, name, budget, seed))
            for budget in (own, *([TIME] if timed else []))
            for seed in config.seeds_of(name)
        ]
    return found


def firsts(config: Tournament) -> dict[str, Entry]:
    """Of each method the one of equal samples and the first seed."""
    found: dict[str, Entry] = {}
    for one in entries(config):
        found.setdefault(one.method, one)
    return found


def conditions(config: Tournament, entry: Entry) -> list[Condition]:
    """Those that an entry is drawn in; the first one counts in the standings."""
    method = config.methods[entry.method]
    subjects = config.path(config.subjects)
    if config.weights_of(entry.method)[1].kind != "trained":  # tuned on all pictures, or on none
        return [Condition("", subjects)]
    counts = method.references or config.references
    of = [(count, (f"--references_per_subject={count}",)) for count in counts]
    found = [Condition(pictures(count, "whole"), subjects, words) for count, words in of]
    seeds = config.seeds_of(entry.method)
    if entry.budget == TIME or entry.seed not in seeds[: config.condition_seeds or None]:
        return found[:1]
    if config.partial:
        found += [Condition(pictures(count, "partial"), config.path(config.partial), words) for count, words in of]
    if method.common:
        words = (*found[0].words, *config.split(method.common))
        found.append(Condition(f"{found[0].name}, common guidance", subjects, words))
    return found


def name_of(method: str, budget: str) -> str:
    return f"{method}, equal time" if budget == TIME else method


def pictures(count: int, what: str) -> str:
    return f"{count} {what} picture{'s' if count > 1 else ''}"


def stages(config: Tournament, also: Sequence[Path]) -> dict[str, list[Chain]]:
    """Those whose commands are known before the first one has run. also: folders of images by other programs."""
    return {
        "data": data(config),
        "scoring of --also": guests(config, also),
        "training, equal samples": trainings(config, SAMPLES),
        "tuning": tunings(config),
        "trials of settings": trials(config),
    }


def data(config: Tournament) -> list[Chain]:
    return [[Step(f"data/{number}", tuple(config.split(line))) for number, line in enumerate(config.data)]]


def trainings(config: Tournament, budget: str) -> list[Chain]:
    return [
        [fit(config, one, steps_of(config, one)), export(config, one)]
        for one in entries(config)
        if config.methods[one.method].kind == "trained" and one.budget == budget
    ]


def steps_of(config: Tournament, entry: Entry) -> int:
    """Of the optimizer: of equal samples, or of equal time by what the methods' first trainings have taken."""
    method = config.methods[entry.method]
    batch = config.batch_size(method)
    if entry.budget == SAMPLES:
        return max(1, config.samples // batch)
    ours, theirs = (
        seconds_per_sample(
            cost_of(config.methods[name], training_folder(config, name, SAMPLES, config.seeds_of(name)[0]))
        )
        for name in (config.against, entry.method)
    )
    return max(1, round(config.samples * ours / theirs / batch))


def seconds_per_sample(cost: Mapping[str, Any]) -> float:
    return cost["seconds"] / cost["samples"]


def cost_of(method: Method, run: Path) -> dict[str, Any]:
    """What a training, or the tuning of a subject, has cost; see `pig.training.costs.Costs`."""
    told = read_config(method.config)
    file = Path(told["trainer"]["default_root_dir"].replace("${run}", str(run))) / COST
    cost = read_json(file, f"{file} is missing: remove {run} and start again")
    check_kinds(cost, {"samples": int, "peak_memory_bytes": int, "machine": str}, str(file))
    check_kinds(cost, dict.fromkeys(("seconds", "flops_per_sample"), (int, float)), str(file))
    return cost


def fit(config: Tournament, entry: Entry, steps: int) -> Step:
    method, run = config.methods[entry.method], entry.folder
    words = [
        *("pig.cli", "fit", f"--config={method.config}", f"--run={run}"),
        *(f"--seed_everything={entry.seed}", f"--data.seed={entry.seed}", f"--trainer.max_steps={steps}"),
        *config.split(config.fit),
        *config.split(method.words),
        COUNTED,
    ]
    given = (config.folder() / "data", run / "data")
    return Step(f"{run.relative_to(config.folder())}/fit", tuple(words), last_checkpoint(method, run), given)


def last_checkpoint(method: Method, run: Path) -> Path:
    """Where the method's config has it.

    Raises:
        InputError: it keeps none.
    """
    told = read_config(method.config)
    for callback in told["trainer"].get("callbacks", ()):
        given = callback.get("init_args", {})
        if given.get("save_last"):
            return Path(given["dirpath"].replace("${run}", str(run))) / "last.ckpt"
    raise InputError(f"{method.config} keeps no last checkpoint: give its ModelCheckpoint save_last: true")


def export(config: Tournament, entry: Entry) -> Step:
    checkpoint = last_checkpoint(config.methods[entry.method], entry.folder)
    words = ("pig.cli", "export", f"--checkpoint={checkpoint}", f"--out={entry.folder / 'model'}", "--delta", "--half")
    return Step(f"{entry.method}/{entry.budget}/{entry.seed}/export", words)


def tunings(config: Tournament) -> list[Chain]:
    found: list[Chain] = []
    for one in entries(config):
        method = config.methods[one.method]
        if method.kind == "tuned":
            tried = method.trials or any(other.of == one.method and other.trials for other in config.methods.values())
            first = one.seed == config.seeds_of(one.method)[0]
            sets = {MODELS: config.subjects} | ({VALIDATION: config.validation} if tried and first else {})
            seed = f"--seed_everything={one.seed}"
            words = ("pig.cli", "tune", f"--config={method.config}", seed, *config.split(method.words), COUNTED)
            found.append(
                [
                    Step(
                        f"{one.folder.relative_to(config.folder())}/tune_{name}",
                        (*words, f"--subjects={config.path(subjects)}", f"--out={one.folder / name}"),
                    )
                    for name, subjects in sets.items()
                ]
            )
    return found


def trial_folder(config: Tournament, method: str, number: int) -> Path:
    return config.folder() / method / "trials" / str(number)


def trials(config: Tournament) -> list[Chain]:
    """Each method's, by the first seed's model, on the validation subjects."""
    found: list[Chain] = []
    for name, entry in firsts(config).items():
        method, model = config.methods[name], entry.model(config)
        if config.weights_of(name)[1].kind == "tuned":
            model = model.removesuffix(MODELS) + VALIDATION
        condition = Condition("", config.path(config.validation), conditions(config, entry)[0].words)
        for number, line in enumerate(method.trials):
            folder = trial_folder(config, name, number)
            words = [*words_of(config, name, config.split(line)), *config.split(config.trying)]
            found.append(list(drawn_and_scored(config, model, folder, condition, words, f"{name}, trial {number}")))
    return found


def drawn_and_scored(
    config: Tournament, model: str, folder: Path, condition: Condition, words: Sequence[str], name: str
) -> Iterator[Step]:
    """Images of a model, and their scores: against the benchmark's own pictures, whatever it was given."""
    step = str(folder.relative_to(config.folder()))
    images = folder / "images" / condition.slug
    prompts = prompts_of(config)
    # The last word counts: what all are drawn with, the method's own, what the condition says.
    told = [*prompts, *config.split(config.drawing), *words, *condition.words]
    draw = [f"--model={model}", f"--subjects={condition.subjects}", f"--out={images}", *told]
    yield Step(f"{step}/draw_{condition.slug}", ("pig.cli", "generate", *draw))
    partial = condition.subjects == config.path(config.partial)
    subjects = config.path(config.subjects) if partial else condition.subjects
    told = [f"--images={images}", f"--subjects={subjects}", f"--out={folder / 'scores' / condition.slug}"]
    yield Step(f"{step}/score_{condition.slug}", (*scorer(config, words), *told, f"--name={name}"))


def prompts_of(config: Tournament) -> list[str]:
    return [f"--prompts={config.path(config.prompts)}"] if config.prompts else []


def scorer(config: Tournament, words: Sequence[str] = ()) -> list[str]:
    """The command that scores, but for what and whereto. words: that the images were drawn with."""
    count = f"--images_per_prompt={config.images_per_prompt(words)}"
    given = (*prompts_of(config), count, *config.split(config.scoring))
    return ["pig.cli", "evaluate", f"--config={config.scorer}", *given]


def tried(config: Tournament, method: str) -> str:
    """Whose trials choose the words that a method is drawn with."""
    told = config.methods[method]
    return told.of if told.kind == "again" else method


def words_of(config: Tournament, method: str, trial: Sequence[str]) -> list[str]:
    """The words of `generate` that a method is drawn with: its own, and those of a trial. One that draws again has
    those of the method whose weights it takes, and its own over them."""
    told = config.methods[method]
    if told.kind == "again":
        return [*words_of(config, told.of, trial), *config.split(told.drawn)]
    return [*config.split(told.drawn), *trial]


def chosen(config: Tournament, method: str) -> list[str]:
    """The words of the best trial among them."""
    of = tried(config, method)
    file = config.folder() / of / CHOSEN
    best: list[str] = []
    if config.methods[of].trials:
        found = read_json(file, f"{file} is missing: start the tournament again")
        check_kinds(found, {"words": list}, str(file))
        best = found["words"]
    return words_of(config, method, best)


def drawings(config: Tournament) -> list[Chain]:
    """All entries under all their conditions, and what a picture of each method costs."""
    found: list[Chain] = []
    measured = set(firsts(config).values())
    for one in entries(config):
        words, model = chosen(config, one.method), one.model(config)
        chain: list[Step] = []
        for condition in conditions(config, one):
            chain += drawn_and_scored(config, model, one.folder, condition, words, one.method)
        if one in measured:
            told = [f"--model={model}", f"--subjects={config.path(config.subjects)}", *prompts_of(config)]
            told += without([*config.split(config.drawing), *words, *conditions(config, one)[0].words], NOT_FOR_COST)
            out = f"--out={config.folder() / one.method / 'picture.json'}"
            chain.append(Step(f"{one.method}/cost", ("pig.cli", "cost", *told, out)))
        found.append(chain)
    return found


NOT_FOR_COST = {one.name for kind in (Output, CuttingOut) for one in fields(kind)}  # which `generate` alone takes


def guest_folder(config: Tournament, images: Path) -> Path:
    return config.folder() / "also" / images.resolve().name


def guests(config: Tournament, also: Sequence[Path]) -> list[Chain]:
    """The scores of images by other programs."""
    found: list[Chain] = []
    for folder in also:
        out = guest_folder(config, folder)
        told = [f"--images={folder}", f"--subjects={config.path(config.subjects)}", f"--out={out}"]
        found.append([Step(f"also/{out.name}", (*scorer(config), *told, f"--name={out.name}"), anew=True)])
    return found
