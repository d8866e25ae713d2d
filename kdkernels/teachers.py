"""What a teacher can be beside a Tensor of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: What becomes of the probability that a sparse teacher does not tell: see :class:`TopKTeacher`.
TAILS = ("bucket", "renormalize", "teacher", "drop")
#: The most ids a row may have.
MOST_IDS = 4096


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


class TopKTeacher(NamedTuple):
    r"""A teacher by the log-probabilities of a few tokens a row, from a cache or an inference server.

    With S the ids of a row, p the given probabilities and q the student's over the whole vocabulary, P_S and Q_S their
    masses of S, and p̃, q̃ both normalised within S, forward KL becomes, by ``tail``,

    ==============  ==============================================  =========================================
    tail            loss                                            gradient · T
    ==============  ==============================================  =========================================
    "bucket"        KL([P_S, 1-P_S] ‖ [Q_S, 1-Q_S]) + P_S·KL(p̃‖q̃)  q - p in S; q·(P_S - Q_S)/(1 - Q_S) outside
    "renormalize"   KL(p̃ ‖ q̃)                                       q̃ - p̃ in S; 0 outside
    "teacher"       Σ_S p̃ log(p̃/q)                                  q - p̃·[u in S]
    "drop"          Σ_S p log(p/q)                                  P_S·q - p·[u in S]
    ==============  ==============================================  =========================================

    where "bucket" takes no mass outside S for less than 1e-7 (none where S is the whole vocabulary), and a row without
    ids, or (but in "bucket") one whose ids have no mass, has loss 0. docs/sparse-teachers.md says which to choose.

    "renormalize" serves ReverseKL and JensenShannon too, within S; it and "teacher" take any temperature T of the loss:
    the teacher's logits at S are its log-probabilities up to a constant, which p̃ does not see. "bucket" and "drop" need
    the mass itself, which is known at ``teacher_temperature`` alone: T must be that number.

    Made from logits by :meth:`from_logits`, from draws by :meth:`from_samples` and :meth:`sample`, from an inference
    server by :meth:`from_vllm`; kept on disk by :class:`kdkernels.TopKCacheWriter`.
    """

    #: (..., K) int32 or int64, 1 <= K <= 4096, with the rows of the student. Negative: no token (rows of unequal
    #: length); of an id that comes again in its row, the first counts alone.
    ids: Tensor
    #: (..., K) their log-probabilities: float32, bfloat16, float16 or float64; in any order. Where there is no token,
    #: anything.
    logprobs: Tensor
    #: "bucket", "renormalize", "teacher" or "drop".
    tail: str = "bucket"
    #: The temperature of the softmax that gave the log-probabilities.
    teacher_temperature: float = 1.0

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,  # (..., V)
        k: int,
        *,
        tail: str = "bucket",
        temperature: float = 1.0,
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TopKTeacher:
        """The k most likely tokens of a teacher of logits.

        log p_u = y_u/T - logsumexp(y/T), over the whole vocabulary; formed in fp32 (fp64 from fp64 logits), for a few
        rows at a time, of which a copy of 64 MiB (or of one row) exists.

        Args:
            logits: (..., V) float32, bfloat16, float16 or float64, on any device; views are read where they lie.
            k: 1 <= k <= V, at most 4096. Of tokens that tie for the last places, some.
            tail: see the class.
            temperature: T, which becomes ``teacher_temperature``.
            vocab_size: columns from there on are padding, no tokens.
            dtype: of the log-probabilities.

        Returns:
            A teacher with ids (..., k) int32 and log-probabilities (..., k), most likely first, on the logits' device,
            detached. NaN where the logits of a row hold NaN or +inf, or are all -inf.

        Raises:
            TypeError, ValueError: with the name of the argument that does not fit.
        """
        from kdkernels import _sparse_sources  # which needs this module

        _sparse_sources.check_tail(tail)
        return cls(*_sparse_sources.top_k(logits, k, temperature, vocab_size, dtype), tail, temperature)

    @classmethod
    def from_samples(
        cls,
        samples: Tensor,  # (..., N)
        *,
        teacher_temperature: float = 1.0,
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TopKTeacher:
        """A teacher known by tokens drawn from it, each on its own and with replacement.

        The probability of a token is its share of a row's draws, p̂_u = count_u/N, and ``tail`` is "drop". As Σ p̂ = 1
        and E p̂ = p, the gradient (q - p̂)/T is in expectation that of the whole teacher, (q - p)/T; a top-k's is not.
        From "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (arXiv 2503.16870), where it is called
        random sampling; here the tokens are drawn from the teacher itself.

        Only the gradient is unbiased: the loss Σ p̂ log(p̂/q) is larger than forward KL on average. Log-probabilities in
        16 bits are off by a rounding each (see :class:`kdkernels.TopKCacheWriter`), which is a bias.

        Args:
            samples: (..., N) integers, 1 <= N <= 4096; negative: no draw. N is counted in every row by itself.
            teacher_temperature: that of the softmax they were drawn from.
            vocab_size: the samples must be smaller (checked on the CPU).
            dtype: of the log-probabilities.

        Returns:
            A teacher with ids (..., N) int32, each once and ascending, then -1; and log-probabilities (..., N).

        Raises:
            TypeError, ValueError: with the name of the argument that does not fit.
        """
        from kdkernels import _sparse_sources

        _sparse_sources.check_positive("teacher_temperature", teacher_temperature)
        return cls(*_sparse_sources.counted(samples, vocab_size, dtype), "drop", teacher_temperature)

    @classmethod
    def sample(
        cls,
        logits: Tensor,  # (..., V)
        draws: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TopKTeacher:
        """Draws tokens from softmax(logits/T) and makes a teacher of them, as :meth:`from_samples` does.

        Drawn in fp64, so that a token of any probability comes as often as it should, for a few rows at a time, of
        which two copies of 64 MiB (or of one row) exist.

        Args:
            logits: (..., V) float32, bfloat16, float16 or float64, on any device; views are read where they lie.
            draws: N, 1 <= N <= 4096, the draws of each row.
            temperature: T, which becomes ``teacher_temperature``.
            generator: of random numbers, on the logits' device; None: the default one.
            vocab_size: columns from there on are padding and never drawn.
            dtype: of the log-probabilities.

        Returns:
            A teacher with ids (..., N) int32 and log-probabilities (..., N), on the logits' device. These are NaN where
            the logits of a row hold NaN or +inf, or are all -inf.

        Raises:
            TypeError, ValueError: with the name of the argument that does not fit.
        """
        from kdkernels import _sparse_sources

        return cls(*_sparse_sources.draw(logits, draws, temperature, generator, vocab_size, dtype), "drop", temperature)

    @classmethod
    def from_vllm(
        cls,
        positions: Sequence[Any],
        *,
        k: int | None = None,
        tail: str = "bucket",
        device: torch.device | str | None = None,
        teacher_temperature: float = 1.0,
    ) -> TopKTeacher:
        """The log-probabilities that vLLM returns with a request.

        Which row belongs to which: entry i of ``prompt_logprobs`` tells how likely each token was to be token i, given
        the tokens before it. The student tells the same by its logits at i - 1, so ``prompt_logprobs[1:]`` belongs to
        ``student_logits[:-1]`` (the first entry is None). Entry j of ``outputs[0].logprobs`` belongs to the student's
        logits at P + j - 1, where the prompt has P tokens.

        Beside the top-k, vLLM gives the token that came, wherever it ranks: a position has k or k + 1 ids. Its
        log-probabilities are those before temperature and penalties, unless ``logprobs_mode`` says otherwise: then
        ``teacher_temperature`` has to.

        Args:
            positions: a request's ``prompt_logprobs`` or ``outputs[i].logprobs``: per position None, which becomes a
                row without ids, or a dict from token id to an object that has ``logprob``, to a dict that has "logprob"
                (the server's JSON, where ids are text) or to a number; or vLLM's ``FlatLogprobs``. A list of these is a
                batch.
            k: the k most likely of each position; None: all, which may be at most 4096.
            tail: see the class.
            device: where the tensors go; None: the CPU.
            teacher_temperature: that of the softmax that gave the log-probabilities.

        Returns:
            A teacher with ids (L, K) int32 and log-probabilities (L, K) float32, of a batch (B, L, K); K is k, or as
            many as the longest position has. Where a position or a sequence is shorter: -1.

        Raises:
            TypeError, ValueError: with the argument, and the position where it is ``positions`` that does not fit.
        """
        from kdkernels import _vllm

        return cls(*_vllm.tensors(positions, k, tail, device, teacher_temperature), tail, teacher_temperature)
