"""Guidance: how several predictions of a step become one. Linear, so the same for epsilon and v."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from pig.sampling.settings import SamplingSettings


def branch_weights(eta_im: float, eta_text_im: float) -> dict[str, float]:
    """Eq. 4 of BootPIG (arXiv 2401.13974), its last bracket corrected: the paper prints e_text_im - e_text_im.

        e_uncond + eta_im (e_im - e_uncond) + eta_text_im (e_text_im - e_im)

    as a weighted sum. e_uncond: no reference, no text; e_im: references, no text; e_text_im: references and text. A
    branch that is left out has weight 0: nobody needs to compute it. The weights add up to 1.
    """
    weights = {"uncond": 1 - eta_im, "im": eta_im - eta_text_im, "text_im": eta_text_im}
    return {branch: weight for branch, weight in weights.items() if weight != 0}


def classifier_free(guidance: float) -> dict[str, float]:
    """e_uncond + guidance (e_text_im - e_uncond), as a weighted sum."""
    return branch_weights(guidance, guidance)


def weights_at(weights: Mapping[str, float], step: int, steps: int, settings: SamplingSettings) -> dict[str, float]:
    """The weights of a step: outside of the guidance interval the full condition alone."""
    low, high = settings.guidance_interval
    return dict(weights) if low <= step / steps < high else {"text_im": 1.0}


def combine(predictions: Mapping[str, Tensor], weights: Mapping[str, float], settings: SamplingSettings) -> Tensor:
    """The guided prediction (B, 4, h, w) from that of each branch."""
    # The weights add up to 1. In this form, two branches are diffusers' own guidance, bit for bit.
    first, *others = weights
    guided = predictions[first]
    for branch in others:
        guided = guided + weights[branch] * (predictions[branch] - predictions[first])
    if settings.guidance_rescale > 0 and "text_im" in predictions:
        guided = rescale_noise_cfg(guided, predictions["text_im"], settings.guidance_rescale)
    return guided
