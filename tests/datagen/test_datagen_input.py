"""What users of data generation get wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from chains import CONFIG, config_for
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
)

from data_gen import images
from data_gen.captions import make_captions
from data_gen.config import ImagesConfig, load_config
from data_gen.run import generate
from data_gen.samples import Sample, read_lines, write_samples
from data_gen.shards import ShardMaker
from pig.errors import InputError
from pig.models.names import WEIGHTS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["captions.cuont=3"], r"unknown key.*did you mean captions\.count"),
        (["images.size=sixty"], "sixty"),
        (["images.size=60"], "divisible by 8"),
        (["executor=slurm"], "executor must be one of local, ray"),
        (["workers=0"], "workers must be at least 1"),
        (["quality.max_area=2"], r"quality\.max_area is a share"),
        (["captions.captioner=chat"], r"captions\.captioner=chat needs captions\.model"),
        (["masks.method=grounded"], r"masks\.method=grounded needs masks\.detector"),
        (["seed=-1"], "seed must be at least 0"),
        (["images.guidance=nan"], r"images\.guidance must be at least 0"),
        (["quality.min_area=0.8"], r"quality\.min_area=0\.8 must be below"),
        (["captions.base_url=http://me:word@host/v1"], "name or password"),
        (["captions.count=[3"], "toyworld.yaml"),
    ],
)
def test_a_bad_config_is_refused(overrides, message) -> None:
    with pytest.raises(InputError, match=message):
        load_config(CONFIG, overrides)


def test_what_must_be_set_is_named(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("captions: {count: 3}\n")
    with pytest.raises(InputError, match=r"images\.model must be set"):
        load_config(tmp_path / "config.yaml", [])
    with pytest.raises(InputError, match=r"no such config: .*none\.yaml"):
        load_config(tmp_path / "none.yaml", [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["captions.count=100000"], "the grammar has 1404 captions"),
        (["images.model=/no/such/model"], r"cannot load images\.model='/no/such/model'"),
        (["masks.sam=/no/such/sam"], "there is no SAM '/no/such/sam'"),
        (["quality.clip=/no/such/clip"], "cannot load a CLIPModel from '/no/such/clip'"),
    ],
)
def test_what_the_machine_lacks_is_said_before_any_work(tmp_path, overrides, message) -> None:
    with pytest.raises(InputError, match=message):
        generate(config_for(tmp_path, *overrides))
    assert not (tmp_path / "work").exists()


def test_exit_codes_of_the_command(tmp_path) -> None:
    command = [sys.executable, "-m", "data_gen", str(CONFIG), f"output={tmp_path}", "captions.cuont=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown key 'captions.cuont'")


def test_every_datagen_config_loads() -> None:
    for file in CONFIG.parent.glob("*.yaml"):
        assert load_config(file, []).captions.count > 0
    paper = load_config(CONFIG.parent / "sd21.yaml", [])
    assert (paper.captions.count, paper.quality.border) == (200_000, 25)


def test_a_phrase_that_is_never_found_is_dropped_and_counted(tmp_path) -> None:
    config = config_for(tmp_path, "captions.count=3", "masks.pred_iou_thresh=0.99999")
    make_captions(tmp_path, config.captions, seed=0)
    report = ShardMaker(config, "cpu").make(0)
    assert report.count == 0
    assert report.rejected == {"no object": 6, "dropped after all attempts": 3}


@pytest.mark.slow
def test_a_run_in_which_nothing_passes_ends_with_the_reasons(tmp_path) -> None:
    config = config_for(tmp_path, "captions.count=3", "images.steps=1", "quality.min_caption_score=0.99")
    for _ in range(2):  # started again, it says the same
        with pytest.raises(InputError, match=r"not one of the first 3 samples passed: .*after all attempts': 3"):
            generate(config)


def test_what_the_safety_checker_blanks_is_rejected(tmp_path) -> None:
    """A checkpoint with a safety checker, a small random one, whose every concept is made to hold."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**size, "image_size": 32, "patch_size": 16, "projection_dim": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=size, projection_dim=16))
    checker.concept_embeds_weights.data.fill_(-1.0)
    base = StableDiffusionPipeline.from_pretrained(WEIGHTS / "base", dtype=torch.float32)
    base.register_modules(
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    base.save_pretrained(tmp_path / "model")
    folder, config = tmp_path / "folder", ImagesConfig(model=str(tmp_path / "model"), size=64, steps=1)
    write_samples(folder, [Sample("0", "a photo of a mug, on a beach", "mug", 0)])
    images.draw_images(folder, images.Painter(config, "cpu"), config, lambda _: None)
    assert read_lines(folder / images.DONE) == [{"key": "0", "unsafe": True}]
