"""Small random networks saved in the public formats, and a benchmark for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from pig.models.names import WEIGHTS

OBJECT_TEMPLATES = ["a {0} {1} in the jungle", "a {0} {1} on the beach", "a red {0} {1}"]
LIVE_TEMPLATES = ["a {0} {1} in the jungle", "a {0} {1} wearing a red hat", "a red {0} {1}"]
# subject, class, number and size of its photographs
SUBJECTS = (("can", "can", 3, (90, 70)), ("dog2", "dog", 2, (64, 120)), ("robot_toy", "toy", 1, (80, 80)))
TIMM_SHAPE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 56}
OPEN_CLIP_SHAPE = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 56},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def save_clip(folder: Path, activation: str = "quick_gelu") -> Path:
    """In transformers' format, 224 px, with the toy world's tokenizer."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    toy = json.loads((WEIGHTS / "clip/config.json").read_text())["text_config"]
    words = {name: toy[name] for name in ("vocab_size", "max_position_embeddings", "eos_token_id") if name in toy}
    config = CLIPConfig(
        text_config={**small, **words, "hidden_act": activation},
        vision_config={**small, "image_size": 224, "patch_size": 56, "hidden_act": activation},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    for file in (WEIGHTS / "clip").iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, folder)
    return folder


def save_open_clip(folder: Path, quick_gelu: bool = True) -> Path:
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    shape = {**OPEN_CLIP_SHAPE, "quick_gelu": quick_gelu}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    torch.save(open_clip.CLIP(**shape).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def save_dino(folder: Path, patch: int = 56, resample: int = 2) -> Path:
    """In transformers' format, 224 px; `resample` is what its own processor would squeeze with."""
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=patch
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ViTImageProcessor(image_mean=mean, image_std=std, resample=resample).save_pretrained(folder)
    return folder


def save_timm_dino(folder: Path) -> Path:
    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    model = timm.create_model("vit_small_patch16_224", num_classes=0, **TIMM_SHAPE)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    told = {"input_size": [3, 224, 224], "mean": mean, "std": std, "num_classes": 0}
    config = {
        "architecture": "vit_small_patch16_224",
        "model_args": TIMM_SHAPE,
        "num_classes": 0,
        "pretrained_cfg": told,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def noise(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Smooth, so that resizing matters, and in bright colours."""
    small = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def save_benchmark(folder: Path, images_per_prompt: int = 2) -> tuple[Path, Path]:
    """`subjects` in DreamBooth's layout and `images`, all of them."""
    rng = np.random.default_rng(0)
    subjects, images = folder / "subjects", folder / "images"
    lists = []
    for title, templates in (("Object", OBJECT_TEMPLATES), ("Live Subject", LIVE_TEMPLATES)):
        lines = ",\n".join(f"'{one}'.format(unique_token, class_token)" for one in templates)
        lists.append(f"{title} Prompts\n\nprompt_list = [\n{lines}\n]\n")
    classes = "\n".join(f"{name},{noun}" for name, noun, _, _ in SUBJECTS)
    for name, _, count, size in SUBJECTS:
        (subjects / name).mkdir(parents=True)
        for number in range(count):
            noise(rng, size).save(subjects / name / f"{number:02d}.png")
        for prompt in range(3):
            (images / name / str(prompt)).mkdir(parents=True)
            for seed in range(images_per_prompt):
                noise(rng, (100, 100)).save(images / name / str(prompt) / f"{seed}.png")
    (subjects / "prompts_and_classes.txt").write_text(
        f"Classes\n\nsubject_name,class\n{classes}\n\n" + "\n".join(lists)
    )
    return images, subjects


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
