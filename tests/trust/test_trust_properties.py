"""Whatever the bytes of a file: a result or an `InputError`, no traceback, and no file outside of the folder.

Files are valid ones that were changed at a random place, or anything at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pig.data.images import drawn_subject, read_manifest
from pig.data.shards import BadSampleError, decode_triplet, find_shards, read_shard, stats_path
from pig.data.subjects import read_subjects
from pig.errors import InputError
from pig.evaluation.results import Result
from pig.mistakes import read_config
from pig.models.weights import read_weights
from pig.sampling.delta import read_delta
from pig.training.checkpoints import load_checkpoint

often = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def damaged(draw: Any, valid: bytes) -> bytes:
    """Cut, with bytes replaced, inserted or taken out; or other bytes altogether."""
    if draw(st.integers(0, 4)) == 0 or not valid:
        return draw(st.binary(max_size=300))
    at = draw(st.integers(0, len(valid) - 1))
    length = draw(st.integers(0, 40))
    return valid[:at] + draw(st.binary(max_size=40)) + (valid[at + length :] if draw(st.booleans()) else b"")


def survives(work: Callable[[], object]) -> None:
    with suppress(InputError, BadSampleError):
        work()


LISTING = (
    b"Classes\n\nsubject_name,class\nmug,mug\n\nPrompts\n\nObject Prompts\n\nprompt_list = [\n"
    b"'a {0} {1} in space'.format(unique_token, class_token)\n]\n\nLive Subject Prompts\n\nprompt_list = [\n"
    b"'a {0} {1} asleep'.format(unique_token, class_token)\n]\n"
)
KEYS = {"key": "k", "nearest_key": "k", "file": "mug/0/0.png", "kind": "scene", "copied": False}
RESULT = json.dumps(
    {
        **{"protocol": "dreambooth", "hash": "0" * 16, "name": "a", "images_folder": "x", "moves": {}, "missing": []},
        "scores": {name: {"mean": 0.5, "low": 0.4, "high": 0.6} for name in ("dino", "clip_t")},
        "subjects": {"mug": {"dino": 0.5}},
        **{"groups": {}, "bounds": {}, "notes": ["n"], "photographs": {"mug": [{"file": "a", "key": "k"}]}},
        "images": [{"subject": "mug", "prompt": "a mug", "prompt_index": 0, "seed": "0", **KEYS}],
    }
).encode()
LINE = json.dumps({"file": "references/0/0.png", "prompt": "a mug", "settings": {}}).encode()


@pytest.fixture(scope="module")
def shard() -> bytes:
    stream = io.BytesIO()
    picture = io.BytesIO()
    Image.new("RGBA", (8, 8), "red").save(picture, "PNG")
    told = json.dumps({"caption": "a mug", "object": "mug", "scores": {"clip": 0.3}}).encode()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in (("0.target.png", picture), ("0.reference.png", picture), ("0.json", io.BytesIO(told))):
            info = tarfile.TarInfo(name)
            info.size = len(content.getvalue())
            content.seek(0)
            tar.addfile(info, content)
    return stream.getvalue()


def stats_of(shard: bytes) -> bytes:
    return json.dumps({"count": 1, "bytes": len(shard), "sha256": hashlib.sha256(shard).hexdigest()}).encode()


def test_the_files_that_are_damaged_below_are_valid(tmp_path, shard) -> None:
    (tmp_path / "mug").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mug/0.png")
    (tmp_path / "prompts_and_classes.txt").write_bytes(LISTING)
    assert read_subjects(tmp_path)[0].prompts == ("a mug in space",)
    (tmp_path / "manifest.jsonl").write_bytes(LINE)
    assert drawn_subject([], tmp_path).prompts == ("a mug",)
    (tmp_path / "results.json").write_bytes(RESULT)
    assert Result.read(tmp_path).scores["dino"]["mean"] == 0.5
    (tmp_path / "train-000000.tar").write_bytes(shard)
    Path(stats_path(str(tmp_path / "train-000000.tar"))).write_bytes(stats_of(shard))
    (row,) = read_shard(find_shards(str(tmp_path))[0][0])
    assert not isinstance(row, BadSampleError)
    assert decode_triplet(row).caption == "a mug"


@often
@given(content=damaged(LISTING))
def test_prompts_files(tmp_path, content) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "mug").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "mug/0.png")
    for name in ("prompts_and_classes.txt", "other.txt"):
        (tmp_path / "prompts_and_classes.txt").write_bytes(LISTING)
        (tmp_path / name).write_bytes(content)

        def read(name: str = name) -> None:
            for subject in read_subjects(tmp_path, tmp_path / name):
                assert subject.prompts
                assert all(path.resolve().is_relative_to(tmp_path.resolve()) for path in subject.images)

        survives(read)


@often
@given(content=damaged(LINE + b"\n" + LINE))
def test_manifests(tmp_path, content) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(content)
    survives(lambda: read_manifest(tmp_path))
    survives(lambda: drawn_subject([], tmp_path))


@often
@given(content=damaged(RESULT))
def test_results(tmp_path, content) -> None:
    (tmp_path / "results.json").write_bytes(content)
    survives(lambda: Result.read(tmp_path))


@often
@given(data=st.data())
def test_shards(tmp_path, shard, data) -> None:
    tar, stats = tmp_path / "train-000000.tar", stats_of(shard)
    content = data.draw(damaged(shard))
    tar.write_bytes(content)
    told = st.one_of(st.just(stats), st.just(stats_of(content)), damaged(stats))
    Path(stats_path(str(tar))).write_bytes(data.draw(told))

    def read() -> None:
        for one in find_shards(str(tmp_path))[0]:
            for row in read_shard(one):
                if not isinstance(row, BadSampleError):
                    decode_triplet(row)

    survives(read)


@often
@given(data=st.data())
def test_weights_and_checkpoints(tmp_path, data) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(3)}}, file)
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    survives(lambda: load_checkpoint(file))
    survives(lambda: read_weights(file))
    (tmp_path / "delta.json").write_bytes(data.draw(damaged(b'{"method": "bootpig", "base": "toyworld"}')))
    survives(lambda: read_delta(tmp_path))
    survives(lambda: read_config(str(tmp_path / "delta.json")))
