"""DRPO: decoupled reward policy optimisation (Li et al. 2025, arXiv 2510.04474): short right responses, never pushed-down ones.

DisCO's objective (disco.py), whose right responses weigh by their length, among themselves alone:

    J_g  = sum_right om_i s_i - tau ln mean_wrong exp(s_j / tau),   om_i = exp((1 - T_i / T_max) / lambda), made to sum to 1

the closed form of max_P E_P[1 - T/T_max] - lambda KL(P || old policy on right responses). lambda = inf (0 here) is DisCO. A long
right response can lose weight, but not be pushed down, as it can be by a length reward inside a group's mean (length_penalty.py).

T_max is the constant length of a response; the official code divides by the padded width, so that weights change with the batch.
It writes the partition as S / sg(S): right gradient, logged loss without meaning. Its groups may silently mix; see disco.py.
"""

from __future__ import annotations

import dataclasses

import torch

from methods.reasoning.disco import DisCO, group_most
from runner.interface import knob


class DRPO(DisCO):
    @dataclasses.dataclass(frozen=True)
    class Config(DisCO.Config):
        length_temperature: float = knob(0.1, "lambda: the smaller, the more the shortest right responses count; 0: infinite, no "
                                         "preference", low=0.0, source="paper",
                                         when={"discriminative": True, "samples": 16})  # right ones of different lengths

    def weigh(self, rows):
        """Sets what super()'s weighs by."""
        if self.config.length_temperature:
            saved = torch.where(rows.correct > 0, -rows.length, -torch.inf)
            saved = saved - group_most(saved, rows.group)  # of the shortest right response: 0
            rows.preference = (saved / (self.response_length() * self.config.length_temperature)).exp()
        super().weigh(rows)
