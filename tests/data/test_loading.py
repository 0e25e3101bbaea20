"""Streaming of shards: order, ranks, workers, resuming, bad samples."""

from __future__ import annotations

import functools
import http.server
import io
import itertools
import json
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pig.data.loading import ResumableLoader, TripletDataset
from pig.data.modules import TripletDataModule
from pig.data.shards import BadSampleError, decode_triplet, find_shards, read_shard
from pig.data.transforms import ReferenceAugmentation
from pig.errors import InputError


def dataset(folder: Path, *, batch_size: int = 4, rank: int = 0, world_size: int = 1, **more: object) -> TripletDataset:
    options = {"seed": 3, "shuffle_block": 10, "max_bad_samples": 5, "drop_last": True, **more}
    return TripletDataset(
        find_shards(str(folder))[0],
        batch_size=batch_size,
        resolution=64,
        augmentation=ReferenceAugmentation(),
        rank=rank,
        world_size=world_size,
        **options,  # type: ignore[arg-type]
    )


def keys(data: TripletDataset, *, workers: int = 0, epoch: int = 0, batch: int = 0) -> list[list[str]]:
    loader = ResumableLoader(data, num_workers=workers, pin_memory=False)
    loader.epoch, loader.batch = epoch, batch
    return [one.keys for one in loader]


def flat(batches: list[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_once_over_ranks_and_workers(toy_data, workers, world_size) -> None:
    shards = toy_data / "triplets"
    seen = [keys(dataset(shards, rank=r, world_size=world_size), workers=workers) for r in range(world_size)]
    assert len({len(one) for one in seen}) == 1
    everything = flat([flat(one) for one in seen])
    assert len(everything) == len(set(everything)) == 96


def test_left_over_samples_are_less_than_a_global_batch_and_validation_keeps_all(toy_data) -> None:
    shards = toy_data / "triplets"
    assert sum(len(flat(keys(dataset(shards, batch_size=20, rank=r, world_size=2)))) for r in (0, 1)) == 80
    whole = [keys(dataset(shards, batch_size=20, rank=r, world_size=2, drop_last=False)) for r in (0, 1)]
    assert len(set(flat([flat(one) for one in whole]))) == 96


def test_what_an_epoch_leaves_out_changes_with_the_epoch(toy_data) -> None:
    data = dataset(toy_data / "triplets", batch_size=40)
    everything = {f"{number:09d}" for number in range(96)}
    left_out = [everything - set(flat(keys(data, epoch=epoch))) for epoch in range(4)]
    assert all(len(one) == 16 for one in left_out)
    assert len(set(map(frozenset, left_out))) == 4


def test_all_ranks_accept_the_state_that_rank_0_saved(toy_data) -> None:
    loaders = [
        ResumableLoader(dataset(toy_data / "triplets", rank=rank, world_size=2), num_workers=0, pin_memory=False)
        for rank in (0, 1)
    ]
    rest = [[batch.keys for batch in loader][5:] for loader in loaders]
    state = {**loaders[0].state_dict(), "epoch": 0, "batch": 5}
    for rank, expected in enumerate(rest):
        loader = ResumableLoader(
            dataset(toy_data / "triplets", rank=rank, world_size=2), num_workers=0, pin_memory=False
        )
        loader.load_state_dict(state)
        assert [batch.keys for batch in loader] == expected


def test_order_follows_seed_and_epoch(toy_data) -> None:
    shards = toy_data / "triplets"
    first = keys(dataset(shards))
    assert keys(dataset(shards)) == first
    assert keys(dataset(shards), epoch=1) != first
    assert keys(dataset(shards, seed=4)) != first


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_resume_gives_exactly_what_was_not_yet_seen(toy_data, workers) -> None:
    data = dataset(toy_data / "triplets", batch_size=7)
    full = keys(data, workers=workers)
    for seen in (1, 2, 5, len(full) - 1):
        assert keys(data, workers=workers, batch=seen) == full[seen:]


def test_state_of_the_loader(toy_data) -> None:
    data = dataset(toy_data / "triplets")
    loader = ResumableLoader(data, num_workers=0, pin_memory=False)
    batches = iter(loader)
    [next(batches) for _ in range(3)]
    state = loader.state_dict()
    other = ResumableLoader(dataset(toy_data / "triplets"), num_workers=0, pin_memory=False)
    other.load_state_dict(state)
    expected, got = next(batches), next(iter(other))
    assert got.keys == expected.keys
    assert torch.equal(got.reference, expected.reference)
    assert torch.equal(got.seeds, expected.seeds)
    changed = ResumableLoader(dataset(toy_data / "triplets", seed=9), num_workers=0, pin_memory=False)
    with pytest.raises(InputError, match="mid-epoch of other data: fingerprint"):
        changed.load_state_dict(state)


def test_batch_layout(toy_data) -> None:
    batch = next(iter(ResumableLoader(dataset(toy_data / "triplets"), num_workers=0, pin_memory=False)))
    assert batch.target.shape == (4, 3, 64, 64)
    assert batch.reference.shape == (4, 1, 3, 64, 64)
    assert batch.target.abs().max() <= 1
    assert batch.reference.amax(dim=(1, 2, 3, 4)).eq(1).all()  # white ground
    assert all(caption.startswith("a photo of a ") for caption in batch.captions)
    assert batch.seeds.dtype == torch.int64


def test_specs(toy_data, tmp_path) -> None:
    folder = toy_data / "triplets"
    for spec in (
        str(folder),
        f"{folder}/*.tar",
        f"{folder}/train-{{000000..000003}}.tar",
        f"file://{folder}/train-000000.tar",
    ):
        shards, left_out = find_shards(spec)
        assert sum(s.stats.count for s in shards) == (24 if spec.startswith("file") else 96)
        assert not left_out
    (piped,), _ = find_shards(f"pipe:cat {folder}/train-000001.tar")
    assert len(list(read_shard(piped))) == 24
    with pytest.raises(InputError, match="no shard matches"):
        find_shards(str(tmp_path / "*.tar"))
    assert len(list(read_shard(find_shards(f"file://{folder}/train-000000.tar")[0][0]))) == 24


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http by curl")
def test_shards_over_http(toy_data) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(toy_data / "triplets"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shards, left_out = find_shards(f"http://127.0.0.1:{server.server_port}/train-{{000000..000001}}.tar")
        assert not left_out
        assert next(decode_triplet(raw).key for raw in read_shard(shards[1])) == "000000024"  # type: ignore[arg-type]
        server.shutdown()


def copy_shards(toy_data: Path, to: Path) -> Path:
    shutil.copytree(toy_data / "triplets", to)
    return to


def rewrite(tar: Path, change: dict[str, bytes | None]) -> None:
    """Replace (or drop) members by the end of their name, keeping the stats file as it is but for the size."""
    with tarfile.open(tar) as old:
        members = [(m.name, old.extractfile(m).read()) for m in old.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as new:
        for name, content in members:
            end = next((end for end in change if name.endswith(end)), None)
            content = content if end is None else change[end]
            if content is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))
    stats = tar.with_name(tar.stem + "_stats.json")
    stats.write_text(json.dumps({**json.loads(stats.read_text()), "bytes": tar.stat().st_size}))


def broken_png() -> bytes:
    """A second chunk of picture data with a damaged header, which PIL calls a SyntaxError."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 4), dtype=np.uint8)).save(buffer, "PNG")
    content = buffer.getvalue()
    at = content.rindex(b"IDAT")
    return content[:at] + b"\x00\x01\x02\x03" + content[at + 4 :]


BROKEN_PNG = broken_png()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"000000005.reference.png": None}, "000000005: lacks member reference.png"),
        ({"000000005.target.jpg": None}, "000000005: lacks member target.jpg"),
        ({"000000005.json": None}, "000000005: lacks member json"),
        ({"000000005.json": b'{"object": "mug"}'}, "000000005: json has no caption"),
        ({"000000005.json": b"{"}, "000000005: json is not JSON"),
        ({"000000005.json": b"[1]"}, "000000005: json has no caption"),
        ({"000000005.target.jpg": b"no picture"}, "000000005: target.jpg does not decode"),
        ({"000000005.reference.png": BROKEN_PNG}, "000000005: reference.png does not decode"),
    ],
)
def test_a_bad_sample_is_named_and_replaced(toy_data, tmp_path, caplog, change, message) -> None:
    shards = copy_shards(toy_data, tmp_path / "shards")
    rewrite(shards / "train-000000.tar", change)
    seen = flat(keys(dataset(shards)))
    assert len(seen) == 96
    assert "000000005" not in seen
    assert len(set(seen)) == 95
    assert message in caplog.text


def test_too_many_bad_samples_stop(toy_data, tmp_path) -> None:
    shards = copy_shards(toy_data, tmp_path / "shards")
    rewrite(shards / "train-000002.tar", {".reference.png": None})
    with pytest.raises(InputError, match=r"6 bad samples, more than data.max_bad_samples=5"):
        keys(dataset(shards))


def test_a_torn_tar_is_read_as_far_as_it_goes_and_what_it_lacks_is_counted(toy_data, tmp_path, caplog) -> None:
    shards = copy_shards(toy_data, tmp_path / "shards")
    tar = shards / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:100_000])
    torn = next(shard for shard in find_shards(str(shards))[0] if shard.url == str(tar))
    samples = list(read_shard(torn))
    assert len(samples) == 24
    bad = [s for s in samples if isinstance(s, BadSampleError)]
    assert bad
    assert all("the tar is torn" in str(s) for s in bad)
    decode_triplet(samples[0])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"bad samples, more than data\.max_bad_samples.*the tar is torn"):
        keys(dataset(shards))


def test_every_validation_sees_the_same_samples_with_the_same_seeds(toy_data) -> None:
    data = TripletDataModule(
        str(toy_data / "triplets"), val_shards=str(toy_data / "triplets"), batch_size=8, resolution=64, num_workers=0
    )
    loader = data.val_dataloader()
    first = [(batch.keys, batch.seeds.tolist()) for batch in loader]
    next(iter(loader))  # a pass that was cut short
    assert [(batch.keys, batch.seeds.tolist()) for batch in loader] == first
    training = data.train_dataloader()
    assert [batch.keys for batch in training] != [batch.keys for batch in training]


def test_a_shard_without_stats_does_not_exist(toy_data, tmp_path) -> None:
    shards = copy_shards(toy_data, tmp_path / "shards")
    (shards / "train-000003_stats.json").unlink()
    found, left_out = find_shards(str(shards))
    assert len(found) == 3
    assert "unfinished" in left_out[0]


def test_nothing_usable_is_said_before_training(toy_data, tmp_path) -> None:
    shards = copy_shards(toy_data, tmp_path / "shards")
    for tar in shards.glob("*.tar"):
        rewrite(tar, {".json": b"{}"})
    with pytest.raises(InputError, match="no usable sample at the start.*has no caption"):
        TripletDataModule(str(shards), batch_size=4, resolution=64).prepare_data()
    with pytest.raises(InputError, match="multiple of 8, got 60"):
        TripletDataModule(str(shards), batch_size=4, resolution=60)
    with pytest.raises(InputError, match="less than one batch of 97"):
        dataset(toy_data / "triplets", batch_size=97)
