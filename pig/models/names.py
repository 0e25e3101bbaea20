"""Names of models: `toyworld` stands for the embedded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

TOYWORLD = "toyworld"
WEIGHTS = Path(__file__).parents[1] / "toyworld/weights"
FORMS = (
    f"a folder made by `export` or `tune`, `dreamblend:FOLDER` made by `tune`, `{TOYWORLD}`, `{TOYWORLD}/METHOD`, "
    "or `base:NAME` for a Stable Diffusion without references"
)

SegmenterName = Literal["none", "sam", "grounded-sam", "rembg"]
# Their licences allow commercial use: U2-Net (Apache-2.0; 4 MB), IS-Net (Apache-2.0; 180 MB), BiRefNet (MIT; 970 MB).
# rembg's own default is none of these: its newest one forbids commercial use without an agreement.
RembgModel = Literal["u2netp", "isnet-general-use", "birefnet-general"]
DETECTOR = "IDEA-Research/grounding-dino-tiny"


def resolve(name: str | Path, part: str = "base") -> str:
    """The folder of an embedded model for the name `toyworld`; any other name as it is."""
    return str(WEIGHTS / part) if str(name) == TOYWORLD else str(name)
