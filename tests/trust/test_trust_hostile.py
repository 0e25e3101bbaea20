"""Promises of docs/trust.md about hostile files, odd machines and formats, each by the case that once broke it."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import pickle
import re
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import embedded, generate
from lightning.pytorch import Trainer
from PIL import Image
from trying import TOY, data_gen_photos, photographs, refused

from data_gen.samples import read_samples
from pig import cli
from pig.attention import merged
from pig.attention.merged import lse_kernel, plain_with_lse
from pig.data.shards import find_shards, shard_name, stats_path
from pig.data.subjects import read_subjects
from pig.errors import InputError
from pig.evaluation.compare import compare
from pig.evaluation.results import Result
from pig.evaluation.study import Study
from pig.models.foreground import make_segmenter
from pig.sampling.references import free_memory


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_13_no_checkpoint_runs_code(tmp_path, toy_data, monkeypatch, capsys) -> None:
    bomb, sign = tmp_path / "last.ckpt", tmp_path / "sign"
    bomb.write_bytes(pickle.dumps(Evil(sign)))
    words = ("--config", TOY, "--run", tmp_path / "run", "--data.shards", toy_data / "triplets")
    for path in ("http://127.0.0.1:9/last.ckpt", "s3://bucket/last.ckpt", f"file://{bomb}"):
        assert "an address; download the checkpoint" in refused(monkeypatch, capsys, "fit", *words, "--ckpt_path", path)
    refused(monkeypatch, capsys, "fit", *words, "--ckpt_path", bomb)
    assert not sign.exists()
    # What Lightning itself looks for, such as `last`, is loaded without code, too.
    last = tmp_path / "run/fit/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    (tmp_path / "run/data").symlink_to(toy_data)
    torch.save({}, last)
    monkeypatch.setattr(sys, "argv", ["pig.cli", "fit", *map(str, words), "--ckpt_path=last", "--trainer.max_steps=1"])
    told: dict[str, Any] = {}
    monkeypatch.setattr(Trainer, "fit", functools.wraps(Trainer.fit)(lambda self, *_, **given: told.update(given)))
    cli.run(sys.argv[1:])
    assert told["weights_only"] is True


def test_14_a_foreign_result_puts_nothing_into_a_page(toy_data, tmp_path) -> None:
    draw = {"subjects": toy_data / "subjects", "images_per_prompt": 1, "steps": 1, "references_per_subject": 1}
    prompts = tmp_path / "prompts.txt"
    lines = (toy_data / "subjects/prompts_and_classes.txt").read_text().splitlines()
    prompts.write_text("\n".join(one for one in lines if "format" not in one or "space" in one))
    generate(tmp_path / "images", "base:toyworld", **draw, prompts=prompts)
    from pig.evaluation.benchmark import Photographs, evaluate

    evaluate(tmp_path / "images", tmp_path / "a", Photographs(toy_data / "subjects", prompts=prompts))
    good = json.loads((tmp_path / "a/results.json").read_text())
    script = "<script>alert(1)</script>"
    (tmp_path / "b").mkdir()

    def put(**changes: Any) -> None:
        (tmp_path / "b/results.json").write_text(json.dumps({**good, **changes}))

    for name, value in (
        ("protocol", script),
        ("hash", script),
        ("images", [{**good["images"][0], "key": "../../etc/passwd"}]),
        ("images", "none"),
        ("scores", {"dino": {"mean": script}}),
        ("scores", {"dino": 5}),
        ("bounds", {"other": {}}),
        ("subjects", {"mug_006": {"dino": script}}),
        ("images", [{**good["images"][0], "file": "../../secret.png"}]),
    ):
        put(**{name: value})
        with pytest.raises(InputError, match="is no result of this version's `evaluate`"):
            compare([tmp_path / "a", tmp_path / "b"], out=tmp_path / "both")
    put(name=script, notes=[script])
    compare([tmp_path / "a", tmp_path / "b"], out=tmp_path / "both")
    for file in ("report.html", "table.md"):
        text = (tmp_path / "both" / file).read_text()
        assert script not in text
        assert "alert(1)" in text
    told = Result.read(tmp_path / "b")
    told.name = f"{script} [/red] ![x](http://h/)"
    asking = Study(Result.read(tmp_path / "a"), told, tmp_path / "study", pairs=2)
    text = asking.write_found()
    assert script not in text
    assert "![x](" not in text


@pytest.mark.parametrize("key", ["../../../ESCAPED", "/etc/x", "a/b", "", "a b", 7])
def test_15_a_samples_key_is_no_path(tmp_path, key) -> None:
    row = {"key": key, "caption": "a mug", "object": "mug", "seed": 1}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="a key is letters, digits, _ and -"):
        read_samples(tmp_path)


def test_15_keys_and_seeds_are_told_apart(tmp_path) -> None:
    rows = [{"key": "a", "caption": "a mug", "object": "mug", "seed": seed} for seed in (1, 2)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="the key 'a' stands twice"):
        read_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text(json.dumps({**rows[0], "seed": 5 + 2**32}) + "\n")
    with pytest.raises(InputError, match="below 2\\^32"):
        read_samples(tmp_path)


def test_16_rembgs_model_is_named(monkeypatch) -> None:
    asked = []
    stand_in = types.SimpleNamespace(remove=None, new_session=lambda name: asked.append(name), __version__="2.0")
    monkeypatch.setitem(sys.modules, "rembg", stand_in)
    names = ("u2netp", "isnet-general-use", "birefnet-general")
    identities = {make_segmenter("rembg", rembg_model=name).identity for name in names}  # type: ignore[union-attr]
    assert asked == list(names)
    assert len(identities) == 3
    make_segmenter("rembg")
    assert asked[-1] == "isnet-general-use"
    with pytest.raises(InputError, match="rembg_model 'bria-rmbg' is none of"):
        make_segmenter("rembg", rembg_model="bria-rmbg")  # type: ignore[arg-type]


def test_17_inpainting_in_half_precision(toy_data) -> None:
    pipe = embedded().to(torch.bfloat16)
    picture, mask = Image.new("RGB", (64, 64), (30, 90, 200)), Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    cutouts = read_subjects(toy_data / "subjects")[6].references(1)
    drawn = pipe("a mug", cutouts, image=picture, mask_image=mask, num_inference_steps=2).images[0]
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(drawn)[outside], np.asarray(picture)[outside])
    assert not np.array_equal(np.asarray(drawn), np.asarray(picture))


def test_18_memory_that_the_allocator_holds_free_counts_as_free(monkeypatch) -> None:
    for name, size in (("mem_get_info", (10, 100)), ("memory_reserved", 70), ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    assert free_memory(torch.device("cuda")) == 50
    assert free_memory(torch.device("cpu")) > 2**20


def test_19_attention_with_log_sums_on_any_device(monkeypatch) -> None:
    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    assert [lse_kernel("cuda", dtype, (9, 0)) for dtype in (half, bf16, full)] == ["flash", "flash", "efficient"]
    assert [lse_kernel("cuda", dtype, (7, 5)) for dtype in (half, bf16, full)] == ["efficient", "plain", "efficient"]
    assert [lse_kernel(device, half, (0, 0)) for device in ("mps", "xpu", "cpu", "meta")] == ["plain"] * 2 + ["cpu"] * 2
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 7, 7))
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    torch.testing.assert_close(plain_with_lse(q, k, v), (o, lse))
    with monkeypatch.context() as patch:  # what is chosen is what runs
        patch.setattr(merged, "lse_kernel", lambda *_: "plain")
        patch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
        torch.testing.assert_close(merged.attend_with_lse(q, k, v), (o, lse))
    found, _ = plain_with_lse(q.half(), k.half(), v.half())
    torch.testing.assert_close(found.float(), o, atol=5e-3, rtol=0)


def test_20_statistics_of_shards_behind_commands_and_queries(tmp_path, toy_data) -> None:
    for tar, stats in {
        "a/train-0.tar": "a/train-0_stats.json",
        "pipe:aws s3 cp s3://b/x.tar -": "pipe:aws s3 cp s3://b/x_stats.json -",
        "pipe:curl -s 'https://h/x.tar?sig=a.tar'": "pipe:curl -s 'https://h/x_stats.json?sig=a.tar'",
        "pipe:cat x.tar | tee copy.tar": "pipe:cat x_stats.json | tee copy.tar",
        "pipe:cat x.tar>&1;": "pipe:cat x_stats.json>&1;",
        "https://h/a/x.tar?name=y.tar": "https://h/a/x_stats.json?name=y.tar",
        "/d/a 0.tar": "/d/a 0_stats.json",
        "bob's.tar": "bob's_stats.json",
        "https://h/x.tar?sig=1#part": "https://h/x_stats.json?sig=1#part",
        "/data.tar/b/x.tar": "/data.tar/b/x_stats.json",
    }.items():
        assert stats_path(tar) == stats
    assert shard_name("pipe:aws s3 cp s3://b/x.tar -") == "x.tar"
    assert shard_name("https://h/x.tar?sig=1") == "x.tar"
    assert shard_name("/d/a 0.tar") == "a 0.tar"
    assert len(find_shards(f"{toy_data}/triplets/*")[0]) == 4  # what else lies there is left out
    with pytest.raises(InputError, match="must end in .tar"):
        stats_path("pipe:cat x")
    whole, _ = find_shards(f"pipe:cat {toy_data}/triplets/train-000000.tar")
    assert whole[0].stats.count == 24


def test_20_a_caption_that_is_not_utf8_is_left_out_and_named(tmp_path, capsys) -> None:
    photos = photographs(tmp_path / "photos", 2)
    (photos / "0.txt").write_bytes("un été".encode("latin-1"))
    (photos / "1.txt").write_bytes("\ufeffa blue mug".encode())
    data_gen_photos(photos, tmp_path / "out")
    stats = json.loads((tmp_path / "out/train-000000_stats.json").read_text())
    assert (stats["count"], stats["rejected"]) == (1, {"unreadable caption": 1})
    assert "0.txt" in capsys.readouterr().out
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        (member,) = [one for one in tar.getmembers() if re.search(r"\.json$", one.name)]
        told = json.loads(io.TextIOWrapper(tar.extractfile(member)).read())  # type: ignore[arg-type]
    assert told["caption"] == "a blue mug"
    assert hashlib.sha256((tmp_path / "out/train-000000.tar").read_bytes()).hexdigest() == stats["sha256"]
