"""kdkernels: fused knowledge-distillation losses for large-vocabulary language models."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from kdkernels import backends, reference
from kdkernels.cache import TopKCache, TopKCacheWriter
from kdkernels.divergences import (
    CAKD,
    DKD,
    AdaptiveKL,
    AlphaBeta,
    Decoupled,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
)
from kdkernels.linear import linear_distillation_loss
from kdkernels.losses import distillation_loss
from kdkernels.modules import DistillationLoss, LinearDistillationLoss
from kdkernels.stats import RowStats
from kdkernels.strong_sets import Given, Label, StrongSet, TopK, TopP
from kdkernels.teachers import LinearTeacher, TopKTeacher

try:
    __version__ = _version("kdkernels")
except _PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "CAKD",
    "DKD",
    "AdaptiveKL",
    "AlphaBeta",
    "Decoupled",
    "DistillationLoss",
    "Divergence",
    "ForwardKL",
    "Given",
    "JensenShannon",
    "Label",
    "LinearDistillationLoss",
    "LinearTeacher",
    "ReverseKL",
    "RowStats",
    "SkewForwardKL",
    "SkewReverseKL",
    "StrongSet",
    "SymmetricKL",
    "TopK",
    "TopKCache",
    "TopKCacheWriter",
    "TopKTeacher",
    "TopP",
    "TotalVariation",
    "__version__",
    "backends",
    "distillation_loss",
    "linear_distillation_loss",
    "reference",
]
