"""The C++ kernels of kdkernels. Private: use kdkernels.distillation_loss.

Addresses are integers (``Tensor.data_ptr()``); 0 means none. dtype codes: 0 float32, 1 bfloat16, 2 float16, 3 float64.
"""

from collections.abc import Sequence

max_row_dims: int
cuda: bool

class Logits:
    def __init__(
        self,
        *,
        data: int,
        dtype: int,
        width: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        logit_scale: float,
        softcap: float,
    ) -> None: ...

class SparseTeacher:
    def __init__(
        self,
        *,
        tail: int,
        whole: bool,
        ids: int,
        ids_are_64_bit: bool,
        logprobs: int,
        logprobs_dtype: int,
        k: int,
        ids_stride: int,
        logprobs_stride: int,
        scale: float,
    ) -> None: ...

class RowProblem:
    def __init__(
        self,
        *,
        student: Logits,
        teacher: Logits = ...,
        sparse: SparseTeacher = ...,
        rows: int,
        vocab_size: int,
        divergence: int,
        parameters: Sequence[float],
        weights: int = ...,
        strong: int = ...,
        strong_amount: float = ...,
        mask: int = ...,
        mask_sizes: Sequence[int] = ...,
        mask_strides: Sequence[int] = ...,
        kd_weight: float,
        ce_weight: float,
        scale_by_temperature: bool,
        temperature: float,
        temperatures: int,
        labels: int,
        row_scale: int,
        scale_gradient: bool,
        loss: int,
        stats: int,
        gradient: int,
        gradient_dtype: int,
        gradient_sizes: Sequence[int],
        gradient_strides: Sequence[int],
    ) -> None: ...

def cpu_capabilities() -> list[str]: ...
def cpu_capability() -> str: ...
def cpu_row_loss(problem: RowProblem, *, threads: int) -> None: ...
def cpu_scale_rows(
    *,
    inp: int,
    out: int,
    dtype: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    rows: int,
    width: int,
    factors: int,
    threads: int,
) -> None: ...
def back_with_huge_pages(data: int, bytes: int, threads: int) -> None: ...

# Built with nvcc only (cuda is True). A plan: cluster, consumers, slot_columns, blocks_per_sm, ahead; or empty.
def cuda_why_not(device: int) -> str: ...
def cuda_why_not_rows(problem: RowProblem) -> str: ...
def cuda_row_loss(problem: RowProblem, *, stream: int, plan: Sequence[int]) -> None: ...
def cuda_scale_rows(
    *,
    inp: int,
    out: int,
    dtype: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    rows: int,
    width: int,
    factors: int,
    factor_stride: int,
    stream: int,
) -> None: ...
