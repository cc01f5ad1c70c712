"""How far a policy has gone from its reference, estimated from the policy's own samples.

KL(π ‖ ρ) = E over samples of π of log π(y) − log ρ(y). With d = log ρ − log π of a sample there are several
ways to estimate it (Schulman 2020, "Approximating KL divergence"):

    k1 = −d               right on average; negative for every sample that ρ likes better
    k3 = e^d − d − 1      right on average too, since E[e^d] = Σ π·ρ/π = 1; never negative, so less noisy

A penalty inside the *reward* needs the value only: PPO takes k1. A penalty inside the *loss* needs a gradient
that pulls back: GRPO takes k3. Its gradient, (1 − ρ/π)·∇log π, is on average that of KL(ρ ‖ π), the other
direction: both are 0 where π = ρ, and both lead there.
"""

from __future__ import annotations

from torch import Tensor


def k1(policy: Tensor, reference: Tensor) -> Tensor:
    """log π − log ρ, elementwise, of tokens that π drew."""
    return policy - reference


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    """ρ/π − log(ρ/π) − 1, elementwise, of tokens that π drew; 0 where both are alike, never negative."""
    d = reference - policy
    return d.exp() - d - 1
