"""Guidance: how several predictions of a step become one. Linear, so the same for epsilon and v."""

from __future__ import annotations


def branch_weights(eta_im: float, eta_text_im: float) -> dict[str, float]:
    """Eq. 4 of BootPIG (arXiv 2401.13974), its last bracket corrected: the paper prints e_text_im - e_text_im.

        e_uncond + eta_im (e_im - e_uncond) + eta_text_im (e_text_im - e_im)

    as a weighted sum. e_uncond: no reference, no text; e_im: references, no text; e_text_im: references and text. A
    branch that is left out has weight 0: nobody needs to compute it. The weights add up to 1.
    """
    weights = {"uncond": 1 - eta_im, "im": eta_im - eta_text_im, "text_im": eta_text_im}
    return {branch: weight for branch, weight in weights.items() if weight != 0}
