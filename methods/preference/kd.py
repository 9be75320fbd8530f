"""KD: distillation over candidate lists (Hinton et al. 2015, arXiv 1503.02531, with candidates in place of classes).

The family's base algorithm as it stands (methods/preference/base.py): the student's softmax over the list is fitted to
the teacher's by cross-entropy, without an anchor,

    L = - sum_i q_i log softmax(log pi(y_i) / tau)_i,   q = softmax(z(log pi_T(y_i)) / T_q)

With target=raw, target_temperature=T and tau=T this is distillation at temperature T. The default z-scores the
teacher's log-probabilities over each list: in six dimensions raw densities differ by tens of nats and q would be one-hot.
"""

from __future__ import annotations

from methods.preference.base import CandidateLists


class KD(CandidateLists):
    pass
