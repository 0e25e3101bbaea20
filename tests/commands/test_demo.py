"""`make demo`: what it draws, from a model that is trained already."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from pig import demo
from pig.data.subjects import read_subjects
from pig.models.names import WEIGHTS


def test_it_announces_what_its_config_says() -> None:
    config = yaml.safe_load(Path(demo.CONFIG).read_text())
    assert config["trainer"]["max_steps"] == demo.TRAINING_STEPS
    assert config["data"]["init_args"]["batch_size"] == demo.BATCH_SIZE


def test_the_grid_shows_every_embedded_model(tmp_path, toy_data, monkeypatch) -> None:
    for settings in (demo.SAMPLING, demo.BASE, demo.OTHERS_SAMPLER):
        monkeypatch.setitem(settings, "num_inference_steps", 2)
    shutil.copytree(WEIGHTS / "bootpig", tmp_path / "export")
    subjects = read_subjects(toy_data / "subjects")[:2]
    demo.draw_all(tmp_path, subjects)
    demo.draw_grid(tmp_path, subjects)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"), dtype=int)
    conditions = ("no_reference", "untrained", "trained_1_reference", "trained_3_references", *demo.OTHERS)
    assert {"ezigen", "instantbooth", "ip_adapter"} == set(demo.OTHERS)
    drawn = {}
    for column, name in enumerate(conditions, 3):  # behind three references
        for row, job in enumerate(demo.grid_jobs(demo.held_out_jobs(subjects, demo.SEEDS))):
            file = demo.condition_folder(tmp_path, name) / job.subject.name / str(job.prompt_index) / f"{job.seed}.png"
            picture = np.asarray(Image.open(file).resize((128, 128), Image.Resampling.LANCZOS), dtype=int)
            top, left = 20 + 22 + row * 150, 22 + column * 150
            shown = sheet[top : top + 128, left : left + 128]
            assert np.abs(shown - picture).mean() < 3, (name, row)
            drawn[name, row] = picture
    assert all(np.abs(drawn[a, 0] - drawn[b, 0]).mean() > 3 for a in conditions for b in conditions if a < b)
