"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): GRPO on a flow model whose deterministic sampler is made stochastic.

The ODE becomes an SDE of the same marginals (methods/diffusion/flow.py, `flow`), so that every denoising step has a density,
and the clipped ratio of densities is weighted by the advantage within a group of samples of one condition. This is the family's
base as it stands (methods/diffusion/policy_gradient.py). `window` trains a few early steps and follows the ODE elsewhere
(Flow-GRPO-Fast, MixGRPO); kl_weight anchors the generator to where it started; a very large clip turns clipping off.

Differences from the official code: means and log-probabilities are of all trained steps at once; see the base for the defaults.
"""

from __future__ import annotations

from methods.diffusion.policy_gradient import FlowPolicy


class FlowGRPO(FlowPolicy):
    pass
