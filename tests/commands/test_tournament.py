"""The tournament: what it plans, that it is fair, what it makes of results, and that it goes on where it was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pig import cli
from pig.arguments import parse
from pig.commands.tournament import plan
from pig.commands.tournament.config import Tournament, load_config
from pig.commands.tournament.estimate import estimate
from pig.commands.tournament.run import claim, is_done, record_of
from pig.commands.tournament.standings import Standing, gaps, judge, ranks
from pig.errors import InputError
from pig.evaluation.results import Result
from pig.methods import METHODS
from pig.models.names import TOYWORLD

CONFIG = Path("configs/tournament/toyworld.yaml")
CLAIMS = sorted(Path("configs/claims").glob("*.yaml"))


def words_of(chains: list[plan.Chain]) -> list[tuple[str, ...]]:
    return [step.words for chain in chains for step in chain]


@pytest.fixture
def config(tmp_path) -> Tournament:
    """The toy world's, whose first trainings are done."""
    told = load_config(CONFIG, [f"out={tmp_path}"])
    for number, (name, method) in enumerate(told.methods.items()):
        if method.kind == "trained":
            run = tmp_path / name / plan.SAMPLES / "0" / "fit"  # its default_root_dir
            run.mkdir(parents=True)
            told_of = {"seconds": 100.0 * (number + 1), "samples": 19200, "flops_per_sample": 1, "peak_memory_bytes": 1}
            (run / plan.COST).write_text(json.dumps(told_of))
    return told


def test_all_are_trained_on_the_same(config) -> None:
    """The same shards in the same order, the same number of samples, and no setting of the data of one's own."""
    fits = [words for words in words_of(plan.trainings(config, plan.SAMPLES)) if "fit" in words]
    assert len(fits) == 4 * 2
    own = ("--config", "--run", "--trainer.callbacks")
    for seed in (0, 1):
        of_seed = [words for words in fits if f"--data.seed={seed}" in words]
        shared = {tuple(word for word in words if not word.startswith(own)) for words in of_seed}
        assert len(of_seed) == 4
        assert shared == {
            (
                *("pig.cli", "fit", f"--seed_everything={seed}", f"--data.seed={seed}", "--trainer.max_steps=600"),
                "--trainer.limit_val_batches=0",
            )
        }


def test_all_are_drawn_and_scored_alike(config) -> None:
    drawn = [words for words in words_of(plan.drawings(config)) if "generate" in words]
    own = ("--model", "--out", "--references_per_subject", "--image_guidance")
    assert len({tuple(word for word in words if not word.startswith(own)) for words in drawn}) == 1
    scored = [words for words in words_of(plan.drawings(config)) if "evaluate" in words]
    own = ("--images", "--out", "--name")
    assert len({tuple(word for word in words if not word.startswith(own)) for words in scored}) == 1
    assert len(drawn) == len(scored)
    first = {one.method: plan.conditions(config, one)[0] for one in plan.entries(config)}
    assert {first[name].words for name in ("bootpig", "ezigen", "instantbooth", "ip_adapter")} == {
        ("--references_per_subject=1",)
    }


def test_equal_time_is_that_of_the_one_that_all_are_compared_with(config) -> None:
    steps = {one.method: plan.steps_of(config, one) for one in plan.entries(config) if one.budget == plan.TIME}
    assert steps == {"ezigen": 300, "instantbooth": 200, "ip_adapter": 150}


def test_trials_are_as_many_for_each(config, tmp_path) -> None:
    some = "[--image_guidance=3, --image_guidance=5]"
    given = [f"out={tmp_path}", "validation=v", f"methods.bootpig.trials={some}"]
    with pytest.raises(InputError, match=r"must have the same number, got \[1, 2\]"):
        load_config(CONFIG, [*given, "methods.ezigen.trials=[--loops=1]"])
    with pytest.raises(InputError, match="trials need validation"):
        load_config(CONFIG, [f"out={tmp_path}", f"methods.bootpig.trials={some}"])
    found = words_of(plan.trials(load_config(CONFIG, given)))
    assert sum("generate" in words for words in found) == 2
    assert all("--subjects=v" in words for words in found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["methods.bootpig.config=x.yaml"], "methods.bootpig.config: x.yaml: no such file"),
        (["methods.bootpig.config=configs/datagen/toyworld.yaml"], "toyworld.yaml is damaged: trainer is"),
        (["methods.bootpig.words='--data.batch_size=x'"], "--data.batch_size=x is no number of samples"),
        (['fit="--a \'b"'], "No closing quotation"),
        (["out=' '"], "out is empty"),
        (["base=toyworld"], "give it as `generate --model` takes a base model"),
        (["scorer=nope.yaml"], "scorer=nope.yaml: no such file"),
        (["seeds=[-1]"], "seeds: from 0"),
        (["methods.data.kind=base"], "'data' is no name"),
        (["methods.dreamblend.of=bootpig"], "methods.dreamblend.of: name a tuned method"),
        (["against=dreambooth"], "equal time is that of a trained method"),
        (["methods.base.of=bootpig"], "methods.base.of: a method of kind base does not read it"),
        (["methods.dreamblend.seeds=[1]"], "methods.dreamblend.seeds: a method of kind blended does not read it"),
        (["methods.again.kind=again", "methods.again.of=base"], "methods.again.of: name a trained or tuned method"),
        (["methods.bootpig.seeds=[-1]"], "methods.bootpig.seeds: from 0"),
        (["methods.bootpig.references=[0]"], "each of methods.bootpig.references must be at least 1"),
        (["against=x"], "against 'x' is none of bootpig"),
        (["methods.bootpig.kind=x"], "methods.bootpig.kind 'x' is none of trained"),
        (["samples=0"], "samples must be between 1|samples must be at least 1"),
        (["seeds=[0,0]"], "each number once"),
        (["sample=3"], "sample"),
        (["samples=x"], "samples"),
    ],
)
def test_bad_configs(tmp_path, given, message) -> None:
    with pytest.raises(InputError, match=message):
        load_config(CONFIG, [f"out={tmp_path}", *given])


AGAIN = ["methods.mean.kind=again", "methods.mean.of=bootpig", "methods.mean.references=[4]", "methods.mean.drawn=--x"]


def test_one_draws_again_with_the_weights_of_another(config, tmp_path) -> None:
    told = load_config(CONFIG, [f"out={tmp_path}", *AGAIN])
    assert words_of(plan.trainings(told, plan.SAMPLES)) == words_of(plan.trainings(config, plan.SAMPLES))
    drawn = [words for words in words_of(plan.drawings(told)) if "generate" in words and "--x" in words]
    assert [word for words in drawn for word in words if word.startswith("--model")] == [
        f"--model={tmp_path}/bootpig/samples/{seed}/model" for seed in (0, 1)
    ]
    assert all("--references_per_subject=4" in words for words in drawn)
    of_tuned = ["methods.early.kind=again", "methods.early.of=dreambooth", "methods.early.drawn=--step=5"]
    drawn = words_of(plan.drawings(load_config(CONFIG, [f"out={tmp_path}", *of_tuned])))
    early = [words for words in drawn if "generate" in words and "--step=5" in words]
    assert [f"--model={tmp_path}/dreambooth/tuned/{seed}/models" in early[seed] for seed in (0, 1)] == [True, True]
    less = ["methods.bootpig.seeds=[7]", "methods.dreambooth.seeds=[8]"]
    seeds = {(one.method, one.seed) for one in plan.entries(load_config(CONFIG, [f"out={tmp_path}", *AGAIN, *less]))}
    assert {seed for name, seed in seeds if name in ("bootpig", "mean")} == {7}
    assert {seed for name, seed in seeds if name in ("dreambooth", "dreamblend")} == {8}
    assert {seed for name, seed in seeds if name == "ezigen"} == {0, 1}


def test_tuned_methods_have_as_many_seeds(config, tmp_path) -> None:
    told = load_config(CONFIG, [f"out={tmp_path}", "validation=v", "methods.dreamblend.trials=[--early=1]"])
    words = [words for words in words_of(plan.tunings(told)) if "--config=configs/dreambooth/toyworld.yaml" in words]
    seeds = [word for one in words for word in one if word.startswith(("--seed_everything", "--subjects"))]
    benchmark = f"--subjects={tmp_path}/data/subjects"
    assert seeds == [
        "--seed_everything=0",
        benchmark,
        "--seed_everything=0",
        "--subjects=v",
        "--seed_everything=1",
        benchmark,
    ]


def claims(**changed: str) -> str:
    fields = {"source": "a", "says": "b", "higher": "bootpig", "lower": "ezigen", **changed}
    return "claims=[{" + ", ".join(f'{key}: "{value}"' for key, value in fields.items()) + "}]"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"higher": "x"}, r"claims\[0\].higher 'x' is none of bootpig, bootpig, 1 whole picture, "),
        ({"lower": "bootpig, 1 partial picture"}, r"claims\[0\].lower 'bootpig, 1 partial picture' is none of"),
        ({"score": "fid"}, r"claims\[0\].score 'fid' is none of dino"),
        ({"prompts": "long"}, r"claims\[0\].prompts 'long' is none of scene"),
        ({"lower": "bootpig, 1 whole picture"}, r"claims\[0\]: higher and lower are the same"),
        ({"score": "diversity", "more": "drawing=--images_per_prompt=1"}, r"claims\[0\]: diversity needs two images"),
        ({"prompts": "plain", "more": "prompts=FILE"}, r"claims\[0\].prompts 'plain' is none of property, scene"),
        ({"score": "dino_masked", "more": "scorer=FILE"}, r"claims\[0\]: dino_masked needs a segmenter"),
    ],
)
def test_claims_of_what_will_not_be_there(tmp_path, changed, message) -> None:
    more = changed.pop("more", "against=bootpig")
    file = tmp_path / "file"
    file.write_text("a {0} {1} on a beach\na red {0} {1}\n" if more.startswith("prompts") else "clip: toyworld\n")
    given = [f"out={tmp_path / 'out'}", more.replace("FILE", str(file)), claims(**changed)]
    with pytest.raises(InputError, match=message):
        cli.run(["tournament", str(CONFIG), *given])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", CLAIMS, ids=lambda file: file.stem)
def test_the_papers_claims_are_of_what_will_be_there(tmp_path, file) -> None:
    told = load_config(file, [f"out={tmp_path}"])
    plan.check_claims(told)
    assert told.claims


@pytest.mark.parametrize("file", [*CLAIMS, CONFIG], ids=lambda file: file.stem)
def test_generate_takes_the_words_of_trained_methods(tmp_path, file) -> None:
    """Those of all trials and conditions, as the embedded model of the same method takes them."""
    told = load_config(file, [f"out={tmp_path}"])
    lines = []
    for one in plan.entries(told):
        method, (_, source) = told.methods[one.method], told.weights_of(one.method)
        if source.kind == "trained":
            model = f"--model={TOYWORLD}/{Path(source.config).parent.name}".removesuffix("/bootpig")
            for trial in method.trials or [""]:
                for given in plan.conditions(told, one):
                    words = told.split(f"{method.drawn} {trial} {told.drawing}")
                    lines.append((model, "--subjects=s", "--out=o", *words, *given.words))
    for line in dict.fromkeys(lines):
        parse("generate", cli.COMMANDS["generate"][0], list(line))
    assert len(lines) > 1 or file.stem == "dreamblend"


def test_bad_input(tmp_path) -> None:
    with pytest.raises(InputError, match="no such config"):
        cli.run(["tournament", str(tmp_path / "none.yaml")])
    with pytest.raises(InputError, match="--also: .* holds no images"):
        cli.run(["tournament", str(CONFIG), f"out={tmp_path}", "--also", str(tmp_path / "none")])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a folder"):
        cli.run(["tournament", str(CONFIG), f"out={tmp_path / 'file'}", "--dry_run"])


def test_a_folder_holds_one_tournament(tmp_path) -> None:
    claim(load_config(CONFIG, [f"out={tmp_path}"]))
    claim(load_config(CONFIG, [f"out={tmp_path}"]))
    with pytest.raises(InputError, match="was begun with other settings: samples was 19200, now it is 64"):
        claim(load_config(CONFIG, [f"out={tmp_path}", "samples=64"]))
    with pytest.raises(InputError, match=r"seeds was \[0, 1\], now it is \[0\]"):
        claim(load_config(CONFIG, [f"out={tmp_path}", "seeds=[0]"]))
    claim(load_config(CONFIG, [f"out={tmp_path}", claims()]))  # which change nothing that is made
    claim(load_config(CONFIG, [f"out={tmp_path}"]))


def test_a_step_is_done_by_its_own_words(tmp_path) -> None:
    step = plan.Step("a/fit", ("pig.cli", "fit"))
    assert not is_done(tmp_path, step)
    record_of(tmp_path, step).parent.mkdir(parents=True)
    record_of(tmp_path, step).write_text(json.dumps({"words": ["pig.cli", "fit"]}))
    assert is_done(tmp_path, step)
    with pytest.raises(InputError, match="a/fit was done with other words, now it has --x"):
        is_done(tmp_path, plan.Step("a/fit", ("pig.cli", "fit", "--x")))


def test_the_plan_is_printed_and_nothing_made(tmp_path, capsys) -> None:
    cli.run(["tournament", str(CONFIG), "--dry_run", f"out={tmp_path / 'out'}", "seeds=[0, 1]"])
    said = capsys.readouterr().out
    assert "python -m data_gen subjects" in said
    assert said.count("python -m pig.cli fit") == 8
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", [*CLAIMS, *CONFIG.parent.glob("*.yaml")], ids=lambda file: file.stem)
def test_as_many_images_are_scored_as_drawn(tmp_path, file) -> None:
    told = load_config(
        file, [f"out={tmp_path}", *[f"methods.{name}.trials=[]" for name in load_config(file, []).methods]]
    )
    for chain in plan.drawings(told):
        for draw, score in zip(chain[::2], chain[1::2], strict=False):
            drawn = [word for word in draw.words if word.startswith("--images_per_prompt")]
            assert [word for word in score.words if word.startswith("--images_per_prompt")] == drawn


def test_an_estimate_counts_trainings_tunings_and_pictures(tmp_path, toy_data) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {0} {1} on a beach\na red {0} {1}\n")
    given = [f"subjects={toy_data / 'subjects'}", f"prompts={prompts}", "drawing=--steps=50 --images_per_prompt=3"]
    config = load_config(CONFIG, [f"out={tmp_path}", "same_time=false", *given])
    kept = ("bootpig", "dreambooth", "dreamblend", "base")
    config.methods = {name: config.methods[name] for name in kept}
    config.methods["bootpig"].common = ""
    rows = dict(estimate(config))

    def passes(what: str) -> float:
        return float(re.match(r"[\d.,]+", rows[what])[0].replace(",", ""))  # type: ignore[index]

    plain, one, four = (
        passes(f"{name}: a picture{given}")
        for name, given in (("base", ""), ("bootpig", ", 1 whole picture"), ("bootpig", ", 4 whole pictures"))
    )
    assert 100 <= plain < 102  # two branches, and once what is no UNet
    assert plain < one < four < 10 * plain
    assert passes("dreamblend: a picture") > 2 * plain
    (total,) = (key for key in rows if key.endswith("sets; all"))
    assert (
        total == f"{12 * 2 * 3 * 9:,} pictures in 9 sets; all"
    )  # two of bootpig, one of each tuned, by two seeds; base
    unit = float(rows["UNet, a forward pass"].split()[0]) * 1e12
    counts = re.fullmatch(r"([\d.]+) EFLOP \(training ([\d.]+), tuning ([\d.]+), pictures ([\d.]+)\)", rows[total])
    assert counts is not None
    whole, training, tuning, drawing = map(float, counts.groups())
    assert whole == pytest.approx(training + tuning + drawing, abs=0.02)
    assert training == pytest.approx(2 * config.samples * passes("bootpig: a sample") * unit / 1e18, abs=0.01)
    class_pictures = 12 * 100 * 20 * 2
    tuned = 2 * 12 * 400 * 2 * passes("dreambooth: a sample") + class_pictures
    assert tuning == pytest.approx(tuned * unit / 1e18, abs=0.01)
    each = 2 * (one + four + passes("dreambooth: a picture") + passes("dreamblend: a picture")) + plain
    assert drawing == pytest.approx(each * 72 * unit / 1e18, abs=0.01)


# -- what is made of results ------------------------------------------------------------------------------------------


def result_of(name: str, dino: dict[str, list[float]], kind: str = "scene") -> Result:
    images = [
        {"subject": subject, "prompt_index": 0, "seed": str(seed), "dino": value, "clip_t": 0.5, "kind": kind,
         "copied": seed == 1}
        for subject, values in dino.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    return Result("dreambooth", "0", name, {}, {}, {}, {}, images, {}, [], [], "", {})


def standing(name: str, *each: list[float]) -> Standing:
    """Of 12 subjects with an image of each training seed's value, and a second one .2 above it."""
    results = tuple(
        result_of(name, {f"s{at}": [value, value + 0.2] for at, value in enumerate(values)}) for values in each
    )
    return Standing(name, "", "", results)


LOW = [0.3 + 0.01 * at for at in range(12)]


def test_means_are_over_images_then_training_seeds() -> None:
    one = standing("a", LOW, [value + 0.2 for value in LOW])
    assert one.per_subject("dino")["s0"] == pytest.approx(0.3 + 0.1 + 0.1)
    assert one.per_subject("dino", "property") == {}
    assert one.spread("dino") == pytest.approx(0.2)
    assert one.copied() == 0.5


def test_differences_are_paired_and_corrected() -> None:
    base, same, more = standing("base", LOW), standing("same", LOW), standing("more", [x + 0.1 for x in LOW])
    found = {gap.name: gap for gap in gaps([base], [same, more], "dino")}
    assert found["same"].mean == 0
    assert found["same"].p == 1
    assert found["more"].mean == pytest.approx(found["more"].low) == pytest.approx(0.1)
    assert found["more"].p < 0.01
    alone = gaps([base], [more], "dino")[0]
    assert found["more"].p == pytest.approx(2 * alone.p)  # Holm, of two


def test_claims_hold_or_do_not_or_cannot_be_told(tmp_path) -> None:
    low, more = standing("ezigen", LOW), standing("bootpig", [x + 0.1 for x in LOW])
    near = standing("ip_adapter", [x + (0.02 if at % 2 else -0.02) for at, x in enumerate(LOW)])
    config = load_config(CONFIG, [f"out={tmp_path}", claims()])
    config.claims += [
        replace(config.claims[0], higher="ezigen", lower="bootpig"),
        replace(config.claims[0], higher="ip_adapter"),
    ]
    found = judge(config, [low, more, near])
    assert [one.verdict for one in found] == ["holds", "does not hold", "cannot be told"]
    assert [one.gap.mean for one in found] == pytest.approx([0.1, -0.1, 0])
    alone = judge(replace(config, claims=config.claims[:1]), [low, more])[0]
    assert found[0].gap.p == pytest.approx(3 * alone.gap.p)  # Holm, of three
    config.claims = [replace(config.claims[0], prompts="property")]
    assert [one.verdict for one in judge(config, [low, more])] == ["not scored"]


def test_a_claim_may_name_what_was_given(tmp_path) -> None:
    first, second = (
        replace(standing("bootpig", [x + step for x in LOW]), condition=name)
        for name, step in (("1 whole picture", 0.0), ("4 whole pictures", 0.2))
    )
    config = load_config(CONFIG, [f"out={tmp_path}", claims(higher="bootpig, 4 whole pictures", lower="bootpig")])
    (found,) = judge(config, [first, second])
    assert found.gap.mean == pytest.approx(0.2)
    of_four = replace(standing("mean", [x + 0.1 for x in LOW]), condition="4 whole pictures")
    assert gaps([first, second], [of_four], "dino")[0].mean == pytest.approx(-0.1)  # to four, not to one
    assert gaps([first], [of_four], "dino")[0].mean == pytest.approx(0.1)


def test_ranks_know_what_they_do_not_know() -> None:
    best, low = standing("best", [x + 0.2 for x in LOW]), standing("low", LOW)
    near = standing("near", [x + (0.02 if at % 2 else -0.02) for at, x in enumerate(LOW)])
    found = ranks([low, best, near], "dino")
    assert found["best"] == (1, 1, 1)
    assert found["low"][1:] == found["near"][1:] == (2, 3)


# -- a method of somebody else's ---------------------------------------------------------------------------------------


def test_a_method_joins_by_one_line(tmp_path, toy_data, monkeypatch) -> None:
    """The one of CONTRIBUTING's recipe, all of whose commands are given here, in this process."""
    monkeypatch.syspath_prepend("tests/methods")
    monkeypatch.setitem(METHODS, "toy_method", "toy_method")
    told = yaml.safe_load(Path("configs/bootpig/toyworld.yaml").read_text())
    told["trainer"] |= {"precision": "32-true", "accelerator": "cpu"}
    told["model"] = {"class_path": "toy_method.Module", "init_args": {"base": "toyworld"}}
    file, prompts, out = tmp_path / "mine.yaml", tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text(yaml.safe_dump(told, sort_keys=False))
    prompts.write_text("a photo of a {0} {1}, on a beach\n")
    given = [f"out={out}", "seeds=[0]", "samples=8", f"subjects={toy_data / 'subjects'}", f"prompts={prompts}"]
    line = f"methods.mine={{config: {file}, words: --data.batch_size=4}}"
    config = load_config(CONFIG, [*given, line, "drawing=--steps=1 --batch_size=12"])
    (training,) = (chain for chain in plan.trainings(config, plan.SAMPLES) if chain[0].name.startswith("mine/"))
    run = plan.training_folder(config, "mine", plan.SAMPLES, 0)
    run.mkdir(parents=True)
    (run / "data").symlink_to(toy_data)
    mine = next(one for one in plan.entries(config) if one.method == "mine")
    chains = [chain for chain in plan.drawings(config) if str(run) in " ".join(chain[0].words)]
    assert len(chains[0]) == 2 * len(plan.conditions(config, mine)) + 1
    for step in (*training, *chains[0][:2], chains[0][-1]):
        monkeypatch.setattr(sys, "argv", list(step.words))
        cli.run(list(step.words[1:]))
    result = Result.read(run / "scores/1_whole_picture")
    assert result.subjects.keys() == {path.name for path in (toy_data / "subjects").iterdir() if path.is_dir()}
    assert plan.cost_of(config.methods["mine"], run)["samples"] == 8
    assert json.loads((out / "mine/picture.json").read_text())["flops_per_picture"] > 0


# -- the whole of it --------------------------------------------------------------------------------------------------

SHORT = "--trainer.max_steps=2 --model.save_at=[1] --data.prior.count=2 --data.prior.steps=1"
TINY = """
out: {out}
data:
  - data_gen triplets --out {{out}}/data/triplets --count 96
  - data_gen triplets --out {{out}}/data/val --count 8 --first_seed 1100000000
  - data_gen subjects --out {{out}}/data/subjects --count 2
  - data_gen subjects --out {{out}}/data/validation --count 1
subjects: "{{out}}/data/subjects"
validation: "{{out}}/data/validation"
partial: "{{out}}/data/subjects"
prompts: {prompts}
base: base:toyworld
scorer: configs/evaluation/toyworld.yaml
samples: 64
seeds: [0, 1]
references: [1]
fit: --trainer.limit_val_batches=0 --trainer.precision=32-true
drawing: --steps=2 --images_per_prompt=2
methods:
  bootpig: {{config: configs/bootpig/toyworld.yaml, trials: [--image_guidance=2, --image_guidance=3],
    common: --image_guidance=3}}
  ezigen: {{config: configs/ezigen/toyworld.yaml}}
  dreambooth: {{kind: tuned, config: configs/dreambooth/toyworld.yaml, words: "{short} --data.prior.folder={{out}}/cp"}}
  dreamblend: {{kind: blended, of: dreambooth}}
  base: {{kind: base}}
"""


def scores(out: Path) -> dict[str, object]:
    """All numbers but those that were measured by a clock."""
    told = json.loads((out / "tournament.json").read_text())
    return {"gaps": told["gaps"], "ranks": told["ranks"], "standings": told["standings"]}


@pytest.mark.slow
def test_killed_and_continued_it_ends_with_the_same_numbers(tmp_path) -> None:
    """Equal times differ from run to run, so they are left out here."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {0} {1}, on a beach\na red {0} {1}\n")
    outs = [tmp_path / name for name in ("whole", "killed")]
    for out in outs:
        file = tmp_path / f"{out.name}.yaml"
        file.write_text(TINY.format(out=out, prompts=prompts, short=SHORT))
        command = [sys.executable, "-W", "ignore", "-m", "pig.cli", "tournament", str(file), "same_time=false"]
        for _ in range(3 if out.name == "killed" else 0):
            records = len(list((out / "records").rglob("*.json"))) if out.exists() else 0
            process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
            deadline = time.monotonic() + 600
            while len(list((out / "records").rglob("*.json"))) < records + 5 and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.2)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(3)  # for what it has started to end
        done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, done.stdout + done.stderr
    assert scores(outs[0]) == scores(outs[1])
    page = (outs[0] / "report.html").read_text()
    for heading in ("Standings", "Differences to bootpig", "By kind of prompt", "Other conditions", "Costs"):
        assert heading in page
    told = json.loads((outs[0] / "tournament.json").read_text())
    costs = {row["method"]: row for row in told["costs"]}
    assert costs["bootpig"]["training_samples"] == 64
    assert costs["dreamblend"]["tuning_flops"] == costs["dreambooth"]["tuning_flops"] > 0
    assert costs["base"]["trained_weights"] == 0
    assert costs["bootpig"]["flops_per_picture"] > costs["base"]["flops_per_picture"] > 0
    assert json.loads((outs[0] / "bootpig/chosen.json").read_text())["words"][0].startswith("--image_guidance=")
    assert re.search(r"\| bootpig \| 1 partial picture \|", (outs[0] / "tournament.md").read_text())
