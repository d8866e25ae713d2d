"""The registered operators: schema, fake, autograd. The one place that touches torch.library."""

from kdkernels.ops._shared import packed
from kdkernels.ops.linear import linear_loss, relative
from kdkernels.ops.rows import EagerRowLoss, eager_row_loss, plain_eager, row_loss, scales_late

__all__ = [
    "EagerRowLoss",
    "eager_row_loss",
    "linear_loss",
    "packed",
    "plain_eager",
    "relative",
    "row_loss",
    "scales_late",
]
