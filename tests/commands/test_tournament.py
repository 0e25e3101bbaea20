"""The tournament: what it plans, that it is fair, what it refuses, what it is estimated to take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tournaments import CONFIG, without_trials

from pig import cli
from pig.arguments import parse
from pig.commands.tournament import plan
from pig.commands.tournament.config import Tournament, load_config
from pig.commands.tournament.estimate import estimate
from pig.commands.tournament.run import claim, is_done, record_of
from pig.errors import InputError
from pig.models.names import TOYWORLD

CLAIMS = sorted(Path("configs/claims").glob("*.yaml"))


def words_of(chains: list[plan.Chain]) -> list[tuple[str, ...]]:
    return [step.words for chain in chains for step in chain]


@pytest.fixture
def config(tmp_path) -> Tournament:
    """The toy world's without trials, whose first trainings are done."""
    told = load_config(CONFIG, [f"out={tmp_path}", *without_trials()])
    for number, (name, method) in enumerate(told.methods.items()):
        if method.kind == "trained":
            run = tmp_path / name / plan.SAMPLES / "0" / "fit"  # its default_root_dir
            run.mkdir(parents=True)
            told_of = {"seconds": 100.0 * (number + 1), "samples": 9600, "flops_per_sample": 1, "peak_memory_bytes": 1}
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
                *("pig.cli", "fit", f"--seed_everything={seed}", f"--data.seed={seed}", "--trainer.max_steps=300"),
                "--trainer.limit_val_batches=0",
            )
        }


@pytest.mark.parametrize("file", [CONFIG, CONFIG.with_name("sd21.yaml")], ids=lambda file: file.stem)
def test_who_takes_part(file) -> None:
    told = load_config(file, [])
    kinds: dict[str, set[str]] = {}
    for name, method in told.methods.items():
        kinds.setdefault(method.kind, set()).add(name)
    assert kinds == {
        "trained": {"bootpig", "ezigen", "instantbooth", "ip_adapter"},
        "tuned": {"dreambooth", "dreambooth_lora", "textual_inversion"},
        "blended": {"dreamblend"},
        "base": {"base"},
    }
    assert (told.references, len(told.seeds), told.same_time) == ([1, 4], 2, True)
    # Those that have an image guidance, at one value.
    assert {name: method.common for name, method in told.methods.items() if method.common} == dict.fromkeys(
        ("bootpig", "ezigen"), "--image_guidance=3"
    )


def test_all_are_drawn_and_scored_alike(config, tmp_path) -> None:
    drawn = [words for words in words_of(plan.drawings(config)) if "generate" in words]
    assert {word for words in drawn for word in words if word.startswith("--subjects")} == {
        f"--subjects={tmp_path}/data/{folder}" for folder in ("subjects", "partial")
    }
    own = ("--model", "--out", "--subjects", "--references_per_subject", "--image_guidance")
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
    assert steps == {"ezigen": 150, "instantbooth": 100, "ip_adapter": 75}


def test_trials_are_as_many_for_each(config, tmp_path) -> None:
    some = "[--image_guidance=3, --image_guidance=5]"
    given = [f"out={tmp_path}", *without_trials(), "validation=v", f"methods.bootpig.trials={some}"]
    with pytest.raises(InputError, match=r"must have the same number, got \[1, 2\]"):
        load_config(CONFIG, [*given, "methods.ezigen.trials=[--loops=1]"])
    with pytest.raises(InputError, match="trials need validation"):
        load_config(CONFIG, [*given, "validation=''"])
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
        (
            ["methods.mean={kind: again, of: bootpig, trials: [--steps=1, --steps=2, --steps=3]}"],
            "methods.mean.trials: a method of kind again does not read it",
        ),
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
    told = load_config(CONFIG, [f"out={tmp_path}", "partial=''", *without_trials(), *AGAIN])
    assert words_of(plan.trainings(told, plan.SAMPLES)) == words_of(plan.trainings(config, plan.SAMPLES))
    drawn = [words for words in words_of(plan.drawings(told)) if "generate" in words and "--x" in words]
    assert [word for words in drawn for word in words if word.startswith("--model")] == [
        f"--model={tmp_path}/bootpig/samples/{seed}/model" for seed in (0, 1)
    ]
    assert all("--references_per_subject=4" in words for words in drawn)
    of_tuned = ["methods.early.kind=again", "methods.early.of=dreambooth", "methods.early.drawn=--step=5"]
    drawn = words_of(plan.drawings(load_config(CONFIG, [f"out={tmp_path}", *without_trials(), *of_tuned])))
    early = [words for words in drawn if "generate" in words and "--step=5" in words]
    assert [f"--model={tmp_path}/dreambooth/tuned/{seed}/models" in early[seed] for seed in (0, 1)] == [True, True]
    less = ["methods.bootpig.seeds=[7]", "methods.dreambooth.seeds=[8]"]
    seeds = {(one.method, one.seed) for one in plan.entries(load_config(CONFIG, [f"out={tmp_path}", *AGAIN, *less]))}
    assert {seed for name, seed in seeds if name in ("bootpig", "mean")} == {7}
    assert {seed for name, seed in seeds if name in ("dreambooth", "dreamblend")} == {8}
    assert {seed for name, seed in seeds if name == "ezigen"} == {0, 1}


def test_tuned_methods_have_as_many_seeds(config, tmp_path) -> None:
    told = load_config(
        CONFIG, [f"out={tmp_path}", *without_trials(), "validation=v", "methods.dreamblend.trials=[--early=1]"]
    )
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
        (
            {"lower": "bootpig, 1 partial picture", "more": "partial=''"},
            r"claims\[0\].lower 'bootpig, 1 partial picture' is none of",
        ),
        ({"score": "fid"}, r"claims\[0\].score 'fid' is none of dino"),
        ({"prompts": "long"}, r"claims\[0\].prompts 'long' is none of accessory"),
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
    with pytest.raises(InputError, match="was begun with other settings: samples was 4800, now it is 64"):
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
    told = load_config(file, [f"out={tmp_path}", *without_trials(file)])
    for chain in plan.drawings(told):
        for draw, score in zip(chain[::2], chain[1::2], strict=False):
            drawn = [word for word in draw.words if word.startswith("--images_per_prompt")]
            assert [word for word in score.words if word.startswith("--images_per_prompt")] == drawn


def test_an_estimate_counts_trainings_tunings_and_pictures(tmp_path, toy_data) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {0} {1} on a beach\na red {0} {1}\n")
    given = [f"subjects={toy_data / 'subjects'}", f"prompts={prompts}", "drawing=--steps=50 --images_per_prompt=3"]
    config = load_config(CONFIG, [f"out={tmp_path}", "same_time=false", "partial=''", *without_trials(), *given])
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
    class_pictures = 12 * 50 * 20 * 2
    tuned = 2 * 12 * 200 * 2 * passes("dreambooth: a sample") + class_pictures
    assert tuning == pytest.approx(tuned * unit / 1e18, abs=0.01)
    each = 2 * (one + four + passes("dreambooth: a picture") + passes("dreamblend: a picture")) + plain
    assert drawing == pytest.approx(each * 72 * unit / 1e18, abs=0.01)
