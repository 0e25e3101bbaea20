"""Our scores equal an independent computation: PIL, numpy, transformers, open_clip and timm called directly."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_networks import (
    OPEN_CLIP_SHAPE,
    SUBJECTS,
    TIMM_SHAPE,
    noise,
    save_benchmark,
    save_clip,
    save_dino,
    save_open_clip,
    save_timm_dino,
)
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, ViTModel

from pig.data.subjects import read_subjects
from pig.errors import InputError
from pig.evaluation.benchmark import Scorer
from pig.evaluation.protocols import PROTOCOLS, protocol_named
from pig.evaluation.results import Result
from pig.models.encoders import is_openai_file, load_clip, load_dino

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
DINO_MEAN, DINO_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreement")
    save_benchmark(folder)
    save_clip(folder / "clip")
    save_open_clip(folder / "open_clip")
    save_dino(folder / "dino")
    save_timm_dino(folder / "timm")
    return folder


def pixels(picture: Image.Image, resize: int, mean: list[float], std: list[float], floor: bool = False) -> np.ndarray:
    """(3, 224, 224): shorter side to `resize` (bicubic), centre crop 224, standardised; by PIL and numpy alone."""
    width, height = picture.size
    short = min(width, height)
    picture = picture.resize((int(resize * width / short), int(resize * height / short)), Image.Resampling.BICUBIC)
    # torchvision, of which DINO and open_clip are made, rounds half a pixel to even; transformers rounds down.
    half = (lambda margin: margin // 2) if floor else (lambda margin: round(margin / 2))
    left, top = half(picture.width - 224), half(picture.height - 224)
    return standardised(picture.crop((left, top, left + 224, top + 224)), mean, std)


def squeezed(picture: Image.Image, how: int) -> np.ndarray:
    return standardised(picture.resize((224, 224), Image.Resampling(how)), DINO_MEAN, DINO_STD)


def standardised(picture: Image.Image, mean: list[float], std: list[float]) -> np.ndarray:
    return ((np.asarray(picture, dtype=np.float64) / 255 - mean) / std).transpose(2, 0, 1)


def batch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).float()[None]


def unit(feature: torch.Tensor) -> torch.Tensor:
    return feature / feature.norm()


@pytest.mark.parametrize("size", [(300, 200), (199, 301), (224, 224), (50, 640), (257, 256)])
@pytest.mark.parametrize("resample", [2, 3])
def test_preprocessing_pixel_by_pixel(folder, tmp_path, size, resample) -> None:
    picture = noise(np.random.default_rng(1), size)
    clip, dino = load_clip(folder / "clip"), load_dino(folder / "dino")
    expected = pixels(picture, 224, CLIP_MEAN, CLIP_STD, floor=True)
    ours = clip.preprocessing.standardise(clip.prepare(picture)[None])
    np.testing.assert_allclose(ours[0], expected, atol=1e-6)
    processor = CLIPImageProcessorPil()(picture, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(processor, expected, atol=2e-6)  # transformers' own agrees
    ours = dino.preprocessing.standardise(dino.prepare(picture)[None])
    np.testing.assert_allclose(ours[0], pixels(picture, 256, DINO_MEAN, DINO_STD), atol=1e-6)
    direct = load_dino(save_dino(tmp_path / "dino", resample=resample), crop=False)
    ours = direct.preprocessing.standardise(direct.prepare(picture)[None])
    np.testing.assert_allclose(ours[0], squeezed(picture, resample), atol=1e-6)


class Transformers:
    """Features of one picture or text, by transformers alone."""

    def __init__(self, folder: Path, crop: bool) -> None:
        self.clip = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "clip")
        self.vit = ViTModel.from_pretrained(folder / "dino", dtype=torch.float32, add_pooling_layer=False).eval()
        self.crop = crop

    def clip_image(self, picture: Image.Image) -> torch.Tensor:
        found = self.clip.vision_model(batch(pixels(picture, 224, CLIP_MEAN, CLIP_STD, floor=True)))[1]
        return unit(self.clip.visual_projection(found)[0])

    def clip_text(self, text: str) -> torch.Tensor:
        length = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer([text], padding="max_length", max_length=length, return_tensors="pt").input_ids
        return unit(self.clip.text_projection(self.clip.text_model(ids)[1])[0])

    def dino_image(self, picture: Image.Image) -> torch.Tensor:
        prepared = pixels(picture, 256, DINO_MEAN, DINO_STD) if self.crop else squeezed(picture, 2)
        return unit(self.vit(batch(prepared)).last_hidden_state[0, 0])


class OpenClipAndTimm:
    """The same by open_clip and timm alone."""

    def __init__(self, folder: Path, crop: bool) -> None:
        self.clip = open_clip.CLIP(**OPEN_CLIP_SHAPE).eval()
        self.clip.load_state_dict(torch.load(folder / "open_clip/open_clip_pytorch_model.bin"))
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32")
        self.vit = timm.create_model("vit_small_patch16_224", num_classes=0, **TIMM_SHAPE).eval()
        timm.models.load_checkpoint(self.vit, str(folder / "timm/model.safetensors"))
        self.crop = crop

    def clip_image(self, picture: Image.Image) -> torch.Tensor:
        return unit(self.clip.encode_image(batch(pixels(picture, 224, CLIP_MEAN, CLIP_STD)))[0])

    def clip_text(self, text: str) -> torch.Tensor:
        return unit(self.clip.encode_text(self.tokenizer([text]))[0])

    def dino_image(self, picture: Image.Image) -> torch.Tensor:
        prepared = pixels(picture, 256, DINO_MEAN, DINO_STD) if self.crop else squeezed(picture, 3)
        return unit(self.vit(batch(prepared))[0])  # timm pools ViTs by their class token


PROMPTS = {
    "can": ["a {}can in the jungle", "a {}can on the beach", "a red {}can"],
    "dog2": ["a {}dog in the jungle", "a {}dog wearing a red hat", "a red {}dog"],
    "robot_toy": ["a {}toy in the jungle", "a {}toy on the beach", "a red {}toy"],
}


@torch.no_grad()
def plain_scores(folder: Path, networks: Transformers | OpenClipAndTimm, protocol: str) -> dict[str, float]:
    """DreamBooth's definitions and each deviation, by plain loops over files."""
    files = [*folder.glob("subjects/*/*.png"), *folder.glob("images/*/*/*.png")]
    seen_by_clip = {file: networks.clip_image(Image.open(file)) for file in files}
    seen_by_dino = {file: networks.dino_image(Image.open(file)) for file in files}
    found: dict[str, list[list[float]]] = {"clip_t": [], "clip_i": [], "dino": []}
    for name, _, _, _ in SUBJECTS:
        photographs = sorted((folder / "subjects" / name).glob("*.png"))
        if protocol == "first_reference":
            photographs = photographs[:1]
        values: dict[str, list[float]] = {score: [] for score in found}
        for index, template in enumerate(PROMPTS[name]):
            files = sorted((folder / "images" / name / str(index)).glob("*.png"))
            for file in files[:1] if protocol == "one_image" else files:
                text = template.format("sks " if protocol == "identifier" else "")
                cosine = float(seen_by_clip[file] @ networks.clip_text(text))
                values["clip_t"].append(cosine * (2.5 if protocol == "clip_t_x2.5" else 1))
                for real in photographs:
                    values["clip_i"].append(float(seen_by_clip[file] @ seen_by_clip[real]))
                    values["dino"].append(float(seen_by_dino[file] @ seen_by_dino[real]))
        for score, of in values.items():
            found[score].append(of)
    if protocol == "micro":
        return {score: float(np.mean(np.concatenate(of))) for score, of in found.items()}
    return {score: float(np.mean([np.mean(one) for one in of])) for score, of in found.items()}


def score(folder: Path, out: Path, protocol: str, clip: str, dino: str, **options) -> Result:
    rules = protocol_named(protocol)
    networks = load_clip(folder / clip), load_dino(folder / dino, crop=rules.crop)
    return Scorer(*networks, out, rules, **options).score(folder / "images", read_subjects(folder / "subjects"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("format_", ["transformers", "open_clip and timm"])
def test_scores_equal_plain_loops(folder, tmp_path, protocol, format_) -> None:
    crop = protocol not in ("dino_direct_224", "dreambench_plus_dino8")
    if format_ == "transformers":
        expected = plain_scores(folder, Transformers(folder, crop), protocol)
        result = score(folder, tmp_path, protocol, "clip", "dino")
    else:
        expected = plain_scores(folder, OpenClipAndTimm(folder, crop), protocol)
        result = score(folder, tmp_path, protocol, "open_clip", "timm")
    assert result.protocol == protocol
    for name, value in expected.items():
        assert result.scores[name]["mean"] == pytest.approx(value, abs=1e-5), name
        assert result.scores[name]["low"] <= result.scores[name]["mean"] <= result.scores[name]["high"]


def test_each_protocol_gives_other_numbers_and_another_hash(folder, tmp_path) -> None:
    """So that no option is without effect."""
    results = {name: score(folder, tmp_path / name, name, "clip", "dino") for name in PROTOCOLS}
    assert len({result.hash for result in results.values()}) == len(PROTOCOLS)
    seen = {
        name: tuple(result.scores[s]["mean"] for s in ("clip_t", "clip_i", "dino")) for name, result in results.items()
    }
    for (name, one), (other, two) in combinations(seen.items(), 2):
        if {name, other} != {"dino_direct_224", "dreambench_plus_dino8"}:  # these mean another network
            assert one != pytest.approx(two, abs=1e-6), (name, other)


@torch.no_grad()
def test_every_single_score_and_the_bounds(folder, tmp_path) -> None:
    result, plain = score(folder, tmp_path, "dreambooth", "clip", "dino"), Transformers(folder, crop=True)
    photographs = {
        name: [Image.open(path) for path in sorted((folder / "subjects" / name).glob("*.png"))] for name, *_ in SUBJECTS
    }
    assert len(result.images) == 18
    for image in result.images:
        picture = Image.open(folder / "images" / image["file"])
        each = [float(plain.dino_image(picture) @ plain.dino_image(one)) for one in photographs[image["subject"]]]
        assert image["dino_each"] == pytest.approx(each, abs=1e-5)
        assert image["nearest"] == f"{int(np.argmax(each)):02d}.png"
        other = Image.open(folder / f"images/{image['subject']}/{image['prompt_index']}/{1 - int(image['seed'])}.png")
        cosine = float(plain.dino_image(picture) @ plain.dino_image(other))
        assert image["diversity"] == pytest.approx(1 - cosine, abs=1e-5)
    assert [image["kind"] for image in result.images[6:12]] == ["scene"] * 2 + ["accessory"] * 2 + ["property"] * 2
    assert {image["subject"] for image in result.images if image["live"]} == {"dog2"}
    real = []
    for of in list(photographs.values())[:2]:  # the last one has a single photograph: nothing to compare it with
        features = [plain.clip_image(one) for one in of]
        real.append(np.mean([float(a @ b) for a, b in combinations(features, 2)]))
    assert result.bounds["real"]["clip_i"]["mean"] == pytest.approx(np.mean(real), abs=1e-5)
    copies, texts = [], []
    for name, of in photographs.items():
        first = plain.clip_image(of[0])
        copies.append(np.mean([float(first @ plain.clip_image(one)) for one in of]))
        texts.append(np.mean([float(first @ plain.clip_text(one.format(""))) for one in PROMPTS[name]]))
    assert result.bounds["copy"]["clip_i"]["mean"] == pytest.approx(np.mean(copies), abs=1e-5)
    assert result.bounds["copy"]["clip_t"]["mean"] == pytest.approx(np.mean(texts), abs=1e-5)
    without = [
        np.mean([i["clip_t"] for i in result.images if i["subject"] == n and i["kind"] != "property"]) for n in PROMPTS
    ]
    assert result.scores["clip_t_without_property"]["mean"] == pytest.approx(np.mean(without), abs=1e-9)
    assert set(result.groups) == {"live", "object", "scene", "accessory", "property", "seed 0", "seed 1"}


def test_nothing_but_the_pictures_counts(folder, tmp_path) -> None:
    """Neither the batch size, nor the order of files, nor PNG against in-memory."""
    once = score(folder, tmp_path / "a", "dreambooth", "clip", "dino", batch_size=1)
    again = score(folder, tmp_path / "b", "dreambooth", "clip", "dino", batch_size=13)
    assert once.hash == again.hash
    for name, found in once.scores.items():
        assert again.scores[name]["mean"] == pytest.approx(found["mean"], abs=1e-6), name
    clip = load_clip(folder / "clip")
    picture = noise(np.random.default_rng(5), (100, 100))
    picture.save(tmp_path / "one.png")
    assert torch.equal(clip.images([picture]), clip.images([Image.open(tmp_path / "one.png")]))
    three = clip.images([picture, picture.rotate(90), picture])
    torch.testing.assert_close(three[[0, 2]], clip.images([picture]).expand(2, -1), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_two_processes_find_the_same(folder, tmp_path) -> None:
    """Two gloo ranks look at half of the pictures each, as `torchrun` starts them."""
    command = ["-m", "pig.cli", "evaluate", f"--images={folder / 'images'}", f"--subjects={folder / 'subjects'}"]
    command += [f"--clip={folder / 'clip'}", f"--dino={folder / 'dino'}", "--batch_size=4"]
    one = score(folder, tmp_path, "dreambooth", "clip", "dino")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29713"]
    ran = subprocess.run(
        [sys.executable, *launch, *command, f"--out={tmp_path / 'two'}"], check=False, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    two = json.loads((tmp_path / "two/results.json").read_text())
    assert one.hash == two["hash"]
    assert len(list((tmp_path / "two/embeddings").rglob("*.safetensors"))) >= 6  # batches of 4
    for name, found in one.scores.items():
        assert two["scores"][name]["mean"] == pytest.approx(found["mean"], abs=1e-6), name


def test_openai_weights_need_quick_gelu(tmp_path, monkeypatch) -> None:
    right = load_clip(save_clip(tmp_path / "openai-clip"))
    assert right.identity["activation"] == "QuickGELU"
    with pytest.raises(InputError, match=r"openai-gelu.*QuickGELU.*hidden_act"):
        load_clip(save_clip(tmp_path / "openai-gelu", "gelu"))
    assert load_clip(save_clip(tmp_path / "laion", "gelu")).identity["activation"] == "GELU"
    for place in ("openai/clip-vit-base-patch32", "models--openai--clip-vit-base-patch32/snapshots/abc"):
        with pytest.raises(InputError, match="QuickGELU, under GELU"):
            load_clip(save_clip(tmp_path / place, "gelu"))
    config = json.loads((tmp_path / "openai-clip/config.json").read_text())
    config["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "openai-clip/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="under GELU and QuickGELU"):
        load_clip(tmp_path / "openai-clip")
    assert load_clip(save_open_clip(tmp_path / "openai-open")).identity["activation"] == "QuickGELU"
    with pytest.raises(InputError, match=r"QuickGELU, under GELU: take the model's name that ends in -quickgelu"):
        load_clip(save_open_clip(tmp_path / "openai-wrong", quick_gelu=False))
    # OpenAI's own file is known by its sha256, whatever it is called.
    file = tmp_path / "weights.pt"
    file.write_bytes(b"as if")
    assert not is_openai_file(str(file))
    digest = "df0d3e9a5afcc8f1f9f3ea8b0b3c8b5e"
    monkeypatch.setattr(open_clip, "get_pretrained_url", lambda model, tag: f"https://x/{sha256_of(file)}/ViT.pt")
    assert is_openai_file(str(file)), digest


def sha256_of(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_networks_are_known_by_their_weights(folder, tmp_path) -> None:
    one, again = load_dino(folder / "dino").identity, load_dino(folder / "dino").identity
    assert one == again
    other = ViTModel.from_pretrained(folder / "dino", add_pooling_layer=False)
    with torch.no_grad():
        other.layernorm.bias[0] += 1e-3
    save_dino(tmp_path / "dino")
    other.save_pretrained(tmp_path / "dino")
    assert load_dino(tmp_path / "dino").identity["weights"] != one["weights"]
    for name in ("clip", "open_clip"):
        assert len(load_clip(folder / name).identity["weights"]) == 64
    with pytest.raises(InputError, match=r"cannot load a ViTModel from .* no weights for .*, which would be random"):
        load_dino(folder / "clip")
    torn = load_file(tmp_path / "dino/model.safetensors")
    save_file({name: one for name, one in torn.items() if "layer.1." not in name}, tmp_path / "dino/model.safetensors")
    with pytest.raises(InputError, match=r"no weights for (encoder\.)?layers?\.1\."):
        load_dino(tmp_path / "dino")
    with pytest.raises(InputError, match=r"cannot load a ViTModel from"):
        load_dino(tmp_path / "none")
    with pytest.raises(InputError, match=r"cannot load a DINO from timm:"):
        load_dino("timm:no_such_model")
    (tmp_path / "words").mkdir()
    save_clip(tmp_path / "words")
    for file in (tmp_path / "words").glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="token"):
        load_clip(tmp_path / "words")
