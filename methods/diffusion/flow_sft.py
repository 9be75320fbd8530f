"""Fine-tuning of a flow on the winners of pairs: flow matching's loss on chosen samples, from the start's weights. The baseline
of preference methods on flows, and the base of this family's pairs as it stands (methods/diffusion/preferences.py)."""

from __future__ import annotations

from methods.diffusion.preferences import PairRegression


class FlowSFT(PairRegression):
    pass
