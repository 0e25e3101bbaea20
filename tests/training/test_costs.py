"""What training and drawing cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUIET, fast_half, losses
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pig import cli
from pig.costs import flops_of
from pig.data.modules import TripletDataModule
from pig.errors import InputError
from pig.methods.bootpig import BootPIG
from pig.training.costs import Costs, flops_per_sample
from pig.training.memory import memory_table
from pig.training.optimizers import lay_out


def fit(toy_data: Path, out: Path, steps: int, *, callbacks: list[Any], **more: Any) -> BootPIG:
    module = BootPIG("toyworld")
    data = TripletDataModule(str(toy_data / "triplets"), batch_size=2, resolution=64, num_workers=0, seed=0)
    keep = ModelCheckpoint(out, save_last=True, save_top_k=0, every_n_train_steps=1)
    told = {**QUIET, "enable_checkpointing": True, "callbacks": [*callbacks, keep], "default_root_dir": out}
    Trainer(max_steps=steps, **told).fit(module, data, **more)
    return module


def test_what_a_training_costs(toy_data, tmp_path) -> None:
    module = fit(toy_data, tmp_path, 2, callbacks=[Costs()])
    first = json.loads((tmp_path / "cost.json").read_text())
    assert first["samples"] == 4
    assert first["trained_weights"] == sum(weight.numel() for weight in module.trainable().values())
    unet = module.backbone.unet
    forward = flops_of(lambda: unet(torch.zeros(1, 4, 16, 16), 5, torch.zeros(1, 77, unet.config.cross_attention_dim)))
    assert 4 < first["flops_per_sample"] / forward < 10  # two UNets, forward and backward; the frozen one's weights not
    assert first["seconds"] > 0
    fit(toy_data, tmp_path, 3, callbacks=[Costs()], ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    resumed = json.loads((tmp_path / "cost.json").read_text())
    assert resumed["samples"] == 6
    assert resumed["seconds"] > first["seconds"]
    assert resumed["flops_per_sample"] == first["flops_per_sample"]
    frozen = [name for name, weight in module.named_parameters() if not weight.requires_grad]
    for name in frozen:  # as bf16-mixed keeps them
        weight = module.get_parameter(name)
        weight.data = weight.data.bfloat16()
    assert flops_per_sample(module, module.trainer.datamodule) == first["flops_per_sample"]
    assert all(module.get_parameter(name).dtype == torch.bfloat16 for name in frozen)


def test_a_training_killed_behind_its_last_checkpoint_has_its_cost(toy_data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Costs, "on_train_end", lambda *_: None)
    fit(toy_data, tmp_path, 2, callbacks=[Costs()])
    assert json.loads((tmp_path / "cost.json").read_text())["samples"] == 4


@pytest.mark.slow
def test_counting_changes_no_weight(toy_data, tmp_path) -> None:
    counted, plain = (
        fit(toy_data, tmp_path / name, 1, callbacks=callbacks).trainable()
        for name, callbacks in (("counted", [Costs()]), ("plain", []))
    )
    assert all(torch.equal(counted[name], weight) for name, weight in plain.items())


def test_what_a_picture_costs(toy_data, tmp_path, capsys) -> None:
    found = {}
    for name, references in (("base:toyworld", 0), ("toyworld", 1), ("toyworld", 3)):
        out = tmp_path / f"{references}.json"
        given = ["--subjects", str(toy_data / "subjects"), "--steps=2", "--repeats=1", f"--out={out}"]
        count = [f"--references_per_subject={references}"] if references else []
        cli.run(["cost", f"--model={name}", *given, *count])
        found[references] = json.loads(out.read_text())
        assert found[references]["references"] == references
    assert "seconds_per_picture" in capsys.readouterr().out
    flops = [found[count]["flops_per_picture"] for count in (0, 1, 3)]
    assert flops == sorted(flops)
    assert flops[0] < flops[1] < flops[2]
    assert found[0]["trained_weights"] == 0 < found[1]["trained_weights"] < found[1]["weights"]
    assert found[0]["disk_bytes"] is None
    assert found[1]["disk_bytes"] > 10**6
    with pytest.raises(InputError, match="is a folder: give a file such as cost.json"):
        cli.run(["cost", *given[:2], f"--out={tmp_path}"])
    with pytest.raises(InputError, match="--repeats"):
        cli.run(["cost", *given[:2], "--repeats=0"])


@pytest.mark.parametrize(
    "way",
    [
        {},
        *(pytest.param(one, marks=pytest.mark.slow) for one in ({"gradient_checkpointing": True}, {"micro_batch": 4})),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=fast_half)])
def test_memory_is_counted_as_the_allocator_gives_it(toy_data, precision, way) -> None:
    module = BootPIG("toyworld", **way)
    data = TripletDataModule(str(toy_data / "triplets"), batch_size=8, resolution=64, num_workers=0)
    weights = [parameter.data_ptr() for parameter in module.parameters()]
    table = memory_table(module, data, precision=precision)
    assert [parameter.data_ptr() for parameter in module.parameters()] == weights
    batch = next(iter(data.train_dataloader()))
    lay_out(module, precision, torch.device("cpu"))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
            for part in module.micro_batches(batch):
                losses(module, part, 1e-9, 0.0)[0].mean().backward()
        module.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert table["activations"] + table["gradients"] == pytest.approx(peak, rel=0.08)
    assert table["weights"] == sum(one.nbytes for one in (*module.parameters(), *module.buffers()))
    assert table["all"] == sum(size for name, size in table.items() if name != "all")
