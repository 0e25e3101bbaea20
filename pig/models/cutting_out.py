"""How the object of a picture is found: what commands and the page let their users choose."""

from __future__ import annotations

from dataclasses import dataclass

from pig.data.subjects import Segment
from pig.models.names import DETECTOR, TOYWORLD, RembgModel, SegmenterName


@dataclass
class CuttingOut:
    """How the object of a picture is found."""

    segmenter: SegmenterName = "none"
    """For pictures without alpha channel and mask: none (use the whole picture), sam, grounded-sam (needs a class
    noun) or rembg."""
    sam: str = TOYWORLD
    """`toyworld` or Meta's file, such as sam_vit_h_4b8939.pth."""
    detector: str = DETECTOR
    """For grounded-sam: a Grounding DINO model in transformers' format."""
    box: list[float] | None = None
    """For sam: the box around the object, x0 y0 x1 y1 in pixels; the same box is used for all pictures."""
    point: list[float] | None = None
    """For sam: x y of one pixel on the object, the same for all pictures."""
    rembg_model: RembgModel = "isnet-general-use"
    """For rembg: u2netp (4 MB, Apache-2.0), isnet-general-use (180 MB, Apache-2.0) or birefnet-general (970 MB, MIT);
    rembg downloads the model when it is first used."""

    def make(self) -> Segment | None:
        import torch  # not for a command's --help

        from pig.models.foreground import make_segmenter

        return make_segmenter(
            self.segmenter,
            sam=self.sam,
            detector=self.detector,
            box=self.box,
            point=self.point,
            rembg_model=self.rembg_model,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
