"""What a tournament makes of results; and the whole of it: a method of one's own joins, and it goes on where it was
killed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tournaments import CONFIG, without_trials

from pig import cli
from pig.commands.tournament import plan
from pig.commands.tournament.config import Claim, Method, load_config
from pig.commands.tournament.run import choose
from pig.commands.tournament.standings import Standing, gaps, judge, ledger, ranks
from pig.evaluation.results import Result
from pig.methods import METHODS

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


CLAIM = Claim(source="a", says="b", higher="bootpig", lower="ezigen")
LOW = [0.3 + 0.01 * at for at in range(12)]


def test_means_are_over_images_then_training_seeds() -> None:
    one = standing("a", LOW, [value + 0.2 for value in LOW])
    assert one.per_subject("dino")["s0"] == pytest.approx(0.3 + 0.1 + 0.1)
    assert one.per_subject("dino", "property") == {}
    assert one.spread("dino") == pytest.approx(0.2)
    assert one.copied() == 0.5


def test_differences_are_paired_and_corrected() -> None:
    base, same, more = standing("base", LOW), standing("same", LOW), standing("more", [x + 0.1 for x in LOW])
    found = {gap.other: gap for gap in gaps([base], [same, more], "dino")}
    assert found["same"].mean == 0
    assert found["same"].p_holm == 1
    assert found["more"].mean == pytest.approx(found["more"].low) == pytest.approx(0.1)
    assert found["more"].p_holm < 0.01
    alone = gaps([base], [more], "dino")[0]
    assert found["more"].p_holm == pytest.approx(2 * alone.p_holm)  # of two


def test_claims_hold_or_do_not_or_cannot_be_told(tmp_path) -> None:
    low, more = standing("ezigen", LOW), standing("bootpig", [x + 0.1 for x in LOW])
    near = standing("ip_adapter", [x + (0.02 if at % 2 else -0.02) for at, x in enumerate(LOW)])
    config = load_config(CONFIG, [f"out={tmp_path}"])
    config.claims = [
        CLAIM,
        replace(CLAIM, higher="ezigen", lower="bootpig"),
        replace(CLAIM, higher="ip_adapter"),
    ]
    found = judge(config, [low, more, near])
    assert [one.verdict for one in found] == ["holds", "does not hold", "cannot be told"]
    assert [one.gap.mean for one in found] == pytest.approx([0.1, -0.1, 0])
    alone = judge(replace(config, claims=config.claims[:1]), [low, more])[0]
    assert found[0].gap.p_holm == pytest.approx(3 * alone.gap.p_holm)  # of three
    config.claims = [replace(CLAIM, prompts="property")]
    assert [one.verdict for one in judge(config, [low, more])] == ["not scored"]
    config.claims = [replace(CLAIM, higher="bootpig", lower="bootpig, twice")]
    (same,) = judge(config, [more, replace(more, condition="twice")])
    assert same.verdict == "the same images"


def test_a_claim_may_name_what_was_given(tmp_path) -> None:
    first, second = (
        replace(standing("bootpig", [x + step for x in LOW]), condition=name)
        for name, step in (("1 whole picture", 0.0), ("4 whole pictures", 0.2))
    )
    config = load_config(CONFIG, [f"out={tmp_path}"])
    config.claims = [replace(CLAIM, higher="bootpig, 4 whole pictures", lower="bootpig")]
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
    twice = ranks([low, standing("again", LOW), best], "dino")
    assert twice == {"best": (1, 1, 1), "low": (2, 2, 2), "again": (2, 2, 2)}


def test_two_are_compared_over_the_training_seeds_that_both_have(tmp_path) -> None:
    config = load_config(CONFIG, [f"out={tmp_path}"])
    config.claims = [CLAIM]
    high = [value + 0.4 for value in LOW]
    two = replace(standing("ezigen", LOW, high), seeds=(0, 1))
    one, base = replace(standing("bootpig", LOW), seeds=(0,)), standing("base", LOW)
    (same,) = judge(config, [two, one])
    assert same.verdict == "the same images"  # not with the second seed of the one
    (gap,) = gaps([two], [base], "dino")
    assert gap.mean == pytest.approx(-0.2)  # to both seeds: the base model has none
    (gap,) = gaps([replace(two, seeds=(0, 1))], [replace(one, seeds=(7,))], "dino")
    assert gap.mean == pytest.approx(-0.2)  # no seed is shared


def test_a_tuning_costs_as_far_as_it_is_drawn(tmp_path) -> None:
    config = load_config(CONFIG, [f"out={tmp_path}", "seeds=[0]"])
    drawn = {"dreambooth": ["--step=50"], "dreamblend": ["--early=50", "--late=100"]}
    config.methods = {name: config.methods[name] for name in drawn}
    models = tmp_path / "dreambooth/tuned/0/models"
    for subject in ("boat_000", "mug_001"):
        (models / subject / "step-000200").mkdir(parents=True)
        told = {"samples": 400, "seconds": 60.0, "flops_per_sample": 10, "peak_memory_bytes": 1, "machine": "a"}
        (models / subject / plan.COST).write_text(json.dumps(told))
    for name, words in drawn.items():
        (tmp_path / name).mkdir(exist_ok=True)
        weights = {"dreambooth": 7, "dreamblend": 0}[name]
        picture = {
            "trained_weights": weights,
            "flops_per_picture": 1,
            "peak_memory_bytes": 1,
            "seconds_per_picture": 1.0,
        }
        (tmp_path / name / "picture.json").write_text(json.dumps(picture))
        (tmp_path / name / plan.CHOSEN).write_text(json.dumps({"words": words}))
    for noun, flops in (("boat", 100), ("mug", 300)):
        (tmp_path / "class_pictures" / noun).mkdir(parents=True)
        (tmp_path / "class_pictures" / noun / "class.json").write_text(json.dumps({"flops": flops, "seconds": 1.5}))
    (tmp_path / "class_pictures/cat").mkdir()
    (tmp_path / "class_pictures/cat/class.json").write_text(json.dumps({"prompt": "killed before its cost was noted"}))
    rows = ledger(config)
    assert [(row["class_flops"], row["class_seconds"], row["machines"]) for row in rows] == [(200, 1.5, ["a"])] * 2
    assert [(row["tuning_samples"], row["tuning_seconds"]) for row in rows] == [(100, 15), (200, 30)]
    assert [row["trained_weights"] for row in rows] == [7, 7]  # DreamBlend has none of its own, and draws with these


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([(0.4, 0.4), (0.5, 0.5), (0.6, 0.3)], 1),
        ([(0.4, 0.4), (0.2, 0.8), (0.1, 0.1)], 1),  # equal to the first one, with the higher CLIP-T
        ([(-0.4, -0.4), (-0.1, 0.9), (0.1, 0.2)], 2),  # a negative score counts as 0
        ([(-0.4, 0.4), (-0.1, 0.5), (-0.2, 0.3)], 1),  # all count as 0
    ],
)
def test_the_best_trial_is_what_is_drawn_with(tmp_path, found, best) -> None:
    told = load_config(CONFIG, [f"out={tmp_path}", *without_trials(), "validation=v", "same_time=false"])
    told.methods["bootpig"].trials = ["--image_guidance=2", "--image_guidance=4", "--image_guidance=6"]
    told.methods["mean"] = Method(kind="again", of="bootpig", drawn="--pooling=mean")
    for number, (dino, clip_t) in enumerate(found):
        scores = {
            name: dict.fromkeys(("mean", "low", "high"), mean) for name, mean in (("dino", dino), ("clip_t", clip_t))
        }
        folder = plan.trial_folder(told, "bootpig", number) / "scores"
        folder.mkdir(parents=True)
        Result("dreambooth", "0", "trial", scores, {}, {}, {}, [], {}, [], [], "", {}).write(folder)
    choose(told)
    drawn = [step.words for chain in plan.drawings(told) for step in chain if "generate" in step.words]
    of = {
        name: [words for words in drawn if f"{tmp_path}/{name}/samples" in " ".join(words)]
        for name in ("bootpig", "mean")
    }
    assert len(of["bootpig"]) > len(of["mean"]) > 1
    assert all(told.methods["bootpig"].trials[best] in words for words in (*of["bootpig"], *of["mean"]))
    assert [words for words in drawn if "--pooling=mean" in words] == of["mean"]


# -- a method of somebody else's ---------------------------------------------------------------------------------------


def test_a_method_joins_by_one_line(tmp_path, toy_data, monkeypatch) -> None:
    """The one of CONTRIBUTING's recipe, all of whose commands are given here, in this process."""
    monkeypatch.syspath_prepend("tests/methods")
    monkeypatch.setitem(METHODS, "toy_method", "toy_method")
    told = yaml.safe_load(Path("configs/bootpig/toyworld.yaml").read_text())
    told["trainer"] |= {"accelerator": "cpu"}
    told["model"] = {"class_path": "toy_method.Module", "init_args": {"base": "toyworld"}}
    file, prompts, out = tmp_path / "mine.yaml", tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text(yaml.safe_dump(told, sort_keys=False))
    prompts.write_text("a photo of a {0} {1}, on a beach\n")
    given = [f"out={out}", "seeds=[0]", "samples=8", f"subjects={toy_data / 'subjects'}", f"prompts={prompts}"]
    line = f"methods.mine={{config: {file}, words: --data.batch_size=4}}"
    config = load_config(CONFIG, [*given, *without_trials(), line, "drawing=--steps=1 --batch_size=12"])
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
  - data_gen subjects --out {{out}}/data/validation --count 1 --first 1000
subjects: "{{out}}/data/subjects"
validation: "{{out}}/data/validation"
partial: "{{out}}/data/subjects"
prompts: {prompts}
base: base:toyworld
scorer: configs/evaluation/toyworld.yaml
samples: 96
seeds: [0, 1]
references: [1]
fit: --trainer.limit_val_batches=0
drawing: --steps=2 --images_per_prompt=2
methods:
  bootpig: {{config: {config}, words: --data.batch_size=8, trials: [--image_guidance=2, --image_guidance=3],
    common: --image_guidance=3}}
  mean: {{kind: again, of: bootpig, drawn: --pooling=mean}}
  ezigen: {{config: configs/ezigen/toyworld.yaml}}
  dreambooth: {{kind: tuned, config: configs/dreambooth/toyworld.yaml, words: "{short} --data.prior.folder={{out}}/cp"}}
  dreamblend: {{kind: blended, of: dreambooth}}
  base: {{kind: base}}
claims: [{{source: a, says: b, higher: bootpig, lower: "bootpig, 1 partial picture", score: clip_i, prompts: property}}]
"""


def scores(out: Path) -> dict[str, object]:
    """All numbers but those that were measured by a clock."""
    told = json.loads((out / "tournament.json").read_text())
    return {key: told[key] for key in ("gaps", "ranks", "standings", "claims")}


def command_of(file: Path, *how: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "pig.cli", "tournament", str(file), "same_time=false", *how]


def config_in(folder: Path) -> Path:
    """The toy world's, with a checkpoint at every second step."""
    told = yaml.safe_load(Path("configs/bootpig/toyworld.yaml").read_text())
    (last,) = (one["init_args"] for one in told["trainer"]["callbacks"] if one.get("init_args", {}).get("save_last"))
    last["every_n_train_steps"] = 2
    file = folder / "bootpig.yaml"
    file.write_text(yaml.safe_dump(told, sort_keys=False))
    return file


@pytest.mark.slow
def test_killed_and_continued_it_ends_with_the_same_numbers(tmp_path) -> None:
    """In the middle of a training, and twice at random; at last on Ray. Equal times differ from run to run, so they are
    left out here."""
    prompts, config = tmp_path / "prompts.txt", config_in(tmp_path)
    prompts.write_text("a photo of a {0} {1}, on a beach\na red {0} {1}\n")
    outs = [tmp_path / name for name in ("whole", "killed")]
    last, moments = outs[1] / "bootpig/samples/0/fit/checkpoints/last.ckpt", random.Random(0)
    for out in outs:
        file = tmp_path / f"{out.name}.yaml"
        file.write_text(TINY.format(out=out, prompts=prompts, config=config, short=SHORT))
        for number in range(3 if out.name == "killed" else 0):
            process = subprocess.Popen(
                command_of(file, "--workers=2"), start_new_session=True, stdout=subprocess.DEVNULL
            )
            until = time.monotonic() + (600 if number == 0 else moments.uniform(10, 60))
            while time.monotonic() < until and not (number == 0 and last.is_file()):
                assert process.poll() is None
                time.sleep(0.1)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(3)  # for what it has started to end
        how = ["--workers=2", *(["--executor=ray"] if out.name == "killed" else [])]
        done = subprocess.run(command_of(file, *how), capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"--ckpt_path={last}" in (outs[1] / "logs/bootpig/samples/0/fit.log").read_text()
    assert scores(outs[0]) == scores(outs[1])
    page = (outs[0] / "report.html").read_text()
    assert (outs[0] / "plane.svg").read_text() in page
    for heading in ("Claims", "Standings", "Differences to bootpig", "By kind of prompt", "Other conditions", "Costs"):
        assert heading in page
    told = json.loads((outs[0] / "tournament.json").read_text())
    costs = {row["method"]: row for row in told["costs"]}
    assert costs["bootpig"]["training_samples"] == 96
    assert costs["dreamblend"]["tuning_flops"] == costs["dreambooth"]["tuning_flops"] > 0
    assert costs["base"]["trained_weights"] == 0
    assert costs["mean"]["training_samples"] == 96
    assert told["claims"][0]["gap"]["mean"] == 0  # here the partial pictures are the whole ones
    assert costs["bootpig"]["flops_per_picture"] > costs["base"]["flops_per_picture"] > 0
    assert json.loads((outs[0] / "bootpig/chosen.json").read_text())["words"][0].startswith("--image_guidance=")
    assert re.search(r"\| bootpig \| 1 partial picture \|", (outs[0] / "tournament.md").read_text())
    theirs = tmp_path / "theirs"
    (made,) = (outs[0] / "base").rglob("images")
    shutil.copytree(made, theirs)
    records = {file: file.stat().st_mtime_ns for file in (outs[0] / "records").rglob("*.json")}
    joins = "methods.ip_adapter={config: configs/ip_adapter/toyworld.yaml, words: --data.batch_size=8}"
    words = command_of(tmp_path / "whole.yaml", joins, f"--also={theirs}")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    joined = {one["method"]: one for one in json.loads((outs[0] / "tournament.json").read_text())["standings"]}
    assert joined["theirs"]["dino"] == joined["base"]["dino"]
    assert {method: joined[method] for method in joined.keys() - {"theirs", "ip_adapter"}} == {
        one["method"]: one for one in told["standings"]
    }
    assert joined["ip_adapter"]["dino"] != joined["bootpig"]["dino"]
    assert {file: file.stat().st_mtime_ns for file in records} == records  # nothing was done again
