"""Runs that are stopped or killed, and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pig.data.modules import TripletDataModule
from pig.data.subject_training import SubjectDataModule
from pig.errors import InputError
from pig.methods.bootpig import BootPIG
from pig.methods.dreambooth.module import DreamBooth
from pig.sampling.delta import kept_steps
from pig.training import tuned as tuned_module
from pig.training.checkpoints import AsyncCheckpoints

STEPS = 24


def command(toy_data: Path, run: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "pig.cli", "fit", "--config", "configs/bootpig/toyworld.yaml", "--run", str(run)),
        *("--trainer.max_steps", str(STEPS), "--trainer.precision", "32-true", "--trainer.accelerator", "cpu"),
        *("--trainer.val_check_interval", "1000", "--trainer.callbacks", "[]"),
        *("--trainer.callbacks+", "pig.training.callbacks.EMA", "--trainer.callbacks.decay", "0.9"),
        *(
            "--trainer.callbacks+",
            "lightning.pytorch.callbacks.ModelCheckpoint",
            "--trainer.callbacks.save_last",
            "true",
        ),
        *("--trainer.callbacks.dirpath", str(run / "ckpt"), "--trainer.callbacks.every_n_train_steps", "3"),
        *("--trainer.callbacks.save_top_k", "0"),
        *("--data.shards", str(toy_data / "triplets"), "--data.val_shards", "null", "--data.batch_size", "6"),
        *("--data.num_workers", "2", "--data.shuffle_block", "10", "--trainer.log_every_n_steps", "1"),
        *more,
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        arguments,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells' background jobs ignore it
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


@pytest.fixture(scope="module")
def uninterrupted(toy_data, tmp_path_factory) -> dict:
    run = tmp_path_factory.mktemp("whole")
    finish(start(command(toy_data, run)))
    return torch.load(run / "ckpt/last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_ends_with_the_very_weights_of_one_that_was_not(toy_data, tmp_path, uninterrupted, stop) -> None:
    last = tmp_path / "ckpt/last.ckpt"
    process = start(command(toy_data, tmp_path))
    deadline = time.monotonic() + 200
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, stop)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped; what was finished is kept" in said
        assert "Traceback" not in said
    halfway = torch.load(last, weights_only=True)
    assert 0 < halfway["global_step"] < STEPS
    finish(start(command(toy_data, tmp_path, "--ckpt_path", str(last))))
    resumed = torch.load(last, weights_only=True)
    assert resumed["global_step"] == uninterrupted["global_step"] == STEPS
    for name, weight in uninterrupted["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight), name
    for name, average in uninterrupted["callbacks"]["EMA"]["average"].items():
        assert torch.equal(resumed["callbacks"]["EMA"]["average"][name], average), name


@pytest.mark.parametrize(
    "optimizer", ["adamw", *(pytest.param(one, marks=pytest.mark.slow) for one in ("adamw_8bit", "adamw_sharded"))]
)
def test_every_optimizer_goes_on_from_a_checkpoint(toy_data, tmp_path, optimizer) -> None:
    def fit(steps: int, checkpoint: Path | None = None, optimizer: str = optimizer) -> dict[str, torch.Tensor]:
        module = BootPIG("toyworld", optimizer=optimizer)
        data = TripletDataModule(str(toy_data / "triplets"), batch_size=2, resolution=64, num_workers=0)
        trainer = Trainer(
            accelerator="cpu",
            strategy="ddp" if optimizer == "adamw_sharded" else "auto",
            devices=1,
            max_steps=steps,
            plugins=[AsyncCheckpoints()],
            callbacks=[ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, data, ckpt_path=checkpoint)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return {name: weight.detach().clone() for name, weight in module.trainable().items()}

    expected = fit(4)
    found = fit(4, tmp_path / "step=2.ckpt")
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    if optimizer == "adamw_8bit":
        with pytest.raises(InputError, match="the state of model.optimizer=adamw_8bit, which adamw cannot go on with"):
            fit(4, tmp_path / "step=2.ckpt", "adamw")


def test_the_last_checkpoint_is_of_the_last_step_whatever_the_interval(toy_data, tmp_path) -> None:
    """Lightning's own would be of step 2. From it the run goes on as if it had never ended."""

    def fit(run: str, steps: int, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        module = BootPIG("toyworld")
        data = TripletDataModule(str(toy_data / "triplets"), batch_size=2, resolution=64, num_workers=0)
        keep = ModelCheckpoint(tmp_path / run, every_n_train_steps=2, save_last=True, save_top_k=0)
        trainer = Trainer(max_steps=steps, **{**QUIET, "enable_checkpointing": True, "callbacks": [keep]})
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        last = torch.load(tmp_path / run / "last.ckpt", weights_only=True)
        assert last["global_step"] == steps
        return last["state_dict"]

    expected = fit("whole", 5)
    fit("parts", 3)
    found = fit("parts", 5, tmp_path / "parts/last.ckpt")
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_checkpoints_hold_what_is_trained_and_where_the_data_stands(uninterrupted) -> None:
    module = BootPIG("toyworld")
    assert set(uninterrupted["state_dict"]) == set(module.trainable())
    assert set(uninterrupted["callbacks"]["EMA"]["average"]) == set(module.trainable())
    assert len(uninterrupted["optimizer_states"][0]["state"]) == len(module.trainable())
    (position,) = uninterrupted["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (position["epoch"], position["batch"]) == (1, STEPS - 96 // 6)
    before = {name: p.clone() for name, p in module.named_parameters()}
    module.load_state_dict(uninterrupted["state_dict"])
    for name, parameter in module.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (name in module.trainable()), name
    with pytest.raises(InputError, match="1 missing"):
        module.load_state_dict(dict(list(uninterrupted["state_dict"].items())[1:]))


@pytest.mark.slow
def test_a_delta_is_there_before_its_checkpoint(toy_data, tmp_path, monkeypatch) -> None:
    """Else a run that dies between the two goes on behind the step, and never writes it."""
    data = SubjectDataModule(str(toy_data / "subjects/mug_006"), resolution=64, seed=0)

    def fit() -> None:
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, save_top_k=0)
        quiet = {**QUIET, "enable_checkpointing": True, "callbacks": [keep], "default_root_dir": tmp_path}
        Trainer(max_steps=4, **quiet).fit(DreamBooth("toyworld", identifier="sks", save_at=[2]), data)

    def die(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(tuned_module, "save_delta", die)
        with pytest.raises(OSError, match="no space left"):
            fit()
    assert not list(tmp_path.glob("*.ckpt"))
    fit()
    assert list(kept_steps(tmp_path)) == [2, 4]
    assert (tmp_path / "last.ckpt").is_file()
