"""The training step, what is trained, checkpoints, and runs that are interrupted. Real toy models throughout."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import fast_half, losses, tiny_unet
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks import gpu, training
from benchmarks.naive import Naive
from benchmarks.training import Ours
from pig.data.modules import TripletDataModule
from pig.data.schema import Batch
from pig.errors import InputError
from pig.methods.bootpig import BootPIG, TwoUNet
from pig.models.backbone import check_prediction_type, load_backbone
from pig.models.names import WEIGHTS
from pig.training.callbacks import EMA, SubjectSamples

ATTENTION = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")


def make_batch(toy_data: Path, size: int = 4) -> Batch:
    data = TripletDataModule(str(toy_data / "triplets"), batch_size=size, resolution=64, num_workers=0)
    return next(iter(data.train_dataloader()))


@pytest.fixture(scope="module")
def module() -> BootPIG:
    return BootPIG("toyworld", reference_dropout=0.0, caption_dropout=0.0)


def test_exact_set_of_trainable_names() -> None:
    net = TwoUNet(tiny_unet(), tiny_unet())
    names = {group: set(parameters) for group, parameters in net.trainable_parameters().items()}
    assert names["rsa"] == {f"base_unet.{layer}.{weight}" for layer in net.layers for weight in ATTENTION}
    assert net.layers[-1] == "up_blocks.2.attentions.1.transformer_blocks.0.attn1"
    last = "reference_unet.up_blocks.2.attentions.1."
    left_out = {f"reference_unet.{name}" for name, _ in net.reference_unet.named_parameters()} - names["reference_unet"]
    block = last + "transformer_blocks.0."
    assert left_out == {
        *(
            f"{block}attn1.{w}"
            for w in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
        ),
        *(
            f"{block}attn2.{w}"
            for w in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
        ),
        *(f"{block}{norm}.{w}" for norm in ("norm2", "norm3") for w in ("weight", "bias")),
        *(f"{block}ff.net.{layer}.{w}" for layer in ("0.proj", "2") for w in ("weight", "bias")),
        *(f"{last}proj_out.{w}" for w in ("weight", "bias")),
        *(f"reference_unet.{layer}.{w}" for layer in ("conv_norm_out", "conv_out") for w in ("weight", "bias")),
    }


def test_trainable_parameters_get_gradients_and_no_others(module, toy_data) -> None:
    assert all(name.startswith("net.") for name in module.trainable())
    loss, _ = losses(module, make_batch(toy_data), 0.0, 0.0)
    loss.mean().backward()
    for name, parameter in module.named_parameters():
        if name in module.trainable():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    module.zero_grad()


def test_learning_rates_by_group_and_frozen_groups() -> None:
    groups = BootPIG("toyworld").configure_optimizers().param_groups
    assert [(g["name"], g["lr"]) for g in groups] == [("reference_unet", 5e-6), ("rsa", 1e-6)]
    assert all(g["betas"] == (0.9, 0.999) and g["weight_decay"] == 1e-2 and g["eps"] == 1e-8 for g in groups)
    only = BootPIG("toyworld", lr_reference=0.0)
    assert {name.split(".")[1] for name in only.trainable()} == {"base_unet"}
    with pytest.raises(InputError, match="learning rates"):
        BootPIG("toyworld", lr_reference=0.0, lr_rsa=0.0)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(toy_data) -> None:
    batch, results = make_batch(toy_data), []
    for checkpointing in (False, True):
        module = BootPIG("toyworld", gradient_checkpointing=checkpointing)
        loss, _ = losses(module, batch, 0.5, 0.5)
        loss.mean().backward()
        results.append((loss.detach(), {name: p.grad for name, p in module.trainable().items()}))
    (loss, gradients), (loss_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, atol=1e-7, rtol=1e-5, msg=name)


def test_loss_of_a_sample_does_not_depend_on_its_batch(module, toy_data) -> None:
    batch = make_batch(toy_data)
    with torch.no_grad():
        whole, t = losses(module, batch, 0.3, 0.3)
        for i in range(4):
            alone, t_alone = losses(module, batch.split(1)[i], 0.3, 0.3)
            assert t_alone == t[i]
            torch.testing.assert_close(alone[0], whole[i], atol=1e-5, rtol=1e-4)


def test_dropouts_do_what_they_say(module, toy_data) -> None:
    batch = make_batch(toy_data, 8)
    with torch.no_grad():
        kept, _ = losses(module, batch, 0.0, 0.0)
        dropped, _ = losses(module, batch, 1.0, 0.0)
        other = copy.copy(batch)
        other.reference = batch.reference.flip(0)
        assert not torch.allclose(losses(module, other, 0.0, 0.0)[0], kept)
        torch.testing.assert_close(losses(module, other, 1.0, 0.0)[0], dropped)
        # The caption is emptied for the Base UNet only: U_phi still reads it.
        other = copy.copy(batch)
        other.captions = batch.captions[::-1]
        assert not torch.allclose(losses(module, other, 0.0, 1.0)[0], losses(module, batch, 0.0, 1.0)[0])
        torch.testing.assert_close(losses(module, other, 1.0, 1.0)[0], losses(module, batch, 1.0, 1.0)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_a_step_equals_that_of_algorithm_1_written_plainly(toy_data, dropout) -> None:
    """Loss, and all weights after one optimizer step, against diffusers' own scheduler and UNets with hooks."""
    batch, naive, ours = make_batch(toy_data), Naive("toyworld"), Ours("toyworld")
    expected = naive.step(naive.optimizer(), batch, False, dropout)
    assert float(ours.step(ours.optimizer(), batch, False, dropout)) == pytest.approx(expected, abs=1e-6)
    weights = {name: weight for group in naive.groups.values() for name, weight in group.items()}
    before, moved = dict(BootPIG("toyworld").named_parameters()), 0
    assert {f"net.{name}" for name in weights} == set(ours.module.trainable())
    for name, weight in weights.items():
        own = ours.module.get_parameter(f"net.{name}")
        # Adam's first step is the gradient's sign: where that is noise, the signs may differ.
        same = (own - weight).abs() <= 2e-6 + 1e-4 * weight.abs()
        assert same.float().mean() > 0.99, name
        moved += not torch.equal(own, before[f"net.{name}"])
    assert moved == len(weights)


class Here(training.Run):
    """In this process, where a worker's would take its time to start."""

    def __call__(self, method: str, *arguments: object) -> object:
        return getattr(self, method)(*arguments)

    def stop(self) -> None:
        pass


@pytest.mark.slow
def test_training_is_measured(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(training, "Worker", Here)
    monkeypatch.setattr("sys.argv", ["training", "--batch=2", "--steps=2", f"--out={tmp_path / 'bench/training.json'}"])
    training.main()
    found = json.loads((tmp_path / "bench/training.json").read_text())
    assert [row["way"] for row in found["rows"]] == ["naive", "ours", "ours+precomputed"]
    for row in found["rows"]:
        assert row["batch"] == 2
        assert 0 < row["share_of_peak"] < 1.5
        assert min(row["samples_per_second"], row["flops_per_sample"], row["peak_memory_bytes"]) > 0
    naive, ours, precomputed = (row["flops_per_sample"] for row in found["rows"])
    assert naive > ours > precomputed
    assert found["rows"][0]["seconds_per_sample"]["VAE"] > 0
    assert "VAE" not in found["rows"][2]["seconds_per_sample"]


@pytest.fixture(scope="module")
def gpu_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gpu")


LONG = ("ladder", "batches")


@fast_half
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.slow] if part in LONG else []) for part in gpu.PARTS]
)
def test_every_part_for_a_gpu_starts_at_tiny_width(part, gpu_folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", part, "--size=tiny", f"--out={gpu_folder}"])
    gpu.main()
    rows = json.loads((gpu_folder / f"{part}.json").read_text())["rows"]
    assert len(rows) == {"ladder": 7, "batches": 6, "steady": 1, "capped": 1, "precision": 3}[part]
    if part in ("ladder", "batches"):
        assert min(row["samples_per_second"] for row in rows) > 0
    elif part == "steady":
        assert rows[0]["last"] < rows[0]["first"]
    elif part == "precision":
        exact, theirs, ours = (row["relative_difference_of_gradients"] for row in rows)
        assert exact < 1e-4 < ours < 2 * theirs


def test_prediction_type_is_checked_against_the_unet() -> None:
    backbone = load_backbone("toyworld")
    backbone.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(InputError, match="prediction_type='epsilon', but this UNet predicts 'v_prediction'"):
        check_prediction_type(backbone)
    backbone.unet = type(backbone.unet).from_config(backbone.unet.config)  # random weights: nothing to conclude
    check_prediction_type(backbone)


def test_missing_base_model_is_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(InputError, match=f"hub id .*{tmp_path}/none"):
        load_backbone(tmp_path / "none")
    with pytest.raises(InputError, match=f"folder '{tmp_path}'"):
        load_backbone(tmp_path)


def test_ema_is_the_average_and_swaps_for_validation() -> None:
    module, ema = BootPIG("toyworld", lr_reference=0.0), EMA(decay=0.75)
    name, weight = next(iter(module.trainable().items()))
    begin = weight.detach().clone()
    ema.on_fit_start(None, module)  # type: ignore[arg-type]
    trainer = type("Steps", (), {"global_step": 0})()
    expected = begin.clone()
    for step in (1, 2, 2, 3):  # the repeated one is inside an accumulation
        if step > trainer.global_step:
            weight.data += 1
            expected = 0.75 * expected + 0.25 * weight.detach()
        trainer.global_step = step
        ema.on_train_batch_end(trainer, module, None, None, 0)
    torch.testing.assert_close(ema.average[name], expected)
    ema.on_validation_start(trainer, module)
    torch.testing.assert_close(weight.detach(), expected)
    ema.on_validation_end(trainer, module)
    torch.testing.assert_close(weight.detach(), begin + 3)


def test_weights_fit_their_budget() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert sum(path.stat().st_size for path in files) <= 60e6


def test_validation_scores_choose_the_best_checkpoint(toy_data, tmp_path) -> None:
    """The scoring networks enter no checkpoint and no optimizer, are loaded once, and stay where they are."""
    samples = SubjectSamples(str(toy_data / "subjects"), "toyworld", "toyworld", max_subjects=2, steps=4)
    best = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="val/selection", mode="max")
    seen: list[tuple[float, int, int]] = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: BootPIG) -> None:
            scores = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in ("selection", "dino", "clip_t")}
            expected = (max(scores["dino"], 0) * max(scores["clip_t"], 0)) ** 0.5
            assert scores["selection"] == pytest.approx(expected, abs=1e-6)
            seen.append((scores["selection"], id(samples.clip), id(samples.dino)))
            assert next(samples.clip.model.parameters()).device == pl_module.device

    module = BootPIG("toyworld", lr_reference=1e-3, lr_rsa=1e-3)
    data = TripletDataModule(
        str(toy_data / "triplets"), val_shards=str(toy_data / "val"), batch_size=4, resolution=64, num_workers=0
    )
    trainer = Trainer(
        max_steps=3,
        val_check_interval=1,
        check_val_every_n_epoch=None,  # as in the configs: else 1 means an epoch, and the best is kept at its end only
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[samples, Watch(), best],
        logger=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert len(seen) == 3
    assert len({networks[1:] for networks in seen}) == 1
    kept = torch.load(tmp_path / "best.ckpt", weights_only=True)
    scores = [score for score, _, _ in seen]
    assert kept["global_step"] == 1 + scores.index(max(scores))
    assert set(kept["state_dict"]) == set(module.trainable())
    assert sum(len(group["params"]) for group in kept["optimizer_states"][0]["param_groups"]) == len(module.trainable())
    assert not [name for name, _ in module.named_modules() if "clip" in name or "dino" in name]
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3


class Poison(Callback):
    """NaN pixels in the second sample of given batches; and what the weights were after each step."""

    def __init__(self, batches: set[int]) -> None:
        self.batches, self.keys, self.weights = batches, list[str](), list[torch.Tensor]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: BootPIG, batch: Batch, batch_idx: int) -> None:
        if batch_idx in self.batches:
            batch.target[1] = torch.nan
            self.keys.append(batch.keys[1])

    def on_train_batch_end(self, trainer: Trainer, pl_module: BootPIG, outputs, batch: Batch, batch_idx: int) -> None:
        self.weights.append(next(iter(pl_module.trainable().values())).detach().clone())


def fit_with(callback: Callback, toy_data: Path, steps: int) -> BootPIG:
    module = BootPIG("toyworld", lr_reference=1e-3, lr_rsa=1e-3)
    data = TripletDataModule(str(toy_data / "triplets"), batch_size=2, resolution=64, num_workers=0)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    Trainer(max_steps=steps, callbacks=[callback], accelerator="cpu", gradient_clip_val=1.0, **quiet).fit(module, data)
    return module


def test_a_step_without_finite_gradients_is_skipped_and_named(toy_data, caplog) -> None:
    poison = Poison({1})
    module = fit_with(poison, toy_data, steps=3)
    assert module.skipped_steps == 1
    assert f"step 1: gradients are not finite, the step is skipped: {poison.keys[0]}" in caplog.text
    first, second, third = poison.weights
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert third.isfinite().all()


def test_too_many_skipped_steps_end_the_run(toy_data, monkeypatch) -> None:
    monkeypatch.setattr("pig.training.step.MAX_SKIPPED", 2)
    with pytest.raises(InputError, match=r"2 steps were skipped since the start"):
        fit_with(Poison(set(range(9))), toy_data, steps=9)
