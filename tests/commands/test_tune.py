"""`tune`: many subjects, one model each, whatever interrupts the work; and `generate` by each subject's own weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import generate
from PIL import Image
from safetensors.torch import load_file
from trying import refused

from pig import cli
from pig.data.images import read_manifest
from pig.data.subjects import read_subjects
from pig.data.transforms import load_image
from pig.errors import InputError
from pig.methods import find_model, load_pipeline
from pig.models.names import WEIGHTS
from pig.sampling.delta import DELTA, kept_steps

NAMES = ("mug_006", "robot_007", "lamp_005", "vase_011")
PROMPTS = ("a photo of a {0} {1}, on a beach", "a photo of a {0} {1}, in space")


def config_in(folder: Path, steps: int = 4, save_at: tuple[int, ...] = (2,), **told: object) -> Path:
    """The toy world's config, short, with a checkpoint at every second step."""
    config = yaml.safe_load(Path("configs/dreambooth/toyworld.yaml").read_text())
    config["trainer"] |= {"max_steps": steps, "accelerator": "cpu"}
    config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 2
    config["model"]["init_args"] |= {"save_at": list(save_at), **told}
    config["data"]["init_args"]["prior"] |= {"folder": str(folder / "class_pictures"), "count": 2, "steps": 1}
    file = folder / "tuning.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def subjects_in(folder: Path, toy_data: Path, count: int) -> Path:
    """The first ones of NAMES, with two prompts."""
    folder.mkdir()
    for name in NAMES[:count]:
        shutil.copytree(toy_data / "subjects" / name, folder / name)
    classes = "\n".join(f"{name},{name.partition('_')[0]}" for name in NAMES[:count])
    prompts = ",\n".join(f"'{one}'.format(unique_token, class_token)" for one in PROMPTS)
    lists = "".join(f"{kind} Prompts\n\nprompt_list = [\n{prompts}\n]\n\n" for kind in ("Object", "Live Subject"))
    (folder / "prompts_and_classes.txt").write_text(f"Classes\n\nsubject_name,class\n{classes}\n\nPrompts\n\n{lists}")
    return folder


def words(config: Path, subjects: Path, out: Path, *more: str) -> list[str]:
    return ["tune", f"--config={config}", f"--subjects={subjects}", f"--out={out}", *more]


def run(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "pig.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(file.relative_to(out)): load_file(file) for file in sorted(out.rglob("delta.safetensors"))}


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for file in theirs:
        for name, one in theirs[file].items():
            assert torch.equal(ours[file][name], one), (file, name)


@pytest.fixture(scope="module")
def tuned(toy_data, tmp_path_factory) -> Path:
    """`subjects`, `out` (two of them, tuned), `tuning.yaml`."""
    folder = tmp_path_factory.mktemp("tuned")
    subjects = subjects_in(folder / "subjects", toy_data, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pig.cli", *words(config_in(folder), subjects, folder / "out")])
        cli.main()
    return folder


@pytest.mark.slow
def test_each_subject_has_its_own_steps(tuned) -> None:
    for name in NAMES[:2]:
        assert list(kept_steps(tuned / "out" / name)) == [2, 4]
        assert not (tuned / "out" / name / "fit/checkpoints").exists()
    one, other = (load_file(tuned / "out" / name / "step-000004/delta.safetensors") for name in NAMES[:2])
    assert not torch.equal(one["net.unet.conv_in.weight"], other["net.unet.conv_in.weight"])
    told = json.loads((tuned / "out" / NAMES[0] / "step-000004" / DELTA).read_text())
    assert (told["method"], told["base"]) == ("dreambooth", "toyworld")


def test_what_is_finished_is_not_tuned_again(tuned, monkeypatch, capsys) -> None:
    file = tuned / "out" / NAMES[0] / "step-000004/delta.safetensors"
    before = file.stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["pig.cli", *words(tuned / "tuning.yaml", tuned / "subjects", tuned / "out")])
    cli.main()
    assert "2 subjects, 2 finished already" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == before


def test_each_subject_is_drawn_by_its_own_weights(tuned, tmp_path, monkeypatch) -> None:
    """In one process, base parts loaded once: the very pixels of each subject's own model."""
    given = {"subjects": tuned / "subjects", "images_per_prompt": 1, "steps": 3}
    generate(tmp_path / "images", str(tuned / "out"), **given, step=2)
    assert len(read_manifest(tmp_path / "images")) == 4
    for name in NAMES[:2]:
        pipeline = load_pipeline(tuned / "out" / name / "step-000002", "cpu")
        pipeline.set_progress_bar_config(disable=True)
        noun = name.partition("_")[0]
        for index, template in enumerate(PROMPTS):
            prompt = " ".join(template.format("", noun).split())
            told = {"class_noun": noun, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
            (expected,) = pipeline(prompt, **told).images
            found = load_image(tmp_path / f"images/{name}/{index}/0.png")
            assert max(abs(a - b) for a, b in zip(found.tobytes(), expected.tobytes(), strict=True)) <= 1
    # The last step by default; a finished folder is not mixed with it.
    generate(tmp_path / "last", str(tuned / "out"), **given)
    then, now = (read_manifest(tmp_path / name) for name in ("images", "last"))
    file = f"{NAMES[0]}/0/0.png"
    assert then[file]["settings"]["model"] != now[file]["settings"]["model"]
    with pytest.raises(InputError, match="drawn otherwise: .* with model="):
        generate(tmp_path / "images", str(tuned / "out"), **given)


def test_bad_input_of_tune(tuned, toy_data, tmp_path, monkeypatch, capsys) -> None:
    config, out = tuned / "tuning.yaml", tmp_path / "out"
    alone = tmp_path / "alone"
    shutil.copytree(tuned / "subjects", alone)
    for picture in read_subjects(alone)[0].images[1:]:
        picture.unlink()
    no_noun = tmp_path / "nameless"
    shutil.copytree(toy_data / "subjects" / NAMES[0], no_noun)
    for given, message in (
        (
            words(config, tuned / "subjects", tuned / "out", "--model.lr=1e-3"),
            "was begun with model.init_args.lr=0.0005",
        ),
        (words(config, tuned / "subjects", out, "--model.identifier=zwx"), "'zwx' is 3 tokens"),
        (words(config, tuned / "subjects", out, "--model.save_at=[9]"), "step 9 lies behind trainer.max_steps=4"),
        (words(config, tuned / "subjects", out, "--shard=2/2"), "--shard must be I/N"),
        (words(config, tuned / "subjects", out, "--workers=0"), "--workers and --threads"),
        (words(config, tuned / "subjects", out, "--data.class_noun=dog"), "--data.class_noun is for `fit`"),
        (words(config, tmp_path / "none", out), "there is no subjects folder"),
        (words(config, alone, out), "holds one picture"),
        (["fit", f"--config={config}"], "which subject"),
        (["fit", f"--config={config}", f"--data.subject={no_noun}"], "Set data.class_noun"),
        (["fit", f"--config={config}", f"--data.subject={tmp_path / 'gone'}"], "there is no subject's folder"),
    ):
        assert message in refused(monkeypatch, capsys, *given), given
    assert not out.exists()


def test_a_method_without_subjects_is_refused(tuned, tmp_path, monkeypatch, capsys) -> None:
    given = words(Path("configs/bootpig/toyworld.yaml"), tuned / "subjects", tmp_path / "out")
    assert "tune is for methods that are tuned on one subject" in refused(monkeypatch, capsys, *given)


def test_bad_input_of_generate(tuned, toy_data, tmp_path, monkeypatch, capsys) -> None:
    model = str(tuned / "out")
    one = ["generate", "--out", str(tmp_path / "images"), "--model"]
    benchmark = ["--subjects", str(tuned / "subjects")]
    for given, message in (
        ([*one, model, *benchmark, "--step", "3"], "--step 3 was not kept of mug_006; there are: 2, 4"),
        ([*one, model, "--subjects", str(toy_data / "subjects")], "no weights of the subject"),
        ([*one, model, "--prompt", "a mug", "--class_noun", "mug"], "holds several subjects"),
        ([*one, f"{model}/{NAMES[0]}", "--prompt", "a mug"], "several steps of one subject"),
        ([*one, "toyworld", *benchmark, "--step", "2"], "--step is for a folder made by `tune`"),
        ([*one, "toyworld", *benchmark, "--workers", "0"], "--workers must be at least 1"),
    ):
        assert message in refused(monkeypatch, capsys, *given), given


def test_another_base_than_the_tuned_one(tuned, toy_data, tmp_path) -> None:
    out = tmp_path / "out"
    shutil.copytree(tuned / "out", out)
    base = tmp_path / "base"
    shutil.copytree(WEIGHTS / "base", base)
    config = json.loads((base / "scheduler/scheduler_config.json").read_text())
    (base / "scheduler/scheduler_config.json").write_text(json.dumps({**config, "beta_start": 0.001}))
    for file in out.rglob(DELTA):
        file.write_text(json.dumps({**json.loads(file.read_text()), "base": str(base)}))
    with pytest.raises(InputError, match="was trained on another base model"):
        generate(tmp_path / "images", str(out), subjects=tuned / "subjects", images_per_prompt=1, steps=1)
    file = out / NAMES[1] / "step-000004" / DELTA
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_digest": "0" * 64}))
    with pytest.raises(InputError, match="several methods, base models or settings"):
        generate(tmp_path / "images", str(out), subjects=tuned / "subjects", images_per_prompt=1, steps=1)
    assert find_model(out).tuned


@pytest.mark.slow
def test_a_failed_subject_is_named_and_stops_no_other(tuned, tmp_path, monkeypatch, capsys) -> None:
    torn = tmp_path / "out" / NAMES[0] / "fit/checkpoints/last.ckpt"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    said = refused(monkeypatch, capsys, *words(config_in(tmp_path), tuned / "subjects", tmp_path / "out"))
    assert f"{NAMES[0]} failed: {torn} is no checkpoint, or a torn one" in said
    assert list(kept_steps(tmp_path / "out" / NAMES[1])) == [2, 4]


def test_other_pictures_under_the_same_name_are_refused(tuned, tmp_path, monkeypatch, capsys) -> None:
    subjects = tmp_path / "subjects"
    shutil.copytree(tuned / "subjects", subjects)
    first, other = (read_subjects(subjects)[at].images[0] for at in (0, 1))
    shutil.copy(other, first)
    said = refused(monkeypatch, capsys, *words(tuned / "tuning.yaml", subjects, tuned / "out"))
    assert f"{NAMES[0]} was begun with pictures=" in said
    nothing = words(tuned / "tuning.yaml", tuned / "subjects", tuned / "out", "--shard=0/5")
    monkeypatch.setattr(sys, "argv", ["pig.cli", *nothing])
    cli.main()
    assert "no subject is in part 0/5" in capsys.readouterr().out


def test_subjects_that_are_behind_or_torn_are_refused(tuned, tmp_path) -> None:
    out, given = tmp_path / "out", {"subjects": tuned / "subjects", "images_per_prompt": 1, "steps": 1}
    shutil.copytree(tuned / "out", out)
    file = out / NAMES[1] / "step-000004/delta.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="delta.safetensors is torn"):
        generate(tmp_path / "images", str(out), **given)
    shutil.rmtree(file.parent)
    with pytest.raises(InputError, match=rf"behind are {NAMES[1]} \(step-000002\)"):
        generate(tmp_path / "images", str(out), **given)
    assert not (tmp_path / "images").exists()


@pytest.mark.slow
def test_a_lost_worker_costs_its_own_subject_only(toy_data, tmp_path) -> None:
    subjects, out = subjects_in(tmp_path / "subjects", toy_data, 3), tmp_path / "out"
    config = config_in(tmp_path, steps=40)
    command = [sys.executable, "-m", "pig.cli", *words(config, subjects, out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not (out / NAMES[0] / "step-000002").exists():
        assert process.poll() is None
        time.sleep(0.05)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert f"{NAMES[0]} failed: a worker died" in said
    assert [40 in kept_steps(out / name) for name in NAMES[:3]] == [False, True, True]
    run(*words(config, subjects, out))
    assert all(40 in kept_steps(out / name) for name in NAMES[:3])


@pytest.mark.slow
def test_stopped_by_ctrl_c(tuned, toy_data, tmp_path) -> None:
    """As a terminal sends it: to the command and its workers."""
    subjects, out = subjects_in(tmp_path / "subjects", toy_data, 3), tmp_path / "out"
    command = [sys.executable, "-m", "pig.cli", *words(config_in(tmp_path, steps=4000), subjects, out)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells' background jobs ignore it
    )
    while not (out / NAMES[0] / "step-000002").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("stopped; what was finished is kept\n")
    assert "Traceback" not in said


@pytest.mark.slow
def test_two_on_one_output(tuned, toy_data, tmp_path) -> None:
    """The second is refused where the first one works, and breaks nothing."""
    command = [sys.executable, "-m", "pig.cli", *words(config_in(tmp_path), tuned / "subjects", tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode in (0, 2), said
        assert process.returncode == 0 or "another run is writing into" in said
    run(*command[3:])
    assert_same(tmp_path / "out", tuned / "out")


@pytest.mark.slow
def test_killed_twice_by_any_workers_the_same_weights(toy_data, tmp_path) -> None:
    subjects, config = subjects_in(tmp_path / "subjects", toy_data, 4), config_in(tmp_path, steps=12, save_at=(6,))
    run(*words(config, subjects, tmp_path / "whole"))
    run(*words(config, subjects, tmp_path / "two", "--workers=2"))
    run(*words(config, subjects, tmp_path / "ray", "--workers=2", "--executor=ray"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    killed = tmp_path / "killed"
    for wanted in (1, 3):  # subjects that have kept a step
        command = [sys.executable, "-m", "pig.cli", *words(config, subjects, killed)]
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while sum(bool(kept_steps(killed / name)) for name in NAMES) < wanted and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not all(12 in kept_steps(killed / name) for name in NAMES)
    run(*words(config, subjects, killed))
    for name in ("two", "ray", "killed"):
        assert_same(tmp_path / name, tmp_path / "whole")


@pytest.mark.slow
def test_workers_draw_the_same_pictures(tuned, tmp_path) -> None:
    given = ["generate", "--model", str(tuned / "out"), "--subjects", str(tuned / "subjects"), "--steps", "3"]
    whole, two, ray = (tmp_path / name for name in ("whole", "two", "ray"))
    run(*given, "--out", str(whole))
    run(*given, "--out", str(two), "--workers", "2")
    assert read_manifest(two) == read_manifest(whole)
    shutil.copytree(two, ray)
    lost = [ray / NAMES[0] / "0/1.png", ray / NAMES[1] / "1/3.png"]
    lost[0].unlink()
    lost[1].write_bytes(b"torn")
    run(*given, "--out", str(ray), "--workers", "2", "--executor", "ray")
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.png"))
    assert len(files) == 16
    for other in (two, ray):
        for file in files:
            a, b = (Image.open(folder / file).tobytes() for folder in (whole, other))
            assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1, (other, file)
