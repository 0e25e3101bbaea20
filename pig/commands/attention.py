"""`attention`: which parts of a picture each word of its prompt looks at, as a picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from pig.attention.maps import recording, word_maps
from pig.commands.generate import cut_out_all
from pig.commands.options import Subjects
from pig.data.images import SEEDS
from pig.errors import InputError, check_ranges
from pig.files import make_folder, replacing
from pig.methods import find_model, load_pipeline, pipeline_class
from pig.models.cutting_out import CuttingOut
from pig.models.encoders import tokenize
from pig.models.names import TOYWORLD

log = logging.getLogger(__name__)


def attention(
    out: Path,
    model: str = TOYWORLD,
    what: Subjects | None = None,
    cutting_out: CuttingOut | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Draw a picture, and beside it the cross-attention of each word: the mean over steps, layers and heads.

    Args:
        out: the picture to write, such as maps.png.
        model: MODEL_FORMS. `--model X --help` lists that model's own controls.
        seed: of the picture.
        settings: the model's controls.
    """
    what, cutting_out = what or Subjects(), cutting_out or CuttingOut()
    if out.suffix.lower() not in (".png", ".pdf", ".svg") or out.is_dir():
        raise InputError(f"--out: give a file such as maps.png, .pdf or .svg, not {out}")
    make_folder(out.parent)
    source = find_model(model)
    kind = pipeline_class(source.method)
    chosen = kind.Settings.given(source.settings, settings or {})
    one_prompt = InputError("attention shows one --prompt of one subject")
    if what.subjects is not None:
        raise one_prompt
    for flag in ("step", "early", "late"):
        if getattr(what, flag) is not None:
            raise InputError(
                f"--{flag} is not for attention: give a subject's step as --model, such as DIR/dog/step-000200"
            )
    for flag in ("image", "mask"):
        if getattr(what, flag) is not None:
            raise InputError(f"--{flag} is for inpainting, which attention does not show")
    (subject,) = what.read(kind.reads_references)
    if len(subject.prompts) > 1:
        raise one_prompt
    (prompt,) = subject.prompts
    check_ranges(**{"--seed": (seed, 0, SEEDS - 1)})
    kind.check_prompt(prompt, subject.class_noun, chosen)
    segment = cutting_out.make() if kind.reads_references else None
    references = cut_out_all([subject], what.references_per_subject, segment)[subject.name]
    pipeline = load_pipeline(model)
    for doubt in pipeline.doubts([prompt], None, None):
        log.warning(doubt)
    found: list[Tensor] = []
    with recording(pipeline._unet, last=1) as maps:

        def on_step(_: Any, step: int, t: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
            found.append(word_maps(maps, pipeline._unet.config.sample_size).cpu())
            return state

        drawn = pipeline(
            prompt,
            references,
            class_noun=subject.class_noun,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=on_step,
            **chosen.as_json(),
        )
    text = pipeline.text_of(prompt, subject.class_noun, chosen)
    words = words_of(pipeline.tokenizer, text)
    means = torch.stack(found).mean(0)[0]
    show(drawn.images[0], [(word, means[places].sum(0)) for word, places in words], text, out)
    print(out)


def words_of(tokenizer: CLIPTokenizer, text: str) -> list[tuple[str, list[int]]]:
    """The words of a text as it is read, each with the places of its tokens."""
    (ids,) = tokenize(tokenizer, [text]).tolist()
    found: list[tuple[str, list[int]]] = []
    begun = False
    for place, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        if ids[place] == tokenizer.bos_token_id:
            continue
        if ids[place] == tokenizer.eos_token_id:
            break
        piece = token.removesuffix("</w>")
        if begun:
            found[-1] = (found[-1][0] + piece, [*found[-1][1], place])
        else:
            found.append((piece, [place]))
        begun = (
            not token.endswith("</w>") and token in tokenizer.get_vocab() and token not in tokenizer.get_added_vocab()
        )
    return found


def show(picture: Image.Image, words: Sequence[tuple[str, Tensor]], title: str, out: Path) -> None:
    """The picture, and over it in red how much each word looks where; each word on a scale of its own."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(6, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    plot, axes = pyplot.subplots(rows, columns, figsize=(2 * columns, 2.3 * rows), layout="constrained", squeeze=False)
    plot.suptitle(title, fontsize=10, parse_math=False)
    for cell in axes.flat:
        cell.axis("off")
    axes.flat[0].imshow(picture)
    for cell, (word, heat) in zip(axes.flat[1:], words, strict=False):
        cell.imshow(picture.convert("L"), cmap="gray", extent=(0, 1, 0, 1))
        cell.imshow(heat / heat.max().clamp(min=1e-8), cmap="inferno", alpha=0.7, extent=(0, 1, 0, 1))
        cell.set_title(f"{word}  {float(heat.mean()):.3f}", fontsize=9, parse_math=False)
    with replacing(out) as aside:
        plot.savefig(aside, format=out.suffix.lower().removeprefix("."), dpi=110)
    pyplot.close(plot)
