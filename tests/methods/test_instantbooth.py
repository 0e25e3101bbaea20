"""InstantBooth against its equations (arXiv 2304.03411, section 3), written plainly here."""

from __future__ import annotations

import copy
import math
from types import MethodType
from typing import Any

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection
from trying import refused

from pig.attention.adapters import PatchTokens
from pig.data.modules import TripletDataModule
from pig.data.schema import Batch
from pig.data.subjects import read_subjects
from pig.data.transforms import BLACK, ReferenceAugmentation, reference_picture, to_tensor
from pig.errors import InputError
from pig.methods.instantbooth import InstantBoothNet, InstantBoothPipeline
from pig.methods.instantbooth.module import InstantBooth
from pig.methods.instantbooth.network import Concept, inject, text_with_concept
from pig.models.backbone import load_backbone
from pig.models.encoders import tokenize
from pig.models.identifier import first_positions, identifier_token, with_identifier
from pig.models.names import WEIGHTS
from pig.models.vision import look

PROMPT = "a photo of a mug, on a beach"


def changed(net: torch.nn.Module, amount: float = 0.05) -> Any:
    """As after training."""
    torch.manual_seed(3)
    with torch.no_grad():
        for of in net.trainable_parameters().values():  # type: ignore[operator]
            for parameter in of.values():
                parameter += amount * torch.randn_like(parameter)
    return net


@pytest.fixture(scope="module")
def vision() -> CLIPVisionModelWithProjection:
    torch.manual_seed(1)
    small = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**small, image_size=32, patch_size=16, projection_dim=12)
    return CLIPVisionModelWithProjection(config).eval()


@pytest.fixture(scope="module")
def pipe() -> InstantBoothPipeline:
    module = InstantBooth("toyworld", identifier="sks")
    changed(module.net)
    return module.pipeline()


@pytest.fixture(scope="module")
def cutouts(toy_data) -> list[Image.Image]:
    return read_subjects(toy_data / "subjects")[6].references(3)


def batch_of(toy_data, **augmentation: Any) -> Batch:
    data = TripletDataModule(
        str(toy_data / "triplets"),
        batch_size=4,
        resolution=64,
        num_workers=0,
        augmentation=ReferenceAugmentation(**augmentation),
    )
    return next(iter(data.train_dataloader()))


def draw(pipe: InstantBoothPipeline, references: Any, prompt: str = PROMPT, **given: Any) -> Tensor:
    told = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(1), **given}
    return pipe(prompt, references, **{"class_noun": "mug", **told}).images


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("patch_feature", [True, False])
def test_equations_2_to_4(base_unet, inputs, vision, beta, patch_feature) -> None:
    plain = copy.deepcopy(base_unet)
    net = changed(InstantBoothNet(base_unet, vision, Concept.of(base_unet, vision, patch_feature=patch_feature)), 0.3)
    pictures = torch.randn(3, 2, 3, 32, 32, generator=torch.Generator().manual_seed(4)).clamp(-1, 1)
    f_c, f_p = net.read(pictures)
    weights = dict(net.concept.named_parameters())

    each = [look(vision, pictures[:, i]) for i in range(2)]
    heads = [one @ weights["concept.weight"].T + weights["concept.bias"] for one, _ in each]
    torch.testing.assert_close(f_c, (heads[0] + heads[1]) / 2)  # Eq. 2
    seen = torch.cat([tokens if patch_feature else embeds[:, None] for embeds, tokens in each], 1)  # Eq. 4
    assert seen.shape[1] == 2 * (5 if patch_feature else 1)
    for width, found in f_p.items():
        torch.testing.assert_close(found, seen @ weights[f"patch.{width}.weight"].T + weights[f"patch.{width}.bias"])

    def forward(block: Any, x: Tensor, *_: Any, encoder_hidden_states: Tensor, **__: Any) -> Tensor:
        start = f"adapters.{block.own.replace('.', '/')}."
        w = {key.removeprefix(start): one for key, one in weights.items() if key.startswith(start)}
        y = x + block.attn1(block.norm1(x))
        both = torch.cat([y, f_p[y.shape[-1]]], dim=1)
        q, k, v = (both @ w[f"{one}.weight"].T for one in ("to_q", "to_k", "to_v"))
        width, out = q.shape[-1] // block.attn1.heads, []
        for head in range(block.attn1.heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
            out.append(scores.softmax(-1) @ v[..., part])
        s = torch.cat(out, -1) @ w["to_out.0.weight"].T + w["to_out.0.bias"]
        y = y + beta * torch.tanh(w["gamma"]) * s[:, : y.shape[1]]  # Eq. 3
        y = y + block.attn2(block.norm2(y), encoder_hidden_states)
        return y + block.ff(block.norm3(y))

    for name in net.concept.by_block():
        block = plain.get_submodule(name)
        block.own, block.forward = name, MethodType(forward, block)
    given = (inputs["latents"], inputs["timesteps"], inputs["text"])
    expected = plain(*given).sample
    found = net(*given, PatchTokens(f_p, beta))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, net(*given), atol=1e-3)


def test_at_the_start_the_plain_unet(base_unet, inputs, vision) -> None:
    plain = copy.deepcopy(base_unet)
    net = InstantBoothNet(base_unet, vision, Concept.of(base_unet, vision))
    _, f_p = net.read(torch.zeros(3, 1, 3, 32, 32))
    given = (inputs["latents"], inputs["timesteps"], inputs["text"])
    assert torch.equal(net(*given, f_p), plain(*given).sample)
    assert torch.equal(net(*given), plain(*given).sample)
    layer = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias", "gamma")
    groups = net.trainable_parameters()
    assert set(groups) == {"heads", "adapters"}
    assert set(groups["adapters"]) == {
        f"concept.adapters.{block.replace('.', '/')}.{name}" for block in net.concept.by_block() for name in layer
    }
    heads = ["concept", *(f"patch.{width}" for width in (32, 64))]
    assert set(groups["heads"]) == {f"concept.{head}.{name}" for head in heads for name in ("weight", "bias")}
    assert "fuser" not in " ".join(net.unet.state_dict())


def test_the_identifiers_place() -> None:
    text = torch.randn(2, 5, 3)
    there = torch.zeros(2, 5, dtype=torch.bool)
    there[0, 3] = True
    found = inject(text, there, torch.ones(2, 3))
    assert torch.equal(found[0, 3], torch.ones(3))
    keep = ~there
    assert torch.equal(found[keep], text[keep])
    assert first_positions(torch.tensor([[1, 7, 2, 7], [1, 2, 3, 4]]), 7).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert with_identifier("a photo of a mug, on a beach", "mug", "sks") == "a photo of a sks mug, on a beach"
    assert with_identifier("A photo of a Red mug", "a red mug", "sks") == "A photo of a sks Red mug"
    assert with_identifier("a sks thing", "", "sks") == "a sks thing"
    assert with_identifier("a photo of a Q mug", "mug", "q") == "a photo of a Q mug"  # CLIP's text has no case
    assert with_identifier("a q-tip in a mug", "mug", "q") == "a q-tip in a q mug"
    assert with_identifier("a smug man with a mug", "mug", "sks") == "a smug man with a sks mug"
    for prompt, noun, message in (
        ("a photo of a dog", "mug", "does not hold its class noun 'mug'"),
        ("a photo of a mug", "", "where shall the identifier stand"),
    ):
        with pytest.raises(InputError, match=message):
            with_identifier(prompt, noun, "sks")
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "base/tokenizer")
    assert tokenizer.convert_ids_to_tokens(identifier_token(tokenizer, "sks")) == "sks</w>"
    with pytest.raises(InputError, match="'zwx' is 3 tokens"):
        identifier_token(tokenizer, "zwx")
    tokenizer.add_tokens("zwx")  # as a vocabulary that has it
    assert identifier_token(tokenizer, "zwx") == len(tokenizer) - 1


def test_the_concept_in_the_text(pipe) -> None:
    ids = tokenize(pipe.tokenizer, ["a photo of a sks mug"])
    token = identifier_token(pipe.tokenizer, "sks")
    there = ids[0] == token
    plain = pipe.text_encoder(ids)[0]
    f_c = torch.full((1, plain.shape[-1]), 0.5)
    behind = text_with_concept(pipe.text_encoder, ids, token, f_c, before_text=False)
    assert torch.equal(behind[0, ~there], plain[0, ~there])
    assert torch.equal(behind[0, there], f_c)
    words = pipe.text_encoder.get_input_embeddings()(ids)
    words[0, there] = f_c
    before = text_with_concept(pipe.text_encoder, ids, token, f_c, before_text=True)
    where = int(there.nonzero())
    assert torch.equal(before[0, :where], plain[0, :where])  # attention is causal
    assert not torch.allclose(before[0, where:], plain[0, where:], atol=1e-3)
    hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(lambda *_: words)
    assert torch.equal(before, pipe.text_encoder(ids)[0])
    hook.remove()
    assert torch.equal(plain, pipe.text_encoder(ids)[0])  # nothing stays behind


def test_sampling_written_plainly(pipe, cutouts) -> None:
    """Eq. 6, beta, and guidance against the base model, by hand."""
    beta, alpha, guidance = 0.4, 0.6, 3.0
    found = draw(pipe, cutouts[:2], beta=beta, alpha=alpha, text_guidance=guidance, output_type="latent")
    net, base = pipe.network, load_backbone("toyworld")
    with torch.no_grad():
        side = net.vision.config.image_size
        pictures = torch.stack([to_tensor(reference_picture(one, side, BLACK)) for one in cutouts[:2]])
        f_c, f_p = net.read(pictures[None])
        ids = tokenize(pipe.tokenizer, ["a photo of a sks mug, on a beach"])
        text = pipe.text_encoder(ids)[0]
        text[ids == identifier_token(pipe.tokenizer, "sks")] = alpha * f_c[0]
        empty = pipe.encode_text([""])
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        scheduler = pipe.scheduler_of(pipe.settings(num_inference_steps=3))
        for t in scheduler.timesteps:
            e = base.unet(latents, t, empty).sample
            e_text = net(latents, t.view(1), text, PatchTokens(f_p, beta))
            latents = scheduler.step(e + guidance * (e_text - e), t, latents).prev_sample
    torch.testing.assert_close(found, latents, atol=2e-4, rtol=1e-3)


def test_nothing_of_the_subject(pipe, cutouts) -> None:
    """beta = alpha = 0: the base model's picture, with zeros for the identifier."""
    found = draw(pipe, cutouts, beta=0.0, alpha=0.0, text_guidance=1.0, output_type="latent")
    base = load_backbone("toyworld")
    with torch.no_grad():
        ids = tokenize(pipe.tokenizer, ["a photo of a sks mug, on a beach"])
        text = pipe.text_encoder(ids)[0]
        text[ids == identifier_token(pipe.tokenizer, "sks")] = 0
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        scheduler = pipe.scheduler_of(pipe.settings(num_inference_steps=3))
        for t in scheduler.timesteps:
            latents = scheduler.step(base.unet(latents, t, text).sample, t, latents).prev_sample
    torch.testing.assert_close(found, latents, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, draw(pipe, cutouts[::-1], beta=0.0, alpha=0.0, text_guidance=1.0, output_type="latent"))


def test_references(pipe, cutouts) -> None:
    one, twice = (pipe.network.read(pictures_of([cutouts[0]] * count)) for count in (1, 2))
    torch.testing.assert_close(one[0], twice[0])  # the concept token
    for width, tokens in one[1].items():
        torch.testing.assert_close(torch.cat([tokens, tokens], 1), twice[1][width])
    told = {"beta": 1.0, "alpha": 1.0}
    torch.testing.assert_close(draw(pipe, cutouts, **told), draw(pipe, cutouts[::-1], **told), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(draw(pipe, cutouts[:1], **told), draw(pipe, cutouts, **told), atol=1e-3)
    for name in ("beta", "alpha"):
        assert not torch.allclose(draw(pipe, cutouts, **told), draw(pipe, cutouts, **{**told, name: 0.1}), atol=1e-3)


def pictures_of(cutouts: list[Image.Image]) -> Tensor:
    return torch.stack([to_tensor(reference_picture(one, 64, BLACK)) for one in cutouts])[None]


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, {"heads", "adapters"}),
        ({"patch_feature": False}, {"heads", "adapters"}),
        ({"lr_adapters": 0.0}, {"heads"}),
        ({"before_text": True}, {"heads", "adapters"}),
        ({"lr_vision": 1e-5, "tuned_vision_layers": 2}, {"heads", "adapters", "vision"}),
        ({"lr_unet": 1e-6}, {"heads", "adapters", "unet"}),
    ],
)
def test_table_3(toy_data, options, groups) -> None:
    module = InstantBooth("toyworld", identifier="sks", **options)
    assert set(module.groups) == groups
    changed(module.net, 0.01)
    module.losses(batch_of(toy_data, background="black"), training=True)[0].mean().backward()
    for name, parameter in module.named_parameters():
        used = parameter.requires_grad
        if ".adapters." in name and "lr_adapters" not in options:
            assert used
        # The last layer norm's [CLS] path apart, every trained weight is reached.
        assert (parameter.grad is not None and bool(parameter.grad.abs().max() > 0)) == used, name
    if "lr_vision" in options:
        trained = {name for name in module.trainable() if "vision" in name}
        layers = len(module.net.vision.vision_model.encoder.layers)
        assert {name.split("layers.")[1].split(".")[0] for name in trained} == {str(layers - 2), str(layers - 1)}


def test_without_train_mask(toy_data) -> None:
    own, black = (batch_of(toy_data, flip=0.0, scale=(1, 1), background=one) for one in ("own", "black"))
    assert own.reference is not None
    assert black.reference is not None
    assert not torch.allclose(own.reference, black.reference)
    inside = (black.reference > -1).any(2, keepdim=True).expand_as(black.reference)
    apart = (own.reference - black.reference).abs()
    assert apart[inside].mean() < 0.25  # the object itself is the same, but for its edge
    assert apart[~inside].mean() > 0.5


def test_bad_input(toy_data, pipe, cutouts, tmp_path, monkeypatch, capsys) -> None:
    whole = Image.new("RGB", (64, 64), "red")
    with pytest.raises(InputError, match=r"a reference without a mask.*--segmenter"):
        draw(pipe, [whole])
    with pytest.raises(InputError, match="lie behind what is read"):
        draw(pipe, cutouts, "a big old nice red " * 20 + "mug")
    with pytest.raises(InputError, match="a word of letters and digits"):
        draw(pipe, cutouts, identifier="*")
    for given, message in (
        ({"class_noun": ""}, "where shall the identifier stand"),
        ({"class_noun": "dog"}, "does not hold its class noun 'dog'"),
        ({"identifier": "zzqx"}, "tokens for this tokenizer"),
        ({"beta": 1.5}, "beta must be between 0 and 1"),
    ):
        with pytest.raises(InputError, match=message):
            draw(pipe, cutouts, **given)
    assert torch.equal(draw(pipe, cutouts, "a photo of a sks mug, on a beach", class_noun=""), draw(pipe, cutouts))
    with pytest.raises(InputError, match="'zwx' is 3 tokens"):
        InstantBooth("toyworld", identifier="zwx")
    with pytest.raises(InputError, match="model.lr_vision must be between 0 and 1"):
        InstantBooth("toyworld", identifier="sks", lr_vision=-1.0)
    module = InstantBooth("toyworld", identifier="sks")
    batch = batch_of(toy_data, background="black")
    batch.objects[1] = "dragon"
    with pytest.raises(InputError, match=rf"sample {batch.keys[1]}: .*'dragon'"):
        module.losses(batch, training=True)
    on_white = TripletDataModule(str(toy_data / "triplets"), batch_size=4, resolution=64, num_workers=0)
    with pytest.raises(InputError, match=r"data.augmentation.background to black"):
        Trainer(max_steps=1, **QUIET).fit(module, on_white)
    with pytest.raises(InputError, match="tuned_vision_layers must be between 1 and"):
        InstantBooth("toyworld", identifier="sks", tuned_vision_layers=99)
    pipe.save_pretrained(tmp_path / "model")
    cutouts[0].save(tmp_path / "mug.png")
    words = ["generate", "--model", tmp_path / "model", "--references", tmp_path / "mug.png", "--prompt", PROMPT]
    message = refused(monkeypatch, capsys, *words, "--steps", "1", "--out", tmp_path / "no")
    assert "Give the class noun (--class_noun)" in message
