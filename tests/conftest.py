"""Real classes at tiny size; nothing is mocked."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from data_gen.__main__ import run as data_gen
from data_gen.toyworld import draw_subjects, draw_triplets
from pig.commands import generate as commands
from pig.commands import options
from pig.data.schema import Batch
from pig.methods import load_pipeline
from pig.methods.bootpig import BootPIG, BootPIGPipeline, TwoUNet
from pig.models.backbone import half_is_fast
from pig.models.cutting_out import CuttingOut

pytest_plugins = ["benches", "chains", "drawing"]  # their fixtures

# Where products in bfloat16 have no instructions, what takes seconds takes many minutes.
fast_half = pytest.mark.skipif(not half_is_fast("cpu"), reason="this CPU has no bfloat16 instructions")

# A Trainer that leaves nothing behind.
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


def embedded() -> BootPIGPipeline:
    """The BootPIG that ships with the package."""
    pipeline = load_pipeline("toyworld", "cpu")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, BootPIGPipeline)
    return pipeline


def losses(module: BootPIG, batch: Batch, reference: float, caption: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and timestep of each sample at these dropouts."""
    module.dropout = {"reference": reference, "caption": caption}
    return module.losses(batch, training=True)


def generate(out: Path, model: str = "toyworld", **flags: Any) -> None:
    """`generate` with the flags of its command line."""
    groups = {
        name: kind(**{one.name: flags.pop(one.name) for one in dataclasses.fields(kind) if one.name in flags})
        for name, kind in (
            ("what", options.Subjects),
            ("cutting_out", CuttingOut),
            ("output", options.Output),
        )
    }
    commands.generate(out, model, **groups, settings=flags)


def tiny_unet(*, linear: bool = False, heads: int | tuple[int, ...] = 2, seed: int = 0) -> UNet2DConditionModel:
    """SD's layout in miniature: three levels, cross-attention in two and in the middle."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=heads,
        use_linear_projection=linear,
        norm_num_groups=8,
    )


def tiny_two_unet(**options: object) -> TwoUNet:
    """Base and Reference UNet that differ, as after training."""
    return TwoUNet(tiny_unet(seed=0), tiny_unet(seed=1), **options)  # type: ignore[arg-type]


@pytest.fixture(params=[False, True], ids=["sd1-conv", "sd2-linear"])
def base_unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    return tiny_unet(linear=request.param, heads=(2, 4, 4) if request.param else 2)


@pytest.fixture
def two_unet(base_unet: UNet2DConditionModel) -> TwoUNet:
    return TwoUNet(copy.deepcopy(base_unet), copy.deepcopy(base_unet))


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """B = 3, K = 2."""
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(3, 4, 8, 8, generator=generator),
        "reference": torch.randn(3, 2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([10, 500, 990]),
        "text": torch.randn(3, 5, 16, generator=generator),
    }


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`triplets/` (96 in 4 shards), `val/` (8) and `subjects/` (12)."""
    folder = tmp_path_factory.mktemp("toy")
    draw_triplets(folder / "triplets", 96, 64, per_shard=24)
    draw_triplets(folder / "val", 8, 64, first_seed=2_000_000_000)
    draw_subjects(folder / "subjects", 12, 64)
    return folder


@pytest.fixture(scope="session")
def encoded(toy_data: Path) -> Path:
    """`triplets/` as the toy model's encoders see them; references untouched."""
    out = toy_data / "encoded"
    data_gen(["encode", str(toy_data / "triplets"), "--base=toyworld", f"--out={out}", "--resolution=64"])
    return out
