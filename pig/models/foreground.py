"""Find the object of a photograph, by name: how references get their masks where nobody gave one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from PIL import Image

from pig.data.subjects import Segment
from pig.errors import InputError, check_named
from pig.models.encoders import weights_digest
from pig.models.names import DETECTOR, RembgModel, SegmenterName
from pig.models.segmenters import best_boxes, encode, is_background, load_detector, load_sam, masks_for

THRESHOLD = 0.25  # of Grounding DINO's certainty; its authors'


def make_segmenter(
    name: SegmenterName,
    *,
    sam: str = "toyworld",
    detector: str = DETECTOR,
    box: Sequence[float] | None = None,
    point: Sequence[float] | None = None,
    rembg_model: RembgModel = "isnet-general-use",
    device: str = "cpu",
) -> Segment | None:
    """What makes a mask of a picture and the noun for what it shows.

    Args:
        name: `none`; `sam`: Segment Anything, shown where the object is; `grounded-sam`: Grounding DINO finds the
            noun's box, SAM the mask in it; `rembg`: background removal, needs that package.
        sam: see `load_sam`.
        detector: a Grounding DINO in transformers' format.
        box: (x0, y0, x1, y1) in pixels, for `sam`; the whole picture by default.
        point: (x, y) in pixels on the object, for `sam`.
        rembg_model: of `rembg`; fetched by that package at its first use.

    Raises:
        InputError: an unknown name, or weights or a package that are not there. The segmenter itself raises it where
            it finds nothing, and says what to try.
    """
    check_named("segmenter", name, get_args(SegmenterName))
    if name != "sam" and (box is not None or point is not None):
        raise InputError(f"a box or a point is for the segmenter `sam`, not for {name!r}")
    for what, given, length in (("box", box, 4), ("point", point, 2)):
        if given is not None and len(given) != length:
            raise InputError(f"a {what} is {length} numbers in pixels, got {list(given)}")
    if box is not None and not (box[0] < box[2] and box[1] < box[3]):
        raise InputError(f"a box is x0 y0 x1 y1 with x0 < x1 and y0 < y1, got {list(box)}")
    if name == "sam":
        return SamSegmenter(sam, box, point, device)
    if name == "grounded-sam":
        return GroundedSamSegmenter(sam, detector, device)
    return RembgSegmenter(rembg_model) if name == "rembg" else None


class SamSegmenter:
    """SAM's best mask that is not the background, for a box or a point."""

    def __init__(self, sam: str, box: Sequence[float] | None, point: Sequence[float] | None, device: str) -> None:
        self.sam, self.box, self.point = load_sam(sam, device), box, point
        self.identity = f"sam {weights_digest(self.sam)} {box} {point}"

    def __call__(self, image: Image.Image, noun: str = "") -> Image.Image:
        width, height = image.size
        if max(width, height) > 50 * min(width, height):
            raise InputError(f"sam cannot see in a strip of {width}x{height}")
        box = (0, 0, width, height) if self.box is None and self.point is None else self.box
        for what, given in (("box", box), ("point", self.point)):
            xs, ys = (given[0::2], given[1::2]) if given is not None else ((), ())
            if any(not 0 <= x <= width for x in xs) or any(not 0 <= y <= height for y in ys):
                raise InputError(f"the {what} {list(given or ())} lies outside of the picture ({width}x{height})")
        array = np.asarray(image.convert("RGB"))
        masks = masks_for(self.sam, encode(self.sam, [array]), array.shape[:2], box=box, point=self.point)
        # Asked about a part of the picture, whatever fills it is meant; asked about all of it, the background is not.
        asked_for_all = self.box is None and self.point is None
        found = [one.mask for one in masks if one.mask.any() and not (asked_for_all and is_background(one.mask))]
        if not found:
            raise InputError("sam finds no object: show it where, by a box or a point, or give a mask")
        return Image.fromarray(found[0].astype(np.uint8) * 255)


class GroundedSamSegmenter:
    """Grounding DINO (arXiv 2303.05499) finds the noun's box, SAM the mask in it: the authors' release's way."""

    def __init__(self, sam: str, detector: str, device: str) -> None:
        from transformers import AutoModelForZeroShotObjectDetection

        self.sam = load_sam(sam, device)
        self.detector = load_detector(AutoModelForZeroShotObjectDetection, detector, device)
        self.identity = f"grounded-sam {weights_digest(self.sam)} {detector}"

    def __call__(self, image: Image.Image, noun: str) -> Image.Image:
        if not noun.strip():
            raise InputError("grounded-sam needs a class noun: what does the picture show?")
        image = image.convert("RGB")
        (found,) = best_boxes(*self.detector, [image], [noun], THRESHOLD)
        if found is None:
            raise InputError(
                f"grounded-sam finds no {noun!r}: name it otherwise, or use `sam` with a box, or give a mask"
            )
        array = np.asarray(image)
        mask = masks_for(self.sam, encode(self.sam, [array]), array.shape[:2], box=found[0])[0].mask
        return Image.fromarray(mask.astype(np.uint8) * 255)


class RembgSegmenter:
    """The `rembg` package's background removal, by a model that is named; it fetches its weights on first use."""

    def __init__(self, model: RembgModel) -> None:
        check_named("rembg_model", model, get_args(RembgModel))
        try:
            import rembg
        except ImportError as error:
            raise InputError("the segmenter `rembg` needs its package: pip install 'pig[rembg]'") from error
        self.remove: Any = rembg.remove
        self.identity = f"rembg {getattr(rembg, '__version__', '')} {model}"
        try:
            self.session = rembg.new_session(model)
        except Exception as error:  # the download's own kinds
            raise InputError(f"rembg cannot load its model {model}: {str(error).splitlines()[0]}") from error

    def __call__(self, image: Image.Image, noun: str = "") -> Image.Image:
        mask = self.remove(image.convert("RGB"), session=self.session, only_mask=True).convert("L")
        if mask.point(lambda value: 255 * (value > 127)).getbbox() is None:
            raise InputError("rembg finds no object: use `sam` with a box, or give a mask")
        return mask
