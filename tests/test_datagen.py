"""Data generation: captions from every source, stages one by one, shards whatever interrupts or divides the work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import ray
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
)

from data_gen import captions, images, masks, quality
from data_gen.__main__ import run
from data_gen.captions import Caption, Collection, grammar_captions, make_captions, parse
from data_gen.config import CaptionsConfig, DatagenConfig, ImagesConfig, MasksConfig, QualityConfig, load_config, settle
from data_gen.errors import DiskFullError
from data_gen.executors import execute
from data_gen.inspect import inspect
from data_gen.run import complete, dry_run, generate
from data_gen.samples import Sample, read_lines, write_samples
from data_gen.shards import ShardMaker, samples_of, seed_of, shard_count, tar_of
from pig.data.shards import decode_triplet, find_shards, read_shard
from pig.errors import InputError
from pig.models.backbone import WEIGHTS
from pig.models.encoders import load_clip
from pig.models.segmenters import encode, load_sam, masks_for
from pig.toyworld import scene

CONFIG = Path(__file__).parents[1] / "configs/datagen/toyworld.yaml"


def config_for(out: Path, *overrides: str) -> DatagenConfig:
    """The toy world's chain, short."""
    short = ["captions.count=9", "shards.size=3", "images.steps=3", "shards.attempts=2", "workers=1"]
    return load_config(CONFIG, [f"output={out}", *short, *overrides])


def digests(out: Path) -> dict[str, str]:
    return {path.name: json.loads(path.read_text())["sha256"] for path in sorted(out.glob("train-*_stats.json"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of an undisturbed run by one worker."""
    out = tmp_path_factory.mktemp("made")
    generate(config_for(out))
    return out


# -- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "object_"),
    [
        ("Caption: A photo of a red rose, nestled alone in a glass vase.", "red rose"),
        ("3. Caption: A photo of an old camera, on a blanket", "old camera"),
        ("- Caption: A photo of a teacup, on a lace doily.", "teacup"),
        ("A photo of a teacup, on a lace doily.", None),
        ("Caption: A photo of a teacup", None),
        ("Caption: A photo of a [object], [scene]", None),
        ("Caption: A photo of two teacups, on a doily", None),
        ("Caption: A photo of a very long phrase that is not an object, on a doily", None),
        ("Sure! Here are your captions:", None),
    ],
)
def test_only_the_form_asked_for_is_a_caption(line, object_) -> None:
    caption = parse(line)
    assert (caption.object if caption else None) == object_


def test_grammar_has_no_duplicates_and_no_held_out_pair() -> None:
    config = CaptionsConfig(count=600, max_object_share=0.2)
    made = grammar_captions(config, seed=0)
    assert len({caption.caption for caption in made}) == 600
    assert made == grammar_captions(config, seed=0)
    assert made != grammar_captions(config, seed=1)
    held_out = {(category, scene.BACKGROUNDS[scene.held_out_background(category)]) for category in scene.CATEGORIES}
    assert not held_out & {(c.object.split()[-1], c.caption.split(", ")[1]) for c in made}


def test_grammar_from_lists(tmp_path) -> None:
    lists = tmp_path / "lists.yaml"
    lists.write_text("objects: [teapot, old camera]\nscenes: [on a table, in a box]\n")
    config = CaptionsConfig(count=4, lists=str(lists), max_object_share=0.5)
    assert Caption("a photo of an old camera, on a table", "old camera") in grammar_captions(config, seed=0)
    with pytest.raises(InputError, match="has 4 captions"):
        grammar_captions(replace(config, count=5), seed=0)
    for wrong in ("things: []\n", "objects: dog\nscenes: [here]\n", "objects: ['']\nscenes: [here]\n", "objects: [\n"):
        lists.write_text(wrong)
        with pytest.raises(InputError, match="expected YAML with the lists `objects`"):
            grammar_captions(config, seed=0)


def test_duplicates_near_duplicates_and_frequent_objects_are_refused() -> None:
    collection = Collection(10, 0.2, [])
    assert collection.add(Caption("A photo of a teacup, on a lace doily.", "teacup"))
    assert not collection.add(Caption("A photo of a teacup, on the lace doilys", "teacup"))
    assert collection.add(Caption("A photo of a blue teacup, in a box", "blue teacup"))
    assert not collection.add(Caption("A photo of a green teacup, on a shelf", "green teacup"))
    assert collection.rejected == {"duplicate": 1, "object over its share": 1}


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server whose every reply is chosen by the test."""

    def __init__(self, answer: Callable[[int], Any]) -> None:
        self.calls, self.lock, self.authorizations = 0, threading.Lock(), set[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                server: Any = self.server
                with server.lock:
                    number, server.calls = server.calls, server.calls + 1
                    server.authorizations.add(self.headers["Authorization"])
                reply = answer(number)
                if reply == "cut":
                    self.connection.close()
                    return
                if reply == "slow":
                    time.sleep(2)
                status = reply if isinstance(reply, int) else 200
                text = reply if isinstance(reply, str) and reply != "slow" else ""
                message = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
                error = {"error": {"message": f"no: {self.headers['Authorization']}"}}  # some echo what they were sent
                body = json.dumps(error if status != 200 else message).encode()
                body = reply if isinstance(reply, bytes) else body
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    if status == 429:
                        self.send_header("Retry-After", "0.1")
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:  # the client had waited long enough
                    pass

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def chat_config(server: Server, count: int, **options: Any) -> CaptionsConfig:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return CaptionsConfig(
        count=count,
        captioner="chat",
        model="m",
        base_url=url,
        api_key_env="TEST_KEY",
        per_call=5,
        max_object_share=1.0,
        timeout=1.0,
        **options,
    )


def right_answer(number: int, count: int = 5) -> str:
    rows = [f"Caption: A photo of a thing{number}x{i}, on table {'abcdefghij'[number % 10]}" for i in range(count)]
    return "\n".join(rows)


def test_chat_captions_arrive_all_and_once_whatever_the_server_does(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("TEST_KEY", "gsk_very-secret")
    mishaps: dict[int, Any] = {
        0: 429,
        1: 500,
        2: "cut",
        3: "slow",
        4: "I am sorry.\nCaption: A photo of [object]",
        5: right_answer(90) + "\nnot a caption",
        6: right_answer(90),  # all of them duplicates
        7: "",
        20: b"<html>no server of captions here</html>",
        21: b'{"choices": [{"index": 0}]}',
        22: b"[]",
        23: b'{"choices": [',
        8: right_answer(91, 2) + "\nCaption: A photo of a",  # a partial answer
    }
    with Server(lambda number: mishaps.get(number, right_answer(number))) as server:
        made = make_captions(tmp_path, chat_config(server, 123), seed=0)
        assert server.authorizations == {"Bearer gsk_very-secret"}
    assert len(made) == 123
    assert len({caption.caption for caption in made}) == 123
    assert {caption.object for caption in made} >= {"thing90x0", "thing91x1"}
    assert captions.read_captions(tmp_path / captions.FILE) == made
    rejected = json.loads((tmp_path / captions.STATS).read_text())["rejected"]
    assert rejected["wrong form"] == 4
    assert rejected["duplicate"] == 5
    assert rejected["empty reply"] == 5
    written = capfd.readouterr()
    assert "secret" not in written.out + written.err + "".join(p.read_text() for p in tmp_path.iterdir())


def test_partial_answers_are_kept_when_the_server_refuses(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TEST_KEY", "gsk_very-secret")
    with Server(lambda number: right_answer(number) if number < 2 else 401) as server:
        with pytest.raises(InputError, match="does not answer: AuthenticationError") as error:
            make_captions(tmp_path, chat_config(server, 20, parallel_calls=1), seed=0)
        assert "secret" not in str(error.value)
    part = tmp_path / (captions.FILE + ".part")
    part.write_text(part.read_text() + '{"caption": "A photo of a th')  # torn, as by a kill
    with Server(lambda number: right_answer(number + 2)) as server:
        made = make_captions(tmp_path, chat_config(server, 20), seed=0)
        assert server.calls <= 4
    assert len({caption.caption for caption in made}) == 20


def test_a_server_without_new_captions_is_not_asked_for_ever(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TEST_KEY", "k")
    with Server(lambda _: right_answer(0)) as server, pytest.raises(InputError, match="no new caption"):
        make_captions(tmp_path, chat_config(server, 20), seed=0)


def test_a_chat_captioner_needs_a_key_for_the_hosted_server(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(InputError, match="TEST_KEY"):
        make_captions(tmp_path, CaptionsConfig(3, "chat", model="m", api_key_env="TEST_KEY"), seed=0)


def test_calls_are_not_made_twice_by_a_captioner_that_was_stopped(tmp_path) -> None:
    class Numbered:
        def ask(self, count: int, call: int) -> str:
            return right_answer(call)

    config = CaptionsConfig(40, "local", model="m", per_call=5, max_object_share=1.0)
    whole = list(captions.collect(Numbered(), Collection(40, 1.0, []), config))
    collection = Collection(40, 1.0, [])
    first = [caption for _, caption in zip(range(15), captions.collect(Numbered(), collection, config), strict=False)]
    resumed = Collection(40, 1.0, first)
    resumed.calls = collection.calls
    assert first + list(captions.collect(Numbered(), resumed, config)) == whole


def test_local_captioner_rejects_what_an_untrained_model_says(tmp_path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "clip")
    tokenizer.save_pretrained(tmp_path / "lm")
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 512}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**size, **ids)).save_pretrained(tmp_path / "lm")
    config = CaptionsConfig(3, "local", model=str(tmp_path / "lm"), per_call=1)
    with pytest.raises(InputError, match=r"no new caption.*wrong form"):
        make_captions(tmp_path / "out", config, seed=0)
    with pytest.raises(InputError, match="captions.model"):
        make_captions(tmp_path / "out", replace(config, model=str(tmp_path / "none")), seed=0)


# -- images, masks, quality -------------------------------------------------------------------------------------------


def test_a_sample_looks_the_same_in_any_batch() -> None:
    painter = images.Painter(ImagesConfig(model="toyworld", size=64, steps=3), "cpu")
    rows = [Sample(str(i), f"a photo of a {noun}, on a beach", noun, i) for i, noun in enumerate(("mug", "car", "cat"))]
    together = painter.draw(rows)[0]
    for sample, picture in zip(rows, together, strict=True):
        (alone,), _ = painter.draw([sample])
        assert np.abs(np.asarray(alone, float) - np.asarray(picture, float)).max() <= 1


def test_compiled_models_give_the_same() -> None:
    config = load_config(CONFIG, ["images.steps=2", "images.compile=true", "masks.compile=true"])
    rows = [Sample(str(i), f"a photo of a {noun}, on a beach", noun, i) for i, noun in enumerate(("mug", "car"))]
    painter = images.Painter(config.images, "cpu")
    compiled, _ = painter.draw(rows)
    plain, _ = images.Painter(replace(config.images, compile=False), "cpu").draw(rows)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).max() <= 1
    pictures = [Image.fromarray(scene.draw(scene.make_subject(seed), "beach", seed, 64).image) for seed in range(2)]
    nouns = [scene.make_subject(seed).category for seed in range(2)]
    found = masks.make_segmenter(config.masks, "cpu").find(pictures, nouns)
    expected = masks.make_segmenter(replace(config.masks, compile=False), "cpu").find(pictures, nouns)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.mask is not None
        assert theirs.mask is not None
        assert (ours.mask != theirs.mask).mean() < 0.01


def test_the_toy_sam_finds_held_out_objects() -> None:
    """At least 0.85 mean IoU (the card's figure, on 300 scenes, is higher)."""
    sam, overlaps = load_sam("toyworld"), []
    for i in range(40):
        seed = scene.HELD_OUT_SEED + 5000 + i
        drawing = scene.draw(scene.make_subject(seed), list(scene.BACKGROUNDS)[i % 10], seed, 64)
        inside = drawing.mask > 127
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        found = masks_for(sam, encode(sam, [drawing.image]), (64, 64), box=box)[0].mask
        overlaps.append((found & inside).sum() / (found | inside).sum())
    assert np.mean(overlaps) > 0.85


def test_batched_features_are_those_of_the_packages_own_predictor() -> None:
    from segment_anything import SamPredictor

    sam, rng = load_sam("toyworld"), np.random.default_rng(0)
    pictures = [rng.integers(0, 255, size, dtype=np.uint8) for size in ((64, 64, 3), (40, 90, 3), (128, 70, 3))]
    features = encode(sam, pictures)
    for picture, feature in zip(pictures, features, strict=True):
        predictor = SamPredictor(sam)
        predictor.set_image(picture)
        torch.testing.assert_close(feature[None], predictor.features, rtol=1e-4, atol=1e-4)
        box = np.array([5, 5, 30, 30])
        expected, quality_, _ = predictor.predict(box=box)
        ours = masks_for(sam, feature[None], picture.shape[:2], box=box)
        assert (ours[0].mask != expected[quality_.argmax()]).mean() < 0.001


def noise_pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(2)]


def tiny_grounding_dino(folder: Path) -> None:
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "mug", "red", "boat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "swin",
            "image_size": 64,
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 2],
            "window_size": 2,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        text_config={
            "model_type": "bert",
            "vocab_size": len(words),
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
        },
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        **layers,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    processor = GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 128})
    GroundingDinoProcessor(processor, BertTokenizer(str(folder / "vocab.txt"))).save_pretrained(folder)


def tiny_sam3(folder: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "clip")
    config = Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "num_hidden_layers": 2,
                "image_size": 112,
                "window_size": 4,
                "global_attn_indexes": [1],
                "pretrain_image_size": 56,
                **size,
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config={"vocab_size": len(tokenizer), "projection_dim": 32, "num_hidden_layers": 1, **size}
        | {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
        geometry_encoder_config={"num_layers": 1, **size},
        detr_encoder_config={"num_layers": 1, **size},
        detr_decoder_config={"num_layers": 1, "num_queries": 5, **size},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    Sam3Model(config).save_pretrained(folder)
    Sam3Processor(Sam3ImageProcessor(size={"height": 112, "width": 112}), tokenizer).save_pretrained(folder)


@pytest.mark.parametrize(("method", "make"), [("grounded", tiny_grounding_dino), ("sam3", tiny_sam3)])
def test_masks_by_phrase(tmp_path, method, make) -> None:
    """Random weights in the public formats: masks of the right form, and a phrase that is never found is no crash."""
    make(tmp_path / "detector")
    config = MasksConfig(method, sam="toyworld", detector=str(tmp_path / "detector"), threshold=0.0)
    found = masks.make_segmenter(config, "cpu").find(noise_pictures(), ["red mug", "boat"])
    assert [f.mask.shape for f in found if f.mask is not None] == [(64, 64)] * 2
    never = masks.make_segmenter(replace(config, threshold=1.0), "cpu").find(noise_pictures(), ["red mug", "boat"])
    assert [f.mask for f in never] == [None, None]
    with pytest.raises(InputError, match="cannot load the detector"):
        masks.make_segmenter(replace(config, detector=str(tmp_path / "none")), "cpu")


def test_automatic_masks_choose_the_object_before_its_background() -> None:
    config = load_config(CONFIG, []).masks
    segmenter, overlaps = masks.make_segmenter(config, "cpu"), []
    for i in range(12):
        seed = scene.HELD_OUT_SEED + 6000 + i
        subject = scene.make_subject(seed)
        drawing = scene.draw(subject, "beach", seed, 64)
        (found,) = segmenter.find([Image.fromarray(drawing.image)], [subject.category])
        inside = drawing.mask > 127
        overlaps.append(0.0 if found.mask is None else (found.mask & inside).sum() / (found.mask | inside).sum())
    assert np.median(overlaps) > 0.8


def square(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((128, 128), bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "deviation", "extra", "reason"),
    [
        (square((40, 40, 80, 80)), 50, {}, None),
        (square((40, 40, 80, 80)), 50, {"unsafe": True}, "unsafe"),
        (square((40, 40, 80, 80)), 1, {}, "constant image"),
        (None, 50, {}, "no object"),
        (square(), 50, {}, "no object"),
        (square((40, 2, 80, 80)), 50, {}, "border"),
        (square((40, 40, 46, 46)), 50, {}, "area"),
        (square((10, 10, 118, 118)), 50, {}, "area"),
        (square((20, 20, 60, 60), (80, 80, 100, 100)), 50, {}, "components"),
        (square((40, 40, 80, 80)), 50, {"caption_score": 0.1}, "caption score"),
        (square((40, 40, 80, 80)), 50, {"object_score": 0.1}, "object score"),
    ],
)
def test_every_reason_of_rejection(mask, deviation, extra, reason) -> None:
    config = QualityConfig(clip="toyworld", border=25, max_area=0.5, min_caption_score=0.2, min_object_score=0.2)
    picture = np.full((128, 128, 3), 128, np.uint8)
    picture[:, ::2] = 128 + 2 * deviation if deviation < 64 else 255
    scores: dict[str, Any] = {"caption_score": 0.3, "object_score": 0.3, **quality.measure(picture, mask), **extra}
    assert quality.verdict(scores, config) == reason


def test_specks_are_taken_off() -> None:
    part, share = quality.largest_part(square((20, 20, 60, 60), (100, 100, 104, 104)))
    assert share == pytest.approx(1600 / 1616)
    assert part.sum() == 1600


def test_clip_by_open_clip(tmp_path) -> None:
    """A small random model saved in open_clip's own format gives what open_clip called directly gives."""
    shape = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": shape, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    )
    torch.save(open_clip.CLIP(**shape).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    name = f"local-dir:{tmp_path}"
    clip, picture = load_clip(f"open_clip:{name}"), noise_pictures()[0]
    model, preprocess = open_clip.create_model_from_pretrained(name)
    with torch.no_grad():
        expected = model.encode_image(preprocess(picture)[None])[0]
        text = model.encode_text(open_clip.get_tokenizer(name)(["a mug"]))[0]
    torch.testing.assert_close(clip.images([picture])[0], expected / expected.norm())
    torch.testing.assert_close(clip.texts(["a mug"])[0], text / text.norm())
    with pytest.raises(InputError, match="open_clip:local-dir"):
        load_clip(f"open_clip:local-dir:{tmp_path / 'none'}")


def test_stages_alone_from_disk_to_disk(tmp_path, capsys) -> None:
    run(["captions", str(CONFIG), f"output={tmp_path / 'out'}", "captions.count=4"])
    rows = captions.read_captions(tmp_path / "out" / captions.FILE)
    folder = tmp_path / "folder"
    write_samples(folder, [Sample(f"{i}", row.caption, row.object, i) for i, row in enumerate(rows)])
    for stage in ("images", "masks", "quality", "shards"):
        run([stage, str(CONFIG), str(folder), f"output={tmp_path / 'out'}", "images.steps=3", "quality.border=0"])
    accepted = [row for row in read_lines(folder / quality.DONE) if row["reason"] is None]
    (shard,), _ = find_shards(str(tmp_path / "out"))
    assert shard.stats.count == len(accepted) > 0
    with pytest.raises(InputError, match=r"masks works on a folder with samples\.jsonl"):
        run(["masks", str(CONFIG), f"output={tmp_path / 'out'}"])


# -- shards and executors ---------------------------------------------------------------------------------------------


def test_a_finished_output_is_not_overwritten_by_a_stage_alone(made, tmp_path) -> None:
    write_samples(tmp_path, [Sample("0", "a photo of a mug, on a beach", "mug", 0)])
    with pytest.raises(InputError, match="holds shards already"):
        run(["shards", str(CONFIG), str(tmp_path), f"output={made}"])
    with pytest.raises(InputError, match="another config"):
        run(["captions", str(CONFIG), f"output={made}", "captions.count=4"])
    with pytest.raises(InputError, match="not for one stage"):
        run(["images", str(CONFIG), str(tmp_path), "--dry-run"])


def test_an_output_that_cannot_be_made_is_said(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot make output="):
        generate(config_for(tmp_path / "file"))


def test_ray_that_is_not_there_or_too_small_is_said(tmp_path, monkeypatch) -> None:
    config = config_for(tmp_path, "executor=ray", "workers=3")
    monkeypatch.setenv("RAY_ADDRESS", "foo")
    with pytest.raises(InputError, match="no Ray cluster answers at RAY_ADDRESS=foo"):
        next(execute(config, [0]))
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(InputError, match="workers=3, but Ray has room for 2"):
        next(execute(config, [0]))


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


@pytest.mark.parametrize(
    "where", [["workers=2"], ["executor=ray", "workers=2"], ["executor=ray", "workers=1"]], ids=str
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
    with pytest.raises(DiskFullError, match=f"no space left on the disk of {tmp_path}"):
        ShardMaker(config, "cpu").make(0)
    assert not complete(config, 0)
    assert not tar_of(tmp_path, 0).exists()


def test_dry_run_prints_the_plan_and_makes_nothing(tmp_path, capsys) -> None:
    dry_run(config_for(tmp_path / "out"))
    text = capsys.readouterr().out
    assert "9 captions" in text
    assert "estimated time here" in text
    assert not (tmp_path / "out").exists()
    dry_run(config_for(tmp_path / "out", "images.model=/no/such/model"))
    assert "cannot load images.model" in " ".join(capsys.readouterr().out.split())


def test_inspect_shows_what_is_there(made, tmp_path, capsys) -> None:
    inspect(made, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "inspect.png"))
    assert (sheet == (255, 0, 255)).all(-1).any(), "no outline of a mask"
    page = (tmp_path / "inspect.html").read_text()
    assert "caption_score" in page
    assert "Contact sheet" in page
    with pytest.raises(InputError, match="no folder of shards"):
        inspect(tmp_path / "none", tmp_path)
    garbage = tmp_path / "garbage"
    shutil.copytree(made, garbage)
    for tar in garbage.glob("*.tar"):
        tar.write_bytes(b"x" * tar.stat().st_size)
    with pytest.raises(InputError, match="no triplet of .* can be read"):
        inspect(garbage, tmp_path)


# -- bad input --------------------------------------------------------------------------------------------------------


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
        (["masks.sam=/no/such/sam"], "cannot load a SAM from '/no/such/sam'"),
        (["quality.clip=/no/such/clip"], "cannot load a CLIPModel from '/no/such/clip'"),
    ],
)
def test_what_the_machine_lacks_is_said_before_any_work(tmp_path, overrides, message) -> None:
    with pytest.raises(InputError, match=message):
        generate(config_for(tmp_path, *overrides))
    assert not (tmp_path / "work").exists()


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
