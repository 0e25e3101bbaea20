"""Speed changes nothing that is learnt: every fast path's gradients are those of Algorithm 1 written plainly."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import QUIET, fast_half, losses, tiny_two_unet
from lightning.pytorch import Callback, Trainer

from benchmarks.naive import Naive
from data_gen.toyworld import draw_triplets
from pig.data.modules import TripletDataModule
from pig.data.schema import Batch
from pig.errors import InputError
from pig.methods import module_class
from pig.methods.bootpig import BootPIG
from pig.models.compiled import compile_blocks
from pig.training.callbacks import ProgressBar
from pig.training.optimizers import adamw

Gradients = dict[str, torch.Tensor]


class Watch(Callback):
    """What a step's gradients are, and which batch they are of; into files where several processes run."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.batches, self.gradients = folder, list[Batch](), Gradients()
        self.steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: BootPIG, batch: Batch, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: BootPIG, optimizer: Any) -> None:
        if not self.steps:
            self.gradients = {name: p.grad.detach().clone() for name, p in pl_module.trainable().items()}
            if self.folder:
                torch.save((vars(self.batches[0]), self.gradients), self.folder / f"rank{trainer.global_rank}.pt")
        self.steps += 1

    def on_fit_end(self, trainer: Trainer, pl_module: BootPIG) -> None:
        if self.folder:
            (self.folder / f"steps{trainer.global_rank}").write_text(str(self.steps))


def fit(
    shards: Path, watch: Watch, batch_size: int = 8, trainer: dict[str, Any] | None = None, **model: Any
) -> BootPIG:
    module = BootPIG("toyworld", reference_dropout=0.4, caption_dropout=0.4, **model)
    data = TripletDataModule(str(shards), batch_size=batch_size, resolution=64, num_workers=0)
    settings = {"max_steps": 1, "precision": "32-true", "gradient_clip_val": 1.0, **QUIET, **(trainer or {})}
    Trainer(callbacks=[watch], **settings).fit(module, data)
    return module


def plain(batch: Batch) -> Gradients:
    naive = Naive("toyworld")
    naive.loss(batch, 0.4, 0.4).backward()
    return {f"net.{name}": p.grad for of in naive.groups.values() for name, p in of.items()}


def check(found: Gradients, expected: Gradients, rtol: float = 1e-3) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm() / (gradient.norm() + 1e-8)
        assert difference < rtol, (name, float(difference))


@pytest.fixture(scope="module")
def expected(toy_data) -> Gradients:
    data = TripletDataModule(str(toy_data / "triplets"), batch_size=8, resolution=64, num_workers=0)
    return plain(next(iter(data.train_dataloader())))


@pytest.mark.parametrize(
    "way", [{}, {"micro_batch": 3}, {"micro_batch": 1}, {"gradient_checkpointing": True, "micro_batch": 4}], ids=str
)
@pytest.mark.parametrize("inputs", ["triplets", "encoded"])
def test_gradients_are_those_of_the_plain_loop(toy_data, encoded, expected, way, inputs) -> None:
    watch = Watch()
    fit(toy_data / inputs, watch, **way)
    check(watch.gradients, expected)


def test_lightnings_accumulation_gives_the_same_gradients(toy_data, expected) -> None:
    watch = Watch()
    fit(toy_data / "triplets", watch, 4, {"accumulate_grad_batches": 2}, micro_batch=3)
    check(watch.gradients, expected)


def test_the_progress_bar_asks_for_nothing_between_the_logged_steps(toy_data) -> None:
    seen = []

    class Asked(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: BootPIG, *_: Any) -> None:
            assert not trainer.progress_bar_metrics  # each would be fetched from the GPU
            seen.append(ProgressBar().get_metrics(trainer, pl_module).get("loss"))

    data = TripletDataModule(str(toy_data / "triplets"), batch_size=2, resolution=64, num_workers=0)
    Trainer(max_steps=4, log_every_n_steps=2, callbacks=[Asked()], **QUIET).fit(BootPIG("toyworld"), data)
    assert seen[:2] == [None, None]
    assert seen[2] == seen[3] > 0


@fast_half
def test_bf16_is_as_near_to_float32_as_the_plain_loop_is(toy_data, expected) -> None:
    watch, naive = Watch(), Naive("toyworld")
    fit(toy_data / "triplets", watch, trainer={"precision": "bf16-mixed"}, micro_batch=4)
    with torch.autocast("cpu", torch.bfloat16):
        naive.loss(watch.batches[0], 0.4, 0.4).backward()
    theirs = {f"net.{name}": p.grad for of in naive.groups.values() for name, p in of.items()}

    def off(gradients: Gradients) -> float:
        total = torch.cat([(gradients[name] - one).flatten() for name, one in expected.items()]).norm()
        return float(total / torch.cat([one.flatten() for one in expected.values()]).norm())

    assert 1e-3 < off(watch.gradients) < 1.3 * off(theirs)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, fits: int, within: str) -> list[int]:
    """Only `fits` samples go through the loss (or its backward pass); which sizes were tried."""
    tried, losses = list[int](), BootPIG.losses

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def limited(self: BootPIG, batch: Batch, *, training: bool) -> Any:
        tried.append(len(batch.keys))
        if tried[-1] > fits and within == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory")
        found, t = losses(self, batch, training=training)
        return (Full.apply(found) if tried[-1] > fits else found), t

    monkeypatch.setattr(BootPIG, "losses", limited)
    return tried


@pytest.mark.parametrize(
    ("within", "precision"), [("forward", "32-true"), pytest.param("backward", "bf16-mixed", marks=fast_half)]
)
def test_out_of_memory_halves_the_micro_batch(toy_data, monkeypatch, caplog, within, precision) -> None:
    halved = Watch()
    fit(toy_data / "triplets", halved, trainer={"precision": precision}, micro_batch=2)
    tried, watch = short_of_memory(monkeypatch, 2, within), Watch()
    module = fit(toy_data / "triplets", watch, trainer={"precision": precision})
    assert tried == [8, 4, 2, 2, 2, 2]
    assert module.micro_batch == 2
    assert "out of memory with a micro-batch of 4: halved to 2" in caplog.text
    check(watch.gradients, halved.gradients, rtol=1e-5)


def test_a_sample_that_does_not_fit_names_the_remedies(toy_data, monkeypatch) -> None:
    short_of_memory(monkeypatch, 0, "backward")
    with pytest.raises(InputError, match="micro-batch of 1: set model.gradient_checkpointing=true, model.optimizer"):
        fit(toy_data / "triplets", Watch(), batch_size=2)


def test_8bit_adamw_trains_in_a_quarter_of_the_memory(toy_data) -> None:
    module = BootPIG("toyworld", optimizer="adamw_8bit")
    optimizer = module.configure_optimizers()
    data = TripletDataModule(str(toy_data / "triplets"), batch_size=2, resolution=64, num_workers=0)
    losses(module, next(iter(data.train_dataloader())), 0.0, 0.0)[0].mean().backward()
    before = {name: p.detach().clone() for name, p in module.trainable().items()}
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in module.trainable().items())
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    full = sum(8 * p.numel() for p in module.trainable().values())
    assert sum(one.nbytes for one in states) < 0.5 * full  # the toy's small tensors stay in float32


def test_moments_of_a_run_of_other_layout_are_laid_out_like_the_weights() -> None:
    """Fused kernels go through weight, gradient and moments side by side in memory."""
    weights = [torch.nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)))]
    gradients = [torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    weights.append(torch.nn.Parameter(weights[0].detach().to(memory_format=torch.channels_last)))
    one, two = (adamw("adamw", [{"params": [weight], "lr": 0.1}]) for weight in weights)
    weights[0].grad = gradients[0].clone()
    one.step()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    weights[1].data.copy_(weights[0])
    for weight, optimizer in zip(weights, (one, two), strict=True):
        weight.grad = torch.empty_like(weight).copy_(gradients[1])
        optimizer.step()
    torch.testing.assert_close(weights[1], weights[0])


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_uneven_shares_and_shards_and_a_sharded_optimizer(tmp_path) -> None:
    """Both take as many steps and end; their gradients are the plain loop's on both shares together."""
    for index, count in enumerate((5, 3, 2, 7)):
        draw_triplets(tmp_path / f"s{index}", count, 64, first_seed=100 * index)
    (tmp_path / "all").mkdir()
    for index in range(4):
        for file in (tmp_path / f"s{index}").iterdir():
            file.rename(tmp_path / "all" / file.name.replace("000000", f"00000{index}"))
    trainer = {"strategy": "ddp_fork", "devices": 2, "max_steps": 6}  # three to an epoch
    fit(tmp_path / "all", Watch(tmp_path), 5, trainer, micro_batch=1, optimizer="adamw_sharded")
    assert [(tmp_path / f"steps{rank}").read_text() for rank in (0, 1)] == ["6", "6"]
    (one, gradients), (two, others) = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name
    whole = {
        name: torch.cat([one[name], two[name]]) if isinstance(one[name], torch.Tensor) else one[name] + two[name]
        for name in one
        if one[name] is not None
    }
    assert (len(one["keys"]), len(two["keys"]), len(set(whole["keys"]))) == (2, 3, 5)
    check(gradients, plain(Batch(**whole)))


def test_more_processes_than_samples_are_refused(toy_data) -> None:
    with pytest.raises(Exception, match="data.batch_size=1 is less than one sample for each of 2 processes"):
        fit(toy_data / "triplets", Watch(), 1, {"strategy": "ddp_fork", "devices": 2})


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(toy_data, tmp_path) -> None:
    command = [
        *(sys.executable, "-W", "ignore", "-m", "pig.cli", "fit", "--config", "configs/bootpig/toyworld.yaml"),
        *("--run", str(tmp_path), "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"),
        *("--trainer.callbacks=[]", "--trainer.logger=false", "--data.val_shards=null", "--data.batch_size=4"),
        *(
            "--data.shards",
            str(toy_data / "triplets"),
            "--trainer.max_steps=100000",
            "--trainer.enable_checkpointing=false",
        ),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: "global batch 4: processes 2 x" in (tmp_path / "log").read_text(), 150)
        (other,) = [one for one in psutil.Process(process.pid).children() if "pig.cli" in " ".join(one.cmdline())]
        other.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) != 0
        assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE
        # Lightning's watch over its processes, or gloo's over their connections, whichever is first.
        told = (tmp_path / "log").read_text()
        assert "terminated with code -9" in told or "gloo/transport" in told
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_out_of_memory_on_one_of_two_processes_halves_its_micro_batch(toy_data, tmp_path, monkeypatch) -> None:
    """Found in steps without exchange, as nobody can begin again within one."""
    tried, watch = short_of_memory(monkeypatch, 1, "backward"), Watch(tmp_path)
    watch.on_fit_end = lambda trainer, module: (tmp_path / f"tried{trainer.global_rank}").write_text(str(tried))
    fit(toy_data / "triplets", watch, 3, {"strategy": "ddp_fork", "devices": 2, "max_steps": 3})
    # Its shares are of 1 and of 2. Two of the three steps are rehearsed.
    assert (tmp_path / "tried0").read_text() == str([1] * 5)
    assert (tmp_path / "tried1").read_text() == str([2] + [1, 1] * 5)


# -- compilation --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_blocks_change_nothing_and_are_compiled_once(inputs, monkeypatch) -> None:
    """Captured for whatever backend; the batch of the Reference UNet may change without compiling again."""
    plain_net, net = tiny_two_unet(), tiny_two_unet()
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_(self, **how, backend="eager"))
    compile_blocks(net, leave_out=net.interrupted_blocks())
    counted = torch._dynamo.utils.counters["stats"]

    def gradients(net: Any, kept: torch.Tensor) -> Gradients:
        net.zero_grad()
        given = (inputs["reference"][kept, :1], inputs["timesteps"][kept], inputs["text"][kept])
        references = net.encode_reference(*given)
        predicted = net(inputs["latents"], inputs["timesteps"], inputs["text"], references, kept=kept)
        predicted.square().mean().backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    graphs = []
    for kept in (torch.arange(3), torch.arange(2), torch.arange(3), torch.arange(2)):
        check(gradients(net, kept), gradients(plain_net, kept), rtol=1e-4)
        graphs.append(counted["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[2] == graphs[3]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ezigen", "instantbooth", "ip_adapter", "dreambooth"])
def test_a_compiled_step_is_the_plain_one(toy_data, monkeypatch, method) -> None:
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_(self, **how, backend="eager"))
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    told = {"identifier": "sks"} if method in ("instantbooth", "dreambooth") else {}
    batch = next(iter(TripletDataModule(str(toy_data / "triplets"), batch_size=4, resolution=64).train_dataloader()))
    found = []
    for compiled in (False, True):
        module = module_class(method)("toyworld", **told, compile=compiled)
        loss, _ = module.losses(batch, training=True)
        loss.mean().backward()
        found.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert counted["unique_graphs"] > 0
    check(*found, rtol=1e-4)
