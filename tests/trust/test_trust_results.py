"""Promises of docs/trust.md about results and data, each by the case that once broke it."""

from __future__ import annotations

import http.server
import json
import os
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains import config_for
from conftest import QUIET, embedded
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from trying import TOY, data_gen_photos, photographs, refused

from data_gen.__main__ import run as data_gen
from data_gen.config import settle
from data_gen.toyworld import draw_subjects, draw_triplets
from pig import diffusion
from pig.commands.fit import CLI
from pig.data import modules
from pig.data.images import forget, read_manifest
from pig.data.modules import TripletDataModule
from pig.data.shards import find_shards
from pig.data.subjects import read_subjects
from pig.errors import InputError
from pig.evaluation.statistics import interval, rate_interval
from pig.files import replacing
from pig.methods.bootpig import BootPIG
from pig.sampling.references import reference_noise
from pig.training.checkpoints import AsyncCheckpoints, WholeCheckpoints


def data_of(folder: Path, **more: Any) -> TripletDataModule:
    return TripletDataModule(str(folder), **{"batch_size": 4, "resolution": 64, "num_workers": 0, **more})


def test_1_references_have_noise_of_their_own(toy_data) -> None:
    for number in range(50):
        for seed in range(50):
            theirs = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
            assert not torch.equal(reference_noise((1, 4, 16, 16), number), theirs)
    assert torch.equal(reference_noise((2, 3), 7), reference_noise((2, 3), 7))
    assert len({diffusion.derived_seed("reference noise", number) for number in range(1000)}) == 1000
    # In a drawing: what the Reference UNet is shown, less its picture, is not what the drawing starts from.
    pipe, seen = embedded(), []
    encode = pipe.network.encode_reference
    pipe.network.encode_reference = lambda z, t, text: seen.append((z, t)) or encode(z, t, text)  # type: ignore[method-assign]
    cutouts = read_subjects(toy_data / "subjects")[0].references(1)
    for noise in ("fixed", "fresh"):
        seen.clear()
        pipe("a mug", cutouts, num_inference_steps=2, reference_noise=noise, generator=torch.Generator().manual_seed(0))
        z_ref = pipe.encode_references(cutouts, 64)
        own = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        for z, t in seen:
            alpha, sigma = diffusion.alpha_sigma(pipe.scheduler.alphas_cumprod, t)
            found = (z[0] - alpha * z_ref) / sigma
            assert abs(float(torch.corrcoef(torch.stack([found.flatten(), own.flatten()]))[0, 1])) < 0.2


class Counted(Callback):
    """How many steps a process took, and what it saw."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, list[str]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: BootPIG, batch: Any, batch_idx: int) -> None:
        self.keys += batch.keys

    def on_fit_end(self, trainer: Trainer, pl_module: BootPIG) -> None:
        (self.folder / f"keys{trainer.global_rank}").write_text(json.dumps(self.keys))


@pytest.mark.slow
def test_2_one_list_of_shards_for_all_processes(toy_data, tmp_path, monkeypatch) -> None:
    """The listing of one process fails for a part, as over a network: all still have one plan."""

    def flaky(spec: Any) -> Any:
        shards, left_out = find_shards(spec)
        second = torch.distributed.is_initialized() and torch.distributed.get_rank() == 1
        return (shards[:1], left_out) if second else (shards, left_out)

    monkeypatch.setattr(modules, "find_shards", flaky)
    trainer = Trainer(
        max_epochs=1, strategy="ddp_fork", devices=2, callbacks=[Counted(tmp_path)], limit_train_batches=4, **QUIET
    )
    trainer.fit(BootPIG("toyworld", lr_reference=0.0), data_of(toy_data / "triplets", batch_size=24))
    seen = [json.loads((tmp_path / f"keys{rank}").read_text()) for rank in (0, 1)]
    assert [len(keys) for keys in seen] == [48, 48]
    assert len(set(seen[0] + seen[1])) == 96


def test_3_seed_everything_is_the_seed_of_the_data(toy_data, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards
    found = []
    for seed in (0, 1, 1):
        words = [f"--config={TOY}", f"--run={tmp_path}", f"--seed_everything={seed}", "--trainer.accelerator=cpu"]
        monkeypatch.setattr(sys, "argv", ["pig.cli", *words, f"--data.shards={toy_data}/triplets"])
        batch = next(iter(CLI(run=False).datamodule.train_dataloader()))
        found.append((batch.keys, batch.seeds.tolist()))
    assert found[0] != found[1] == found[2]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--data.seed=7"])  # who names it has it
    assert CLI(run=False).datamodule.seed == 7


def test_4_seeds_that_torch_cannot_tell_apart_are_refused(toy_data, tmp_path, monkeypatch, capsys) -> None:
    picture = next((toy_data / "subjects/mug_006").glob("00.png"))
    for seed in (2**32, 2**32 - 1, -1, 10**30):
        given = ("--references", picture, "--prompt", "a mug", "--seed", seed, "--out", tmp_path / "out")
        assert "--seed must lie between 0 and 2^32" in refused(monkeypatch, capsys, "generate", *given)
    last = (torch.randn(3, generator=torch.Generator().manual_seed(one)) for one in (5, 5 + 2**32))
    assert torch.equal(*last)  # why


def test_5_a_tuple_of_references_is_a_list_of_references(toy_data) -> None:
    pipe, (one, two) = embedded(), read_subjects(toy_data / "subjects")[6].references(2)

    def draw(references: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipe("a mug", references, num_inference_steps=1, generator=generator, output_type="pt").images

    assert torch.equal(draw((one, two)), draw([one, two]))
    paths = read_subjects(toy_data / "subjects")[6].images[:2]
    assert torch.equal(draw(tuple(paths)), draw(list(paths)))
    for wrong in ([(one, two)], [paths], [(one,)]):  # which of them would be meant as a mask?
        with pytest.raises(InputError, match="is a picture and its mask, which is grey"):
            draw(wrong)
    masked = draw([(one.convert("RGB"), one.getchannel("A"))])  # within a list: a picture and its mask
    assert not torch.equal(masked, draw([one.convert("RGB")]))


@pytest.mark.parametrize(("subjects", "least"), [(5, 0.90), (9, 0.91), (12, 0.92), (30, 0.925)])
def test_6_intervals_cover_what_they_claim(subjects, least) -> None:
    """Simulated: scores of subjects as skewed as ours, 400 benchmarks; percentiles alone covered .83 to .94."""
    rng = np.random.default_rng(subjects)
    found = [interval(rng.beta(5, 2, subjects).tolist()) for _ in range(400)]
    covered = np.mean([low <= 5 / 7 <= high for low, high in found])
    assert least <= covered <= 0.985


def test_6_a_unanimous_rate_has_an_interval() -> None:
    low, high = rate_interval([1.0, 1.0, 1.0], [4, 4, 4])
    assert high == 1.0
    assert 0.2 < low < 0.6
    low, high = rate_interval([0.0] * 20, [1] * 20)
    assert low == 0.0
    assert 0.1 < high < 0.2
    rng = np.random.default_rng(0)
    for subjects, answers in ((5, 20), (5, 50), (12, 6), (30, 4)):
        rates = [rng.binomial(answers, rng.beta(6, 4, subjects)) / answers for _ in range(600)]
        found = (rate_interval(one.tolist(), [answers] * subjects) for one in rates)
        assert 0.92 < np.mean([low <= 0.6 <= high for low, high in found]) < 0.995, (subjects, answers)


@pytest.mark.parametrize("kind", [WholeCheckpoints, AsyncCheckpoints])
def test_7_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch, kind) -> None:
    """Whatever TMPDIR is, nothing is written where the last checkpoint lies until the next one is whole."""
    target, plugin = tmp_path / "last.ckpt", kind()
    plugin.save_checkpoint({"step": 1}, target)
    plugin.teardown()
    moved, replace = [], os.replace

    def watched(source: Any, to: Any) -> None:
        assert torch.load(target, weights_only=True)["step"] == 1
        assert Path(source).parent == Path(to).parent  # one file system
        assert torch.load(source, weights_only=True)["step"] == 2
        moved.append(to)
        replace(source, to)

    monkeypatch.setattr(os, "replace", watched)
    plugin.save_checkpoint({"step": 2}, target)
    plugin.teardown()
    assert moved == [target]
    assert torch.load(target, weights_only=True)["step"] == 2
    monkeypatch.undo()

    def torn() -> None:
        with replacing(target) as aside:
            aside.write_bytes(b"torn")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        torn()
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(target, weights_only=True)["step"] == 2


def test_7_every_training_uses_it(toy_data, tmp_path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    trainer = Trainer(max_steps=1, callbacks=[keep], **{**QUIET, "enable_checkpointing": True})
    trainer.fit(BootPIG("toyworld", lr_reference=0.0), data_of(toy_data / "triplets"))
    assert isinstance(trainer.strategy.checkpoint_io, WholeCheckpoints)


class Cut(http.server.SimpleHTTPRequestHandler):
    """Ends the second tar of a folder early, as a dropped connection does."""

    at: int | None = None  # bytes; None: whole

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = source.read()
        outputfile.write(content[: self.at] if self.path.endswith("000001.tar") else content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(toy_data) -> Iterator[str]:
    handler = type("Handler", (Cut,), {})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *given: handler(*given, directory=str(toy_data / "triplets"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_8_encode_finishes_no_shard_that_was_cut(served, toy_data, tmp_path, monkeypatch) -> None:
    """Wherever it was cut: in the middle, between two members of the last sample, in a header, or in the padding."""
    shards = f"{served}/train-{{000000..000001}}.tar"
    command = ["encode", shards, "--base=toyworld", f"--out={tmp_path}", "--resolution=64"]
    with tarfile.open(toy_data / "triplets/train-000001.tar") as tar:
        members = tar.getmembers()
    for at in (members[20].offset, members[-1].offset, members[-1].offset + 100, members[-1].offset_data + 10_000_000):
        size = (toy_data / "triplets/train-000001.tar").stat().st_size
        monkeypatch.setattr(Cut, "at", min(at, size - 600))
        with pytest.raises(InputError, match=r"train-000001.tar.*torn.*start again to go on"):
            data_gen(command)
        assert [path.name for path in sorted(tmp_path.glob("*_stats.json"))] == ["train-000000_stats.json"]
    monkeypatch.setattr(Cut, "at", None)
    data_gen(command)
    counts = [json.loads(path.read_text())["count"] for path in sorted(tmp_path.glob("*_stats.json"))]
    assert counts == [24, 24]


def test_9_photos_overwrite_nothing(toy_data, tmp_path) -> None:
    photos = photographs(tmp_path / "photos", 3)
    with pytest.raises(InputError, match="made otherwise"):
        data_gen_photos(photos, toy_data / "triplets")
    data_gen_photos(photos, tmp_path / "out")
    kept = (tmp_path / "out/train-000000.tar").read_bytes()
    data_gen_photos(photos, tmp_path / "out")  # the same again
    (photos / "2.png").unlink()
    with pytest.raises(InputError, match="photographs was 3, is 2"):
        data_gen_photos(photos, tmp_path / "out")
    assert (tmp_path / "out/train-000000.tar").read_bytes() == kept


def test_10_triplets_of_other_arguments_are_refused(tmp_path) -> None:
    draw_triplets(tmp_path / "a", 4, 64, per_shard=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    draw_triplets(tmp_path / "a", 4, 64, per_shard=2)
    for other in ({"count": 6}, {"size": 32}, {"first_seed": 9}, {"per_shard": 3}):
        given = {"count": 4, "size": 64, "per_shard": 2, **other}
        with pytest.raises(InputError, match=f"{next(iter(other))} was"):
            draw_triplets(tmp_path / "a", **given)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    own = tmp_path / "own"  # somebody's photographs
    own.mkdir()
    (own / "prompts_and_classes.txt").write_text("mine")
    with pytest.raises(InputError, match="made otherwise"):
        draw_subjects(own, 2, 64)
    assert (own / "prompts_and_classes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="another command has made"):
        settle(config_for(tmp_path / "a"))
    draw_subjects(tmp_path / "s", 2, 64)
    with pytest.raises(InputError, match="count was 2, is 3"):
        draw_subjects(tmp_path / "s", 3, 64)


def test_11_a_used_run_folder_is_refused(tmp_path, toy_data, monkeypatch, capsys) -> None:
    (tmp_path / "fit/checkpoints").mkdir(parents=True)
    (tmp_path / "fit/checkpoints/last.ckpt").write_bytes(b"an earlier run's")
    words = ("--config", TOY, "--run", tmp_path, "--data.shards", toy_data / "triplets", "--data.val_shards", "null")
    error = refused(monkeypatch, capsys, "fit", *words)
    assert "holds last.ckpt of an earlier run: go on with --ckpt_path" in error
    other = tmp_path / "other.ckpt"  # of another folder: its run goes on there
    torch.save({"state_dict": {}}, other)
    assert "of an earlier run" in refused(monkeypatch, capsys, "fit", *words, "--ckpt_path", other)
    assert sorted(path.name for path in (tmp_path / "fit/checkpoints").iterdir()) == ["last.ckpt"]


def test_12_only_its_own_manifest_is_rewritten_and_at_once(tmp_path, monkeypatch) -> None:
    lines = [json.dumps({"file": f"a/0/{number}.png"}) for number in range(4)]
    own, others = tmp_path / "manifest-0-of-2.jsonl", tmp_path / "manifest-1-of-2.jsonl"
    own.write_text("\n".join(lines[:2]) + "\n")
    others.write_text("\n".join(lines[1:]) + "\n")
    before = others.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            forget(tmp_path, ["a/0/1.png"], own.name)
    assert own.read_text() == "\n".join(lines[:2]) + "\n"
    forget(tmp_path, ["a/0/1.png"], own.name)
    assert own.read_text() == lines[0] + "\n"
    assert others.read_bytes() == before
    assert set(read_manifest(tmp_path)) == {f"a/0/{number}.png" for number in range(4)}
