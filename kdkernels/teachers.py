"""What a teacher can be beside a Tensor of logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearTeacher(NamedTuple):
    """A teacher by what its logits are made of: logits = hidden @ weight.T + bias, formed a few rows at a time.

    Hidden states and weights of either model may have their own hidden size and dtype. Nothing here gets a gradient.
    """

    #: (..., H_t) the teacher's last hidden states, with the rows of the student's; any of the dtypes of logits.
    hidden: Tensor
    #: (V_t, H_t) its output embedding (``lm_head.weight``), of the dtype of ``hidden``.
    weight: Tensor
    #: (V_t,) or None.
    bias: Tensor | None = None
