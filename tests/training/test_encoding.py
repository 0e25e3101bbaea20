"""Shards encoded once by the frozen encoders: made, resumed, refused where they do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import QUIET, losses
from lightning.pytorch import Trainer

from data_gen.__main__ import main
from data_gen.__main__ import run as data_gen
from pig.data.modules import TripletDataModule
from pig.data.transforms import ReferenceAugmentation
from pig.errors import InputError
from pig.methods.bootpig import BootPIG


def test_encoding_resumes_and_refuses_to_mix(toy_data, encoded, capsys, monkeypatch) -> None:
    files = {path: path.stat().st_mtime_ns for path in encoded.glob("*.tar")}
    assert len(files) == 4
    torn = sorted(files)[1]
    before = torn.read_bytes()
    torn.with_name(torn.stem + "_stats.json").unlink()  # as if stopped in the midst of it
    torn.write_bytes(b"torn")
    command = ["encode", str(toy_data / "triplets"), "--base=toyworld", f"--out={encoded}", "--resolution=64"]
    data_gen(command)
    assert "3 of 4 shards are encoded; 24 samples to go" in capsys.readouterr().out
    assert torn.read_bytes() == before
    assert all(path.stat().st_mtime_ns == written for path, written in files.items() if path != torn)
    with pytest.raises(InputError, match="was made with another variants and augmentation"):
        data_gen([*command, "--variants=2"])
    with pytest.raises(InputError, match="encoded already"):
        data_gen([*command[:1], str(encoded), *command[2:3], f"--out={toy_data / 'twice'}"])
    (toy_data / "file").touch()
    with pytest.raises(InputError, match="is a file, not a folder"):
        data_gen([*command[:3], f"--out={toy_data / 'file'}"])
    monkeypatch.setattr("sys.argv", ["data_gen", *command, "--variants=1", "--augmentation.scale=[0.9,0.2]"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "augmentation.scale must satisfy" in capsys.readouterr().err
    with pytest.raises(InputError, match="the folder of the shards themselves"):
        data_gen([*command[:3], f"--out={toy_data / 'triplets'}"])


def test_encoded_shards_of_another_base_are_refused(toy_data, encoded) -> None:
    module = BootPIG("toyworld")
    data = TripletDataModule(str(encoded), batch_size=2, resolution=64, num_workers=0)
    batch = next(iter(data.train_dataloader()))
    losses(module, batch, 0.0, 0.0)
    other = BootPIG("toyworld")
    other.vae.encoder.conv_in.weight.data += 1e-3
    with pytest.raises(InputError, match="encoded by another base model"):
        losses(other, batch, 0.0, 0.0)
    data = TripletDataModule(
        str(toy_data / "triplets"), val_shards=str(encoded), batch_size=2, resolution=64, num_workers=0
    )
    with pytest.raises(InputError, match="encoded by another base model"):  # before the first step
        Trainer(max_steps=1, limit_val_batches=0, **QUIET).fit(other, data)
    with pytest.raises(InputError, match="encoded at 64 px, data.resolution is 128"):
        TripletDataModule(str(encoded), batch_size=2, resolution=128, num_workers=0).train_dataloader()
    both = TripletDataModule([str(encoded), str(toy_data / "triplets")], batch_size=2, resolution=64, num_workers=0)
    with pytest.raises(InputError, match="all be encoded in the same way, or not at all"):
        both.train_dataloader()


def test_variants_are_augmented_once_and_chosen_by_the_samples_seed(toy_data, tmp_path) -> None:
    command = ["encode", str(toy_data / "val"), "--base=toyworld", f"--out={tmp_path}", "--resolution=64", "--half"]
    data_gen([*command, "--variants=3", "--augmentation.scale=[0.6, 1.0]"])
    stats = json.loads(next(tmp_path.glob("*_stats.json")).read_text())["encoded"]
    assert (stats["variants"], stats["dtype"], stats["augmentation"]["scale"]) == (3, "float16", [0.6, 1.0])
    settings = {"batch_size": 8, "resolution": 64, "num_workers": 0}
    with pytest.raises(InputError, match="the references were encoded augmented by"):
        TripletDataModule(str(tmp_path), **settings).train_dataloader()
    data = TripletDataModule(str(tmp_path), **settings, augmentation=ReferenceAugmentation((0.6, 1.0)))
    loader, module = data.train_dataloader(), BootPIG("toyworld")
    first, second = (dict(zip(b.keys, b.reference, strict=True)) for b in (next(iter(loader)), next(iter(loader))))
    assert {one.shape for one in first.values()} == {(1, 8, 16, 16)}
    assert any(not torch.equal(first[key], second[key]) for key in first)  # another epoch, another variant
    assert losses(module, next(iter(loader)), 0.0, 0.0)[0].isfinite().all()
