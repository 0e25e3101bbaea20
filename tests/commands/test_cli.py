"""The command line as a user meets it: every config instantiates, and bad input ends with its message and code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image

from pig import cli
from pig.commands.fit import CLI
from pig.commands.tournament import plan
from pig.commands.tournament.config import load_config
from pig.data.modules import TripletDataModule
from pig.data.subject_training import SubjectDataModule
from pig.methods import METHODS
from pig.models import backbone
from pig.models.names import WEIGHTS

CONFIGS = sorted(path for method in METHODS for path in Path("configs", method).glob("*.yaml"))
TOY = "configs/bootpig/toyworld.yaml"
# What stands over another config, and what must differ on a machine without GPUs and without a hub.
BELOW = {
    "release.yaml": "configs/ezigen/sd21.yaml",
    "sd21_release.yaml": "configs/bootpig/sd21.yaml",
    "sd21_fixed_timestep.yaml": "configs/bootpig/sd21.yaml",
    "sd21_768.yaml": "configs/bootpig/sd21.yaml",
    "sd21_24gb.yaml": "configs/bootpig/sd21.yaml",
    "own_photos.yaml": "configs/bootpig/sd21.yaml",
    "sd21_sharded.yaml": "configs/bootpig/sd21.yaml",
    "toyworld_regularised.yaml": "configs/dreambooth/toyworld.yaml",
    **{  # the rows of Table 3
        f"{name}.yaml": "configs/instantbooth/toyworld.yaml"
        for name in ("no_train_mask", "no_patch_feature", "no_adapter", "before_text", "tuned_clip", "tuned_unet")
    },
}
# What else of a method's configs cannot be had here: an image encoder of the hub.
ABSENT = {
    "instantbooth": {"image_encoder": "toyworld"},
    "ip_adapter": {"image_encoder": "toyworld"},
}
HERE = ["--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.devices=1", "--model.base=toyworld"]


def parse(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> CLI:
    monkeypatch.setattr(sys, "argv", ["pig.cli", *arguments])
    return CLI(run=False)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_config_instantiates(monkeypatch, tmp_path, toy_data, config) -> None:
    files = [BELOW[config.name], str(config)] if config.name in BELOW else [str(config)]
    arguments = [f"--config={file}" for file in files]
    absent = ABSENT.get(config.parent.name, {})
    arguments += [f"--model.{name}={value}" for name, value in absent.items()]
    tuned = config.parent.name in ("dreambooth", "textual_inversion")
    arguments += [f"--data.subject={toy_data / 'subjects/mug_006'}"] if tuned else []
    made = parse(monkeypatch, *arguments, *HERE, f"--run={tmp_path}")
    assert made.model.method == config.parent.name
    assert isinstance(made.datamodule, SubjectDataModule if tuned else TripletDataModule)
    assert isinstance(made.trainer, Trainer)
    assert made.trainer.gradient_clip_val == 1.0
    model = yaml.safe_load(config.read_text()).get("model", {"init_args": {}})["init_args"]
    for name, value in model.items():
        if isinstance(value, dict):  # the rest as its class has it
            assert value.items() <= made.model.hparams[name].items(), name
        elif name not in ("base", *absent):
            assert made.model.hparams[name] == value, name


def trained_for_claims() -> list[tuple[str, str]]:
    files = sorted(Path("configs/claims").glob("*.yaml"))
    return [
        (str(file), name)
        for file in files
        for name, method in load_config(file, []).methods.items()
        if method.kind == "trained"
    ]


@pytest.mark.parametrize(("file", "name"), trained_for_claims())
def test_claims_tell_fit_what_their_methods_are_called(monkeypatch, tmp_path, file, name) -> None:
    config = load_config(Path(file), [f"out={tmp_path}"])
    step = next(one for (one, _) in plan.trainings(config, plan.SAMPLES) if one.name.startswith(f"{name}/"))
    made = parse(monkeypatch, *(word for word in step.words[2:] if not word.startswith("--trainer.callbacks")), *HERE)
    assert made.trainer.max_steps == (700 if file.endswith("instantbooth.yaml") else 300)
    model, augmentation = made.model.hparams, made.datamodule.augmentation
    method, trained = made.model.method, {name for name, rate in made.model.learning_rates.items() if rate > 0}
    if method == "bootpig":
        only = {"rsa_only": {"rsa"}, "reference_unet_only": {"reference_unet"}}
        assert trained == only.get(re.sub("_(t_1|adaptive_t)$", "", name), {"reference_unet", "rsa"})
        assert {rate for rate in made.model.learning_rates.values() if rate > 0} == {5e-4}
        assert model["reference_timestep"] == (1 if name.endswith("_t_1") else None)
        expected = ((1, 1), 0) if name == "no_augmentation" else ((0.6, 1.0), 0.5)
        assert (tuple(augmentation.scale), augmentation.flip) == expected
    elif method == "ezigen":
        assert model["reference_timestep"] == (1 if name == "three_loops" else int(name.removeprefix("frozen_t_")))
    else:
        assert method == "instantbooth"
        row = (
            {}
            if name in ("full", "clip_features")
            else yaml.safe_load(Path(f"configs/{method}/{name}.yaml").read_text())
        )
        for key, value in row.get("model", {"init_args": {}})["init_args"].items():
            assert model[key] == value
        assert (augmentation.background == "black") == (name != "no_train_mask")


def test_the_papers_setting() -> None:
    paper = yaml.safe_load(Path("configs/bootpig/sd21.yaml").read_text())
    model, trainer, data = paper["model"]["init_args"], paper["trainer"], paper["data"]["init_args"]
    assert (model["lr_reference"], model["lr_rsa"]) == (5e-6, 1e-6)
    assert (model["reference_dropout"], model["caption_dropout"]) == (0.15, 0.15)
    assert (trainer["max_steps"], trainer["gradient_clip_val"], data["batch_size"]) == (10000, 1.0, 64)


def test_short_overrides_and_interpolation(monkeypatch, tmp_path) -> None:
    made = parse(monkeypatch, f"--config={TOY}", f"--run={tmp_path}", "--model.reference_dropout=0.3")
    assert made.model.dropout["reference"] == 0.3
    assert made.datamodule.shards == f"{tmp_path}/data/triplets"


def test_the_toy_worlds_precision_is_the_fast_one_of_the_machine(monkeypatch, tmp_path) -> None:
    for fast, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(backbone, "half_is_fast", lambda device, fast=fast: fast)
        assert parse(monkeypatch, f"--config={TOY}", f"--run={tmp_path}").trainer.precision == expected
    asked = parse(monkeypatch, f"--config={TOY}", f"--run={tmp_path}", "--trainer.precision=bf16-mixed")
    assert asked.trainer.precision == "bf16-mixed"


def refused(*arguments: str, **environment: str) -> str:
    """Run the real command; returns what it printed to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "pig.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        timeout=200,
        check=False,
    )
    assert done.returncode == 2, (done.stdout + done.stderr)[-3000:]
    assert "Traceback" not in done.stderr
    return done.stderr


def test_no_shard_matches(monkeypatch, capsys, tmp_path) -> None:
    code, error = run_inline(monkeypatch, capsys, "fit", "--config", TOY, "--run", str(tmp_path))
    assert (code, f"no shard matches ['{tmp_path}/data/triplets']" in error) == (2, True)


def test_all_that_is_missing_is_said_at_once(monkeypatch, capsys, tmp_path) -> None:
    code, error = run_inline(monkeypatch, capsys, "fit", "--config", TOY, "--run", str(tmp_path))
    assert code == 2
    assert "inputs of this experiment are not there" in error
    for part in ("data.shards: no shard", "data.val_shards null", "subjects of SubjectSamples", "own_photos.yaml"):
        assert part in error


def test_mistyped_key(monkeypatch, capsys) -> None:
    arguments = ("fit", "--config", TOY, "--model.reference_dropuot", "0.2")
    code, error = run_inline(monkeypatch, capsys, *arguments)
    assert (code, "reference_dropuot" in error) == (2, True)


def test_missing_checkpoint(monkeypatch, capsys, tmp_path) -> None:
    code, error = run_inline(monkeypatch, capsys, "fit", "--config", TOY, "--ckpt_path", str(tmp_path / "none.ckpt"))
    assert code == 2
    assert "no checkpoint file" in error


@pytest.mark.slow
def test_missing_base_model_offline(toy_data) -> None:
    given = ["--data.shards", str(toy_data / "triplets"), "--data.val_shards", "null", "--trainer.callbacks", "[]"]
    message = refused("fit", "--config", TOY, "--model.base", "nobody/nothing", *given, HF_HUB_OFFLINE="1")
    assert (
        "error: cannot load the base model: tried hub id (there is no such folder) 'nobody/nothing', offline" in message
    )


def run_inline(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """The same `main`, without the seconds that a new process takes."""
    monkeypatch.setattr(sys, "argv", ["pig.cli", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().err


def test_generate_refuses_bad_input(monkeypatch, capsys, tmp_path) -> None:
    picture, out = str(tmp_path / "a.png"), tmp_path / "out"
    Image.new("RGB", (20, 20)).save(picture)
    (tmp_path / "bad.png").write_bytes(b"no")
    masked = str(tmp_path / "masked.png")
    Image.new("RGB", (20, 20)).save(masked)
    Image.new("L", (10, 10)).save(tmp_path / "masked.mask.png")
    for arguments, message in (
        (["--references"], "expected at least one argument"),
        (["--references", str(tmp_path / "none.png")], "cannot read image"),
        (["--references", str(tmp_path / "bad.png")], "cannot read image"),
        (["--references", picture, "--model", str(tmp_path)], "is no model: give"),
        (["--references", picture, "--model", str(WEIGHTS / "base")], "Stable Diffusion without a method"),
        (["--references", picture, "--seed", str(10**30)], "--seed must lie between"),
        (["--references", masked], "masked.png: the mask is (10, 10), its image (20, 20)"),
        (["--references", picture, "--height", "0"], "--height must be between 8 and 16384"),
        (["--references", picture, "--height", "60"], "size 64x60"),
        (["--references", picture, "--image_guidance", "-1"], "image_guidance must be between 0 and 1000"),
        (["--references", picture, "--prompt", " "], "an empty prompt"),
    ):
        prompt = [] if "--prompt" in arguments else ["--prompt", "a photo of a mug"]
        code, error = run_inline(monkeypatch, capsys, "generate", *prompt, "--out", str(out), *arguments)
        assert code == 2
        assert message in error, error
        assert not out.exists()


@pytest.mark.slow
def test_fit_export_generate_evaluate(monkeypatch, capsys, toy_data, tmp_path) -> None:
    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["pig.cli", *map(str, arguments)])
        cli.main()

    over = tmp_path / "over.yaml"
    over.write_text(
        f"""
run: {tmp_path}
trainer:
  max_steps: 2
  val_check_interval: 2
  log_every_n_steps: 1
  callbacks:
    - class_path: pig.training.callbacks.EMA
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: "{tmp_path}", filename: two, every_n_train_steps: 2}}
    - class_path: pig.training.callbacks.SubjectSamples
      init_args: {{subjects: "{toy_data}/subjects", clip: toyworld, dino: toyworld, max_subjects: 2, steps: 2}}
data:
  init_args: {{shards: "{toy_data}/triplets", val_shards: "{toy_data}/val", batch_size: 4}}
"""
    )
    call("fit", "--config", TOY, "--config", over)
    checkpoint = tmp_path / "two.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    columns = set((tmp_path / "fit/version_0/metrics.csv").read_text().splitlines()[0].split(","))
    assert {"train/loss", "grad_norm/reference_unet", "grad_norm/rsa", "samples_per_second"} <= columns
    assert {"val/loss", "val/dino", "val/clip_t", "val/clip_i"} <= columns
    assert any(column.startswith("train/loss_t") for column in columns)
    assert list((tmp_path / "fit/version_0/samples").glob("*.png"))
    assert (tmp_path / "fit/version_0/config.yaml").exists()
    call("fit", "--config", TOY, "--config", over, "--ckpt_path", checkpoint, "--model.reference_dropout", "0.3")
    (again,) = (tmp_path / "fit").glob("version_1/config.yaml")
    assert yaml.safe_load(again.read_text())["model"]["init_args"]["reference_dropout"] == 0.3
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(checkpoint.read_bytes()[:5000])
    code, error = run_inline(
        monkeypatch, capsys, "fit", "--config", TOY, "--config", str(over), "--ckpt_path", str(torn)
    )
    assert (code, "a torn one" in error) == (2, True)
    call("validate", "--config", TOY, "--config", over, "--ckpt_path", checkpoint)
    call("test", "--config", TOY, "--config", over, "--ckpt_path", checkpoint)

    arguments = ["--run", tmp_path, "--ckpt_path", checkpoint, "--data.predict_subjects", toy_data / "subjects"]
    arguments += [
        "--trainer.limit_predict_batches",
        "2",
        "--trainer.callbacks",
        "pig.training.callbacks.SaveImages",
    ]
    call("predict", "--config", TOY, *arguments, "--trainer.callbacks.folder", tmp_path / "predicted")
    assert [path.name for path in sorted((tmp_path / "predicted/boat_000").glob("*"))] == ["0", "1"]

    export, images, subjects = tmp_path / "export", tmp_path / "images", toy_data / "subjects"
    references = sorted((subjects / "mug_006").glob("0?.png"))[:2]
    call("export", "--checkpoint", checkpoint, "--out", export)
    common = ["--references", *references, "--prompt", "a photo of a mug, in space", "--steps", 2, "--out", images]
    call("generate", *common, "--images_per_prompt", 2, "--model", export)
    drawn = sorted(images.rglob("*.png"))
    assert [path.name for path in drawn] == ["0.png", "1.png"]
    assert Image.open(drawn[0]).size == (64, 64)

    drawn[0].parent.parent.rename(images / "mug_006")
    scored = ("--images", images, "--subjects", subjects, "--out", tmp_path / "scores")
    code, error = run_inline(monkeypatch, capsys, "evaluate", *map(str, scored))
    assert (code, "images are missing" in error) == (2, True)
    call("evaluate", *scored, "--allow_missing")
    assert "DINO" in capsys.readouterr().out
    assert (tmp_path / "scores/results.json").exists()
    arguments = ("export", "--checkpoint", str(references[0]), "--out", str(tmp_path / "x"))
    code, error = run_inline(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "no checkpoint" in error


def test_generate_with_the_embedded_model(monkeypatch, tmp_path) -> None:
    """What the README shows: no model named, references as they come from a camera."""
    picture = tmp_path / "photo.jpg"
    Image.new("RGB", (90, 40), (200, 30, 30)).save(picture)
    out = tmp_path / "out"
    arguments = ["generate", "--references", str(picture), "--prompt", "a photo of a mug, on a beach", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["pig.cli", *arguments, "--images_per_prompt", "1", "--out", str(out)])
    cli.main()
    assert len((out / "manifest.jsonl").read_text().splitlines()) == 1
