"""The registered operators: schema, fake, autograd. The one place that touches torch.library."""

from kdkernels.ops._shared import packed
from kdkernels.ops.rows import EagerRowLoss, eager_row_loss, plain_eager, row_loss, scales_late

__all__ = ["EagerRowLoss", "eager_row_loss", "packed", "plain_eager", "row_loss", "scales_late"]
