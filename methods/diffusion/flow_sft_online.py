"""Fine-tuning of a flow on the best of its own samples, group by group, as they come (weight 1 for the best of each group, the
online form of Flow-SFT in the code of Liu et al. 2025, arXiv 2501.13918). The baseline of online preference methods on flows, and
their base as it stands (methods/diffusion/online.py)."""

from __future__ import annotations

from methods.diffusion.online import OnlinePairs


class FlowSFTOnline(OnlinePairs):
    pass
