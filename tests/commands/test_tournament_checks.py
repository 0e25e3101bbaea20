"""What a tournament refuses before its first command, and the shipped ones that it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tournaments import CLAIMS, CONFIG

from data_gen.toyworld import draw_subjects
from pig import cli
from pig.commands.tournament import run
from pig.commands.tournament.checks import check_inputs, check_plan, check_subjects
from pig.commands.tournament.config import load_config
from pig.commands.tournament.run import claim_folder
from pig.errors import InputError


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
    check_plan(told)
    check_inputs(told)
    assert told.claims


@pytest.mark.parametrize("file", sorted(CONFIG.parent.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_tournaments_commands_can_work(tmp_path, file) -> None:
    told = load_config(file, [f"out={tmp_path}"])
    check_plan(told)
    if file.stem == "sd21":
        with pytest.raises(InputError, match="data/dreambooth/dataset"):
            check_inputs(told)
    else:
        check_inputs(told)


FIVE = ", ".join(f"--text_guidance={number}" for number in range(5))  # each method of CONFIG has six trials


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["drawing=--stepps=10"],
            "methods.bootpig, drawn with --stepps=10 .*: --stepps is no option here; did you mean --steps",
        ),
        (["drawing=--images_per_prompt=0"], "images_per_prompt must be at least 1"),
        (
            [f"methods.ezigen.trials=[--image_guidance=x, {FIVE}]"],
            "ezigen, .*: image_guidance: 'x'",
        ),
        (["methods.ezigen.common=--image_guidance=-1"], "methods.ezigen, drawn with .*image_guidance"),
        (["methods.dreambooth.drawn=--early=50"], "--early is for --model dreamblend:FOLDER"),
        (["methods.base.drawn=--step=50"], "--step is for a folder made by `tune`"),
        (
            [f"methods.dreambooth.trials=[--step=75, {FIVE}]"],
            "--step=75 is not kept; there will be 25, 50, 100, 200",
        ),
        (
            ["methods.dreambooth.words='--model.save_at=[10] --trainer.max_steps 60'"],
            "methods.dreambooth, drawn with .*: --step=100 is not kept; there will be 10, 60",
        ),
        (
            [f"methods.dreamblend.trials=[--late=60, {FIVE}]"],
            "dreamblend, .* --late=60 is not kept",
        ),
    ],
)
def test_words_that_generate_will_not_take(tmp_path, given, message) -> None:
    with pytest.raises(InputError, match=message):
        cli.run(["tournament", str(CONFIG), "--dry_run", f"out={tmp_path / 'out'}", *given])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("methods.ezigen.words=--trainer.max_stepz=1", "training, equal samples, .*max_stepz"),
        ("methods.textual_inversion.words=--model.lrr=1e-2", "tuning, python -m pig.cli tune .*lrr"),
        ("scoring=--segmeter=sam", "python -m pig.cli evaluate .*did you mean --segmenter"),
    ],
)
def test_words_that_other_commands_will_not_take(tmp_path, given, message) -> None:
    with pytest.raises(InputError, match=message):
        cli.run(["tournament", str(CONFIG), "--dry_run", f"out={tmp_path / 'out'}", given])


def test_subjects_that_cannot_serve(tmp_path, toy_data) -> None:
    def check(*given: str) -> None:
        subjects = f"subjects={toy_data / 'subjects'}"
        check_subjects(load_config(CONFIG, [f"out={tmp_path}", subjects, "partial=''", *given]))

    draw_subjects(tmp_path / "others", 2, 64, first=1000)
    others = f"validation={tmp_path / 'others'}"
    check(others)
    with pytest.raises(InputError, match="settings must be chosen on other subjects"):
        check(f"validation={toy_data / 'subjects'}")
    with pytest.raises(InputError, match=f"partial={tmp_path / 'others'} must hold the subjects of"):
        check(others, f"partial={tmp_path / 'others'}")
    with pytest.raises(InputError, match="references=9: .* has only"):
        check(others, "references=[1, 9]")


@pytest.mark.parametrize("key", ["prompts", "subjects", "validation", "partial"])
def test_inputs_that_nobody_makes(tmp_path, key) -> None:
    with pytest.raises(InputError, match="nowhere"):
        check_inputs(load_config(CONFIG, [f"out={tmp_path}", f"{key}=nowhere"]))


def test_bad_input(tmp_path) -> None:
    with pytest.raises(InputError, match="no such config"):
        cli.run(["tournament", str(tmp_path / "none.yaml")])
    with pytest.raises(InputError, match="--also: .* holds no images"):
        cli.run(["tournament", str(CONFIG), f"out={tmp_path}", "--also", str(tmp_path / "none")])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a folder"):
        cli.run(["tournament", str(CONFIG), f"out={tmp_path / 'file'}", "--dry_run"])


def test_a_folder_holds_one_tournament(tmp_path, monkeypatch) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(Path("configs/bootpig/toyworld.yaml").read_text())

    def begin(*given: str) -> None:
        claim_folder(load_config(CONFIG, [f"out={tmp_path / 'out'}", f"methods.bootpig.config={mine}", *given]))

    (tmp_path / "out").mkdir()
    begin()
    begin()
    with pytest.raises(InputError, match="was begun with samples=3200, now it is 64: give another out=FOLDER"):
        begin("samples=64")
    with pytest.raises(InputError, match=r"was begun with seeds=\[0, 1\], now it is \[0\]"):
        begin("seeds=[0]")
    begin(claims())  # which change nothing that is made
    with monkeypatch.context() as machine:
        machine.setattr(run, "fast_precision", lambda: "64-true")
        with pytest.raises(InputError, match="now it is '64-true'"):
            begin()
    mine.write_text(mine.read_text().replace("lr_rsa", "lr_all"))
    with pytest.raises(InputError, match="was begun with contents.*mine.yaml='"):
        begin()
