"""KD: distillation over candidate lists (Hinton et al. 2015, arXiv 1503.02531, with candidates in place of classes).

The family's base algorithm as it stands (methods/preference/base.py): the student's softmax over the list is fitted to
the teacher's by cross-entropy, without an anchor,

    L = - sum_i q_i log softmax(log pi(y_i) / tau)_i,   q = softmax(log pi_T(y_i) / T_q)

At T_q = tau = 1 the optimum is the teacher itself, whatever the candidates. In six dimensions raw densities differ by tens
of nats, so that q looks almost one-hot; target=zscore softens it, but then the optimum is no longer the teacher: on
HalfCheetah that student reaches a fraction of the return. With T_q = tau = T this is distillation at temperature T.
"""

from __future__ import annotations

from methods.preference.base import CandidateLists


class KD(CandidateLists):
    pass
