"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): generation follows the conditional prediction beyond the
unconditional one,

    v = v_u + w (v_c - v_u) = v_c + (w - 1) (v_c - v_u)        (linear: the same in v, noise, data or score)

with both from one network, trained with the condition left out in a tenth of the rows. Training is flow matching's; w = 1 is the
conditional model. It costs a second network call at every step, and large w overshoots: samples leave the data along the
guidance.
"""

from __future__ import annotations

import dataclasses

from methods.diffusion.flow_matching import FlowMatching
from runner.interface import knob


class CFG(FlowMatching):
    @dataclasses.dataclass(frozen=True)
    class Config(FlowMatching.Config):
        guidance: float = knob(3.0, "w: scale of classifier-free guidance; 1: none")
