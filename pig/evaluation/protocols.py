"""The rules of scoring, by name: DreamBooth's (arXiv 2208.12242, section 4.1), and the ways in which others deviate.

Each deviation moves the numbers, so a result carries its protocol's name, and two results of different protocols are
never compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from pig.errors import check_named

ProtocolName = Literal[
    "dreambooth",
    "dreambench_plus_dino8",
    "dino_direct_224",
    "first_reference",
    "one_image",
    "identifier",
    "clip_t_x2.5",
    "micro",
]
IDENTIFIER = "sks"  # DreamBooth's usual rare word


@dataclass(frozen=True)
class Protocol:
    """How the images of a benchmark become three numbers.

    Attributes:
        dino_patch: of the network that the protocol means, DINO ViT-S/16 or ViT-S/8.
        crop: DINO sees the centre crop S of the shorter side at 256/224 S; else the picture squeezed to S x S.
        all_references: an image is compared with all real pictures of its subject; else with the first.
        all_images: every image of a prompt counts; else the first.
        identifier: left in the text of CLIP-T; "" is the class noun alone.
        clip_t_factor: CLIP-T is a cosine times this.
        by_subject: means within subjects first, then over subjects; else over all images (or pairs) at once.
    """

    name: ProtocolName
    dino_patch: int = 16
    crop: bool = True
    all_references: bool = True
    all_images: bool = True
    identifier: str = ""
    clip_t_factor: float = 1.0
    by_subject: bool = True


DREAMBOOTH = Protocol("dreambooth")
PROTOCOLS: dict[str, Protocol] = {
    one.name: one
    for one in (
        DREAMBOOTH,
        replace(DREAMBOOTH, name="dreambench_plus_dino8", dino_patch=8, crop=False),
        replace(DREAMBOOTH, name="dino_direct_224", crop=False),
        replace(DREAMBOOTH, name="first_reference", all_references=False),
        replace(DREAMBOOTH, name="one_image", all_images=False),
        replace(DREAMBOOTH, name="identifier", identifier=IDENTIFIER),
        replace(DREAMBOOTH, name="clip_t_x2.5", clip_t_factor=2.5),
        replace(DREAMBOOTH, name="micro", by_subject=False),
    )
}


def protocol_named(name: str) -> Protocol:
    check_named("protocol", name, get_args(ProtocolName))
    return PROTOCOLS[name]
