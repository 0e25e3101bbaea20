"""Shards, whatever interrupts or divides the work."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from chains import CONFIG, config_for, digests
from PIL import Image

from data_gen import captions, masks, quality
from data_gen.__main__ import run
from data_gen.captions import Caption, make_captions
from data_gen.config import settle
from data_gen.inspect import inspect_shards
from data_gen.run import complete, dry_run, generate, work
from data_gen.samples import Sample, read_lines, write_samples
from data_gen.shards import ShardMaker, samples_of, seed_of, shard_count, tar_of
from pig.data.shards import decode_triplet, find_shards, read_shard
from pig.errors import InputError, ending


def test_stages_alone_from_disk_to_disk(tmp_path, capsys) -> None:
    run(["captions", str(CONFIG), f"output={tmp_path / 'out'}", "captions.count=8"])
    rows = captions.read_captions(tmp_path / "out" / captions.FILE)
    folder = tmp_path / "folder"
    write_samples(folder, [Sample(f"{i}", row.caption, row.object, i) for i, row in enumerate(rows)])
    for stage in ("images", "masks", "quality", "shards"):
        run([stage, str(CONFIG), str(folder), f"output={tmp_path / 'out'}", "images.steps=10", "quality.border=0"])
    accepted = [row for row in read_lines(folder / quality.DONE) if row["reason"] is None]
    (shard,), _ = find_shards(str(tmp_path / "out"))
    assert shard.stats.count == len(accepted) > 0
    with pytest.raises(InputError, match=r"masks works on a folder with samples\.jsonl"):
        run(["masks", str(CONFIG), f"output={tmp_path / 'out'}"])


def test_a_finished_output_is_not_overwritten_by_a_stage_alone(made, tmp_path) -> None:
    write_samples(tmp_path, [Sample("0", "a photo of a mug, on a beach", "mug", 0)])
    with pytest.raises(InputError, match="holds shards already"):
        run(["shards", str(CONFIG), str(tmp_path), f"output={made}"])
    with pytest.raises(InputError, match="another config"):
        run(["captions", str(CONFIG), f"output={made}", "captions.count=4"])
    with pytest.raises(InputError, match="not for one stage"):
        run(["images", str(CONFIG), str(tmp_path), "--dry-run"])


def test_an_output_of_another_config_is_refused(made, tmp_path) -> None:
    with pytest.raises(InputError, match=r"another config(.|\n)*images\.steps: 3 -> 4"):
        generate(config_for(made, "images.steps=4"))
    wrong_model = config_for(tmp_path, "images.model=/no/such/model")
    with pytest.raises(InputError, match="cannot load images"):
        generate(wrong_model)
    with pytest.raises(InputError, match=r"captions of another config(.|\n)*captions\.count: 9 -> 8"):
        generate(config_for(tmp_path, "captions.count=8"))
    settle(config_for(tmp_path))  # nothing was made of the wrong model: it may be corrected
    (tmp_path / "datagen.yaml").unlink()
    (tmp_path / "train-000000.tar").touch()
    with pytest.raises(InputError, match="of another origin"):
        generate(config_for(tmp_path))


def test_an_output_that_cannot_be_made_is_said(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a folder: name another place"):
        generate(config_for(tmp_path / "file"))


@pytest.mark.slow
def test_ray_that_is_not_there_or_too_small_is_said(tmp_path, monkeypatch) -> None:
    config = config_for(tmp_path, "executor=ray", "workers=3")
    monkeypatch.setenv("RAY_ADDRESS", "foo")
    with pytest.raises(InputError, match="no Ray cluster answers at RAY_ADDRESS=foo"):
        next(work(config, [0]))
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(InputError, match="workers=3, but Ray has room for 2"):
        next(work(config, [0]))


def test_shards_keep_the_contract(made) -> None:
    config = config_for(made)
    shards, left_out = find_shards(str(made))
    assert not left_out
    triplets = [decode_triplet(raw) for shard in shards for raw in read_shard(shard)]  # type: ignore[arg-type]
    assert 0 < len(triplets) <= 9
    rows = captions.read_captions(made / captions.FILE)
    for triplet in triplets:
        index = int(triplet.key)
        assert triplet.caption == rows[index].caption
        assert triplet.object in triplet.caption
        assert triplet.metadata["seed"] in [seed_of(config, index, attempt) for attempt in range(2)]
        assert {"area", "caption_score", "object_score"} <= set(triplet.metadata["scores"])
        assert triplet.reference.size == triplet.target.size == (64, 64)
    card = (made / "README.md").read_text()
    assert f"{len(triplets)} triplets" in card
    assert "Apache-2.0" in card
    assert not (made / "work").exists()
    dropped = sum(shard.stats.rejected.get("dropped after all attempts", 0) for shard in shards)
    assert len(triplets) + dropped == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [["workers=2"], ["executor=ray", "workers=1"], ["executor=ray", "workers=2"]],
    ids=str,
)
def test_any_executor_gives_the_same_bytes(made, tmp_path, where, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    generate(config_for(tmp_path, *where))
    assert digests(tmp_path) == digests(made)


def test_several_pictures_of_a_caption(tmp_path) -> None:
    config = config_for(tmp_path, "images.per_caption=2")
    rows = [Caption(f"c{i}", "mug") for i in range(9)]
    slices = [samples_of(config, rows, number) for number in range(shard_count(config))]
    assert [index for part in slices for index, _ in part] == list(range(18))
    assert [row.caption for part in slices for _, row in part] == [f"c{i % 9}" for i in range(18)]
    assert len({seed_of(config, index, attempt) for index in range(18) for attempt in range(3)}) == 54


def start(out: Path) -> subprocess.Popen[str]:
    rest = ["captions.count=9", "shards.size=3", "images.steps=3", "shards.attempts=2", "workers=2"]
    command = [sys.executable, "-m", "data_gen", str(CONFIG), f"output={out}", *rest]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_killed_twice_ends_with_the_same_shards(made, tmp_path) -> None:
    first = start(tmp_path)
    wait_for(lambda: any(tmp_path.glob("work/*/0/images/*.png")), first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = start(tmp_path)
    wait_for(lambda: any(complete(config_for(tmp_path), number) for number in range(3)), second)
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    done = [number for number in range(3) if complete(config_for(tmp_path), number)]
    assert done
    before = [tar_of(tmp_path, number).stat().st_mtime_ns for number in done]
    third = start(tmp_path)
    output, _ = third.communicate()
    assert third.returncode == 0, output
    assert digests(tmp_path) == digests(made)
    assert [tar_of(tmp_path, number).stat().st_mtime_ns for number in done] == before


@pytest.mark.slow
def test_a_torn_tar_is_made_again_and_finished_ones_are_not(made) -> None:
    expected, times = digests(made), [tar_of(made, number).stat().st_mtime_ns for number in range(3)]
    torn = tar_of(made, 1)
    torn.write_bytes(torn.read_bytes()[:-700])
    generate(config_for(made))
    assert digests(made) == expected
    again = [tar_of(made, number).stat().st_mtime_ns for number in range(3)]
    assert [a == b for a, b in zip(times, again, strict=True)] == [True, False, True]
    assert complete(config_for(made), 1)


def children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from map(int, task.read_text().split())


@pytest.mark.slow
def test_a_dead_worker_ends_the_run_with_a_message(tmp_path) -> None:
    process = start(tmp_path)
    wait_for(lambda: any(tmp_path.glob("work/*/0/images/*.png")), process)
    for worker in children(process.pid):
        if b"spawn_main" in Path(f"/proc/{worker}/cmdline").read_bytes():
            os.kill(worker, signal.SIGKILL)
            break
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "a worker died" in output
    assert "start again to go on" in output


def test_a_full_disk_ends_with_a_message_and_counts_nothing(tmp_path, monkeypatch) -> None:
    config = config_for(tmp_path)
    make_captions(tmp_path, config.captions, seed=0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(masks, "save_png", full)
    with pytest.raises(OSError, match="No space left") as full_disk:
        ShardMaker(config, "cpu").make(0)
    assert ending(full_disk.value) == (
        1,
        f"error: the disk is full ({tmp_path}): make room and give the same command again; what was finished is kept",
    )
    assert not complete(config, 0)
    assert not tar_of(tmp_path, 0).exists()


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_makes_nothing(tmp_path, capsys) -> None:
    dry_run(config_for(tmp_path / "out"))
    text = capsys.readouterr().out
    assert "9 captions" in text
    assert "estimated time here" in text
    assert not (tmp_path / "out").exists()
    dry_run(config_for(tmp_path / "out", "images.model=/no/such/model"))
    assert "cannot load images.model" in " ".join(capsys.readouterr().out.split())


def test_inspect_shows_what_is_there(made, tmp_path, capsys) -> None:
    inspect_shards(made, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "inspect.png"))
    assert (sheet == (255, 0, 255)).all(-1).any(), "no outline of a mask"
    page = (tmp_path / "inspect.html").read_text()
    assert "caption_score" in page
    assert "Contact sheet" in page
    with pytest.raises(InputError, match="no folder of shards"):
        inspect_shards(tmp_path / "none", tmp_path)
    garbage = tmp_path / "garbage"
    shutil.copytree(made, garbage)
    for tar in garbage.glob("*.tar"):
        tar.write_bytes(b"x" * tar.stat().st_size)
    with pytest.raises(InputError, match="no triplet of .* can be read"):
        inspect_shards(garbage, tmp_path)
