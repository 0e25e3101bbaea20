"""Guidance: how several predictions of a step become one. Linear, so the same for epsilon and v."""

from __future__ import annotations

from torch import Tensor


def image_text_guidance(e_uncond: Tensor, e_im: Tensor, e_text_im: Tensor, eta_im: float, eta_text_im: float) -> Tensor:
    """Eq. 4 of BootPIG (arXiv 2401.13974), its last bracket corrected: the paper prints e_text_im - e_text_im.

    e_uncond: no reference, no text; e_im: references, no text; e_text_im: references and text.
    """
    return e_uncond + eta_im * (e_im - e_uncond) + eta_text_im * (e_text_im - e_im)
