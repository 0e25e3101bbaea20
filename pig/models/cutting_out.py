"""How the object of a picture is found: what commands and the page let their users choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pig.data.subjects import Segment
from pig.models.names import TOYWORLD

SegmenterName = Literal["none", "sam", "grounded-sam", "rembg"]
# Their licences allow commercial use: U2-Net (Apache-2.0; 4 MB), IS-Net (Apache-2.0; 180 MB), BiRefNet (MIT; 970 MB).
# rembg's own default is none of these: its newest one forbids commercial use without an agreement.
RembgModel = Literal["u2netp", "isnet-general-use", "birefnet-general"]
DETECTOR = "IDEA-Research/grounding-dino-tiny"


@dataclass
class CuttingOut:
    """How the object of a picture is found."""

    segmenter: SegmenterName = "none"
    """none (the picture is taken as it is), sam, grounded-sam (needs a class noun) or rembg."""
    sam: str = TOYWORLD
    """`toyworld` or Meta's file, such as sam_vit_h_4b8939.pth."""
    detector: str = DETECTOR
    """Of grounded-sam: a Grounding DINO in transformers' format."""
    box: list[float] | None = None
    """For sam: where the object is, x0 y0 x1 y1 in pixels (all pictures alike)."""
    point: list[float] | None = None
    """For sam: x y of a pixel of the object."""
    rembg_model: RembgModel = "isnet-general-use"
    """Of rembg: u2netp (4 MB, Apache-2.0), isnet-general-use (180 MB, Apache-2.0) or birefnet-general (970 MB, MIT);
    rembg fetches it at the first use."""

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
