"""Metrics and intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pig.data.subjects import prompt_kind
from pig.evaluation.metrics import SubjectFidelity, SubjectMean
from pig.evaluation.statistics import expanded_level, interval, sign_flip_p
from pig.toyworld import scene


def test_subject_mean_averages_within_subjects_first() -> None:
    metric = SubjectMean(3)
    metric.update(torch.tensor([1.0, 1.0, 1.0, 0.0]), 0)
    metric.update(torch.tensor([[0.25]]), 2)
    assert metric.compute() == pytest.approx((0.75 + 0.25) / 2)


def test_score_networks_tell_subjects_and_prompts_apart(toy_data, clip, dino) -> None:
    """Real against real is far above real against another subject of the category; CLIP finds the background."""
    rows = []
    for number in range(24):
        subject = scene.make_subject(scene.HELD_OUT_SEED + 500 + number, category="mug")
        pair = [scene.draw(subject, scene.training_background("mug", number + i), 10 * number + i) for i in range(2)]
        rows.append([Image.fromarray(drawing.image) for drawing in pair])
    first, second = dino.images([row[0] for row in rows]), dino.images([row[1] for row in rows])
    similarity = first @ second.T
    other = similarity[~torch.eye(24, dtype=torch.bool)]
    assert similarity.diagonal().mean() > 0.8
    assert other.mean() < 0.4
    texts = clip.texts([scene.caption("mug", name) for name in scene.BACKGROUNDS])
    found = (clip.images([row[0] for row in rows]) @ texts.T).argmax(1)
    wanted = [list(scene.BACKGROUNDS).index(scene.training_background("mug", number)) for number in range(24)]
    assert (found == torch.tensor(wanted)).float().mean() > 0.95


def test_percentiles_are_expanded() -> None:
    """To Phi(-t sqrt(n / (n - 1))) at either end: of 12, t = 2.201 and Phi(-2.299) = .0108, in place of .025."""
    assert (1 - expanded_level(12)) / 2 == pytest.approx(0.0108, abs=1e-4)
    assert expanded_level(10_000) == pytest.approx(0.95, abs=1e-4)


def test_intervals_resample_subjects() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.6, 0.2, 50)
    draws = np.sort([rng.choice(values, 50).mean() for _ in range(20_000)])
    low, high = interval(values)
    assert low == pytest.approx(draws[500], abs=0.005)
    assert high == pytest.approx(draws[19_499], abs=0.005)
    assert interval([0.5]) == (0.5, 0.5)
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def test_micro_means_and_ranks() -> None:
    metric = SubjectMean(3, by_subject=False)
    metric.update(torch.tensor([1.0, 1.0, 1.0, 0.0]), 0)
    metric.update(torch.tensor([[0.25]]), 2)
    assert metric.compute() == pytest.approx(3.25 / 5)


def features_of_rank(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2 + rank, 8, generator=generator), torch.randn(3, 8, generator=generator)


def reduce_in_ranks(rank: int, file: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    metric = SubjectFidelity(2)
    metric.update(*features_of_rank(rank), subject=rank)
    torch.save(metric.compute(), f"{results}{rank}")


def test_metrics_reduce_over_processes(tmp_path) -> None:
    told = (str(tmp_path / "meet"), str(tmp_path / "found"))
    torch.multiprocessing.start_processes(reduce_in_ranks, told, nprocs=2, start_method="fork")
    alone = SubjectFidelity(2)
    for rank in (0, 1):
        alone.update(*features_of_rank(rank), subject=rank)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"found{rank}") == pytest.approx(alone.compute())


def test_weighted_intervals_and_sign_flips() -> None:
    rng = np.random.default_rng(1)
    values, counts = rng.normal(0.6, 0.2, 40), rng.integers(1, 9, 40)
    picks = rng.integers(0, 40, (20_000, 40))
    draws = np.sort((values * counts)[picks].sum(1) / counts[picks].sum(1))
    assert interval(values, counts) == pytest.approx((draws[500], draws[19_499]), abs=0.005)
    # All signs of 6 differences: 2 of 64 give as large a mean as 6 equal ones.
    assert sign_flip_p([0.1] * 6) == pytest.approx(2 / 64)
    assert sign_flip_p([0.3, -0.3, 0.2, -0.2]) == 1.0
    assert sign_flip_p([0.3]) == 1.0
    differences = rng.normal(0.05, 0.2, 40)
    signs = rng.choice([-1, 1], (20_000, 40))
    expected = (np.abs((signs * differences).mean(1)) >= abs(differences.mean())).mean()
    assert sign_flip_p(differences) == pytest.approx(expected, abs=0.02)


def test_prompt_kinds() -> None:
    scenes = [
        "a {0} {1} in the jungle",
        "a photo of a {0} {1}, on a beach",
        "a {0} {1} on top of a purple rug in a forest",
    ]
    assert {prompt_kind(one) for one in scenes} == {"scene"}
    assert {prompt_kind(f"a {{0}} {{1}} {one}") for one in ("wearing a red hat", "in a police outfit")} == {"accessory"}
    assert {prompt_kind(one) for one in ("a red {0} {1}", "a cube shaped {0} {1}", "a wet {0} {1}")} == {"property"}
