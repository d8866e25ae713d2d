"""What to measure between teacher and student: the family of divergences, as frozen dataclasses.

Each names D(p, q) over one row, p the teacher's and q the student's distribution over the vocabulary. The definitions
are in docs/losses.md; :mod:`kdkernels.reference` computes them in plain PyTorch, the backends in fused sweeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kdkernels.strong_sets import Label, StrongSet, TopP


def _check_finite(owner: object, **values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{type(owner).__name__}: {name} must be a number, got {type(value).__name__}")
        if not -math.inf < value < math.inf:  # not math.isfinite, which torch.compile cannot trace
            raise ValueError(f"{type(owner).__name__}: {name} must be finite, got {value}")


def _check_range(owner: object, name: str, value: float, *, one_allowed: bool) -> None:
    _check_finite(owner, **{name: value})
    if not (0 <= value < 1 or (one_allowed and value == 1)):
        interval = "[0, 1]" if one_allowed else "[0, 1)"
        raise ValueError(f"{type(owner).__name__}: {name} must lie in {interval}, got {value}")


@dataclass(frozen=True)
class Divergence:
    """Base class: a divergence between a teacher's and a student's distribution."""

    name: ClassVar[str]

    def canonical(self) -> Divergence:
        """The simplest divergence that equals this one: its own special cases resolved."""
        return self

    def parameters(self) -> tuple[float, ...]:
        """The numbers a kernel of this ``name`` takes."""
        return ()

    def strong_set(self) -> StrongSet | None:
        """How the vocabulary is split, where it is."""
        return None


@dataclass(frozen=True)
class ForwardKL(Divergence):
    r"""KL(p‖q) = Σ p (log p - log q): Hinton et al. 2015 (arXiv 1503.02531)."""

    name: ClassVar[str] = "forward_kl"


@dataclass(frozen=True)
class ReverseKL(Divergence):
    r"""KL(q‖p) = Σ q (log q - log p): MiniLLM (arXiv 2306.08543)."""

    name: ClassVar[str] = "reverse_kl"


def _kl_at_the_ends(position: float, between: Divergence) -> Divergence:
    return ForwardKL() if position == 0 else ReverseKL() if position == 1 else between


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    r"""(1 - weight)·KL(p‖q) + weight·KL(q‖p), 0 <= weight <= 1."""

    weight: float = 0.5
    name: ClassVar[str] = "symmetric_kl"

    def __post_init__(self) -> None:
        _check_range(self, "weight", self.weight, one_allowed=True)

    def parameters(self) -> tuple[float, ...]:
        return (self.weight,)

    def canonical(self) -> Divergence:
        return _kl_at_the_ends(self.weight, self)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    r"""beta·KL(p‖M) + (1 - beta)·KL(q‖M) with M = beta·p + (1 - beta)·q: GKD (arXiv 2306.13649).

    beta = 0 means :class:`ForwardKL` and beta = 1 :class:`ReverseKL`, as in TRL and Liger (the formula itself tends
    to 0 there).
    """

    beta: float = 0.5
    name: ClassVar[str] = "jensen_shannon"

    def __post_init__(self) -> None:
        _check_range(self, "beta", self.beta, one_allowed=True)

    def parameters(self) -> tuple[float, ...]:
        return (self.beta,)

    def canonical(self) -> Divergence:
        return _kl_at_the_ends(self.beta, self)


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    r"""KL(p ‖ lam·p + (1 - lam)·q), 0 <= lam < 1: DistiLLM (arXiv 2402.03898)."""

    lam: float = 0.1
    name: ClassVar[str] = "skew_forward_kl"

    def __post_init__(self) -> None:
        _check_range(self, "lam", self.lam, one_allowed=False)

    def parameters(self) -> tuple[float, ...]:
        return (self.lam,)

    def canonical(self) -> Divergence:
        return ForwardKL() if self.lam == 0 else self


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    r"""KL(q ‖ (1 - lam)·p + lam·q), 0 <= lam < 1: DistiLLM (arXiv 2402.03898)."""

    lam: float = 0.1
    name: ClassVar[str] = "skew_reverse_kl"

    def __post_init__(self) -> None:
        _check_range(self, "lam", self.lam, one_allowed=False)

    def parameters(self) -> tuple[float, ...]:
        return (self.lam,)

    def canonical(self) -> Divergence:
        return ReverseKL() if self.lam == 0 else self


@dataclass(frozen=True)
class TotalVariation(Divergence):
    r"""½ Σ |p - q|; its subgradient at p = q is 0."""

    name: ClassVar[str] = "total_variation"


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    r"""-1/(αβ) Σ [p^α q^β - α/(α+β) p^(α+β) - β/(α+β) q^(α+β)]: ABKD (arXiv 2505.04560).

    Where α, β or α + β is 0, the limit. (1, 0) is :class:`ForwardKL`, (0, 1) :class:`ReverseKL`. Negative exponents
    are allowed and grow without bound where a probability tends to 0.
    """

    alpha: float = 0.5
    beta: float = 0.5
    name: ClassVar[str] = "alpha_beta"

    def __post_init__(self) -> None:
        _check_finite(self, alpha=self.alpha, beta=self.beta)

    def parameters(self) -> tuple[float, ...]:
        return (self.alpha, self.beta)

    def canonical(self) -> Divergence:
        if (self.alpha, self.beta) == (1, 0):
            return ForwardKL()
        if (self.alpha, self.beta) == (0, 1):
            return ReverseKL()
        return self


def _check_term_weights(owner: object, **weights: float | Tensor) -> None:
    for name, weight in weights.items():
        if isinstance(weight, Tensor):
            if weight.dim() != 0 or not weight.is_floating_point():
                raise ValueError(
                    f"{type(owner).__name__}: {name} must be a number or a 0-dim float Tensor, "
                    f"got shape {tuple(weight.shape)}, {weight.dtype}"
                )
            if weight.requires_grad:
                raise ValueError(f"{type(owner).__name__}: {name} requires grad, but gets none; detach it")
            continue
        _check_finite(owner, **{name: weight})
        if weight < 0:
            raise ValueError(f"{type(owner).__name__}: {name} must not be negative, got {weight}")


def _check_strong(owner: object, strong: StrongSet) -> None:
    if not isinstance(strong, StrongSet):
        hint = f"; did you mean {strong.__name__}(...)?" if isinstance(strong, type) else ""
        raise TypeError(
            f"{type(owner).__name__}: strong must be Label(), TopK(k), TopP(mass) or Given(mask), got {strong!r}{hint}"
        )


@dataclass(frozen=True)
class Decoupled(Divergence):
    r"""bcd·BCD + scd·P_S·SCD + wcd·P_W·WCD over a strong set S of tokens and the rest W.

    With P_S, P_W the teacher's and Q_S, Q_W the student's masses of the sets, and p̃, q̃ the distributions within a set,

    .. math:: BCD = KL([P_S, P_W] ‖ [Q_S, Q_W]), \quad SCD = KL(p̃_S ‖ q̃_S), \quad WCD = KL(p̃_W ‖ q̃_W)

    so that all weights 1 are :class:`ForwardKL` (Eq. 3 of the survey Yang et al. 2025; CAKD, arXiv 2410.14741).

    Args:
        strong: S, one of :class:`Label`, :class:`TopK`, :class:`TopP`, :class:`Given`.
        bcd, scd, wcd: the terms' weights, not negative: numbers, or 0-dim float Tensors, which may change from call to
            call and are not read back from the device.
        mass_weighted: False leaves out the factors P_S and P_W, which suppress a term where its set has little mass.
    """

    strong: StrongSet
    bcd: float | Tensor = 1.0
    scd: float | Tensor = 1.0
    wcd: float | Tensor = 1.0
    mass_weighted: bool = True
    name: ClassVar[str] = "decoupled"

    def __post_init__(self) -> None:
        _check_strong(self, self.strong)
        _check_term_weights(self, bcd=self.bcd, scd=self.scd, wcd=self.wcd)
        if not isinstance(self.mass_weighted, bool):
            raise TypeError(f"Decoupled: mass_weighted must be True or False, got {self.mass_weighted!r}")

    def parameters(self) -> tuple[float, ...]:
        """The terms' weights, 0 for one that is a Tensor (see :meth:`weights`), and whether masses multiply them."""
        numbers = (0.0 if isinstance(weight, Tensor) else float(weight) for weight in self.weights())
        return (*numbers, float(self.mass_weighted))

    def weights(self) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
        """The weights of BCD, SCD and WCD."""
        return self.bcd, self.scd, self.wcd

    def strong_set(self) -> StrongSet:
        return self.strong


@dataclass(frozen=True)
class DKD(Divergence):
    r"""alpha·TCKD + beta·NCKD: decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679).

    TCKD compares label against the rest, NCKD the distributions over the rest:
    ``Decoupled(Label(), bcd=alpha, wcd=beta, mass_weighted=False)``. Needs ``labels``.
    """

    alpha: float | Tensor = 1.0
    beta: float | Tensor = 8.0
    name: ClassVar[str] = "dkd"

    def __post_init__(self) -> None:
        _check_term_weights(self, alpha=self.alpha, beta=self.beta)

    def canonical(self) -> Divergence:
        return Decoupled(Label(), bcd=self.alpha, wcd=self.beta, mass_weighted=False)


@dataclass(frozen=True)
class CAKD(Divergence):
    r"""BCD + alpha·SCD + beta·WCD: correlation-aware knowledge distillation (arXiv 2410.14741).

    ``Decoupled(strong, scd=alpha, wcd=beta, mass_weighted=False)``.
    """

    alpha: float | Tensor
    beta: float | Tensor
    strong: StrongSet
    name: ClassVar[str] = "cakd"

    def __post_init__(self) -> None:
        _check_term_weights(self, alpha=self.alpha, beta=self.beta)
        _check_strong(self, self.strong)

    def canonical(self) -> Divergence:
        return Decoupled(self.strong, scd=self.alpha, wcd=self.beta, mass_weighted=False)


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    r"""(g_h·KL(p‖q) + g_t·KL(q‖p)) / (g_h + g_t): adaptive KL (AKL, arXiv 2404.02657).

    The head is :class:`TopP` (mu), the tail the rest; g_h and g_t are Σ |p - q| over each, constants to the gradient.
    0 where p = q.

    Args:
        mu: the head's mass, 0 < mu <= 1.
    """

    mu: float = 0.5
    name: ClassVar[str] = "adaptive_kl"

    def __post_init__(self) -> None:
        _check_finite(self, mu=self.mu)
        if not 0 < self.mu <= 1:
            raise ValueError(f"AdaptiveKL: mu must lie in (0, 1], got {self.mu}")

    def strong_set(self) -> StrongSet:
        return TopP(self.mu)


BY_NAME: dict[str, type[Divergence]] = {
    cls.name: cls
    for cls in (
        ForwardKL,
        ReverseKL,
        SymmetricKL,
        JensenShannon,
        SkewForwardKL,
        SkewReverseKL,
        TotalVariation,
        AlphaBeta,
        AdaptiveKL,
    )
}


def resolve(divergence: Divergence | str) -> Divergence:
    """A Divergence from itself or from its name with default parameters, in canonical form.

    Raises:
        ValueError: a name that is not one of :data:`BY_NAME`.
        TypeError: anything else, a class instead of an instance included.
    """
    if isinstance(divergence, str):
        if divergence not in BY_NAME:
            raise ValueError(f"divergence: unknown name {divergence!r}; expected one of {', '.join(BY_NAME)}")
        return BY_NAME[divergence]().canonical()
    if not isinstance(divergence, Divergence):
        hint = f"; did you mean {divergence.__name__}()?" if isinstance(divergence, type) else ""
        raise TypeError(f"divergence must be a Divergence or its name, got {divergence!r}{hint}")
    return divergence.canonical()
