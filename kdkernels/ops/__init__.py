"""The registered operators: schema, fake, autograd. The one place that touches torch.library."""

from kdkernels.ops._shared import packed, plain_eager
from kdkernels.ops.linear import EagerLinearLoss, eager_linear_loss, linear_loss, relative
from kdkernels.ops.rows import EagerRowLoss, eager_row_loss, row_loss, scales_late

__all__ = [
    "EagerLinearLoss",
    "EagerRowLoss",
    "eager_linear_loss",
    "eager_row_loss",
    "linear_loss",
    "packed",
    "plain_eager",
    "relative",
    "row_loss",
    "scales_late",
]
