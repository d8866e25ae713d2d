"""The registered operators: schema, fake, autograd. The one place that touches torch.library."""

from kdkernels.ops._shared import NUMBERS, changing_numbers, is_changing, packed, plain_eager
from kdkernels.ops.linear import EagerLinearLoss, eager_linear_loss, linear_loss, linear_loss_changing, relative
from kdkernels.ops.rows import EagerRowLoss, eager_row_loss, row_loss, row_loss_changing, scales_late

__all__ = [
    "NUMBERS",
    "EagerLinearLoss",
    "EagerRowLoss",
    "changing_numbers",
    "eager_linear_loss",
    "eager_row_loss",
    "is_changing",
    "linear_loss",
    "linear_loss_changing",
    "packed",
    "plain_eager",
    "relative",
    "row_loss",
    "row_loss_changing",
    "scales_late",
]
