"""The GPU backends against the reference in fp64: the cases of the CPU kernels, and what only a GPU can get wrong."""

from __future__ import annotations

import pytest
import torch
from checks import DIVERGENCES, against_reference, assert_near, logits_pair, masked_pair
from gpu_tools import captured, synchronisations
from test_native import ALL, WIDTHS
from test_options import LABELS, VIEWS
from torch import Tensor

import kdkernels as kd
from kdkernels import backends

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# What each divergence takes its numbers from differs; the arguments around it are the same code for all.
SOME = {name: DIVERGENCES[name] for name in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")}
A_FEW = pytest.mark.parametrize("divergence", SOME.values(), ids=SOME)


def check(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **options) -> None:
    on_gpu = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    against_reference(student.cuda(), teacher.cuda(), None if labels is None else labels.cuda(), **on_gpu)


@ALL
@EACH_DTYPE
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(backend, divergence, dtype, width):
    student, teacher = logits_pair(5 if width <= 1000 else 2, width, dtype=dtype)
    # Of one column, the gradient is 0 up to the rounding of a probability of 1.
    check(student, teacher, divergence=divergence, reduction="sum", floor=0.1 if width == 1 else 0.0)


@ALL
@EACH_DTYPE
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0, 20.0])
def test_temperatures(backend, divergence, dtype, temperature):
    if divergence == kd.AlphaBeta(0.5, -0.5) and temperature < 1:
        pytest.skip("e^(gap/2T) exceeds what the dtype holds; so does the definition")
    student, teacher = logits_pair(8, 3001, dtype=dtype)
    # T = 0.1 magnifies the rounding of a difference of logits by ten: 2.01e-6 was seen.
    slack = 2.0 if temperature < 0.5 else 1.0
    check(student, teacher, divergence=divergence, temperature=temperature, reduction="sum", slack=slack)


# Clusters of 1 to 16 blocks, few and many threads, shares of one slot and of several, one and two blocks an SM.
PLANS = [
    (1, 512, 8192, 1, 0),
    (1, 512, 4096, 1, 1),
    (2, 256, 4096, 2, 1),
    (4, 128, 1024, 2, 0),
    (8, 64, 512, 1, 1),
    (16, 384, 6144, 1, 1),
]


@pytest.mark.parametrize("numbers", PLANS, ids=lambda numbers: "-".join(map(str, numbers)))
@A_FEW
@EACH_DTYPE
def test_plans(plan, numbers, divergence, dtype):
    cluster, consumers, slot, blocks, ahead = numbers
    plan(cluster, consumers, slot // 2 if dtype == torch.float32 else slot, blocks, ahead)
    with backends.use("native"):
        for rows, width in ((300, 1003), (40, 20000 if dtype != torch.float32 else 10000)):
            student, teacher = logits_pair(rows, width, dtype=dtype)
            check(student, teacher, divergence=divergence, temperature=1.3)


def test_a_plan_that_does_not_fit(plan):
    plan(1, 512, 8192, 1, 0)
    student, teacher = (x.cuda() for x in logits_pair(2, 100000, dtype=torch.bfloat16))
    with backends.use("native"), pytest.raises(ValueError, match="does not fit the plan"):
        kd.distillation_loss(student, teacher)


@ALL
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("width", [50, 50257])
def test_models_that_nearly_agree(backend, divergence, noise, width):
    student, teacher = logits_pair(4, width, noise=noise)
    check(student, teacher, divergence=divergence)


@ALL
@pytest.mark.parametrize("noise", [0.5, 0.3, 0.1, 0.03])
def test_from_far_to_near_in_16_bits(backend, divergence, noise):
    # Rows on both sides of where the short forms give way to the accurate ones.
    for spread in (1.0, 4.0):
        student, teacher = logits_pair(16, 8000, noise=noise, spread=spread, dtype=torch.bfloat16)
        check(student, teacher, divergence=divergence, reduction="none")


@ALL
@EACH_DTYPE
def test_teacher_is_student(backend, divergence, dtype):
    student = logits_pair(3, 5003, dtype=dtype)[0].cuda().requires_grad_()
    loss = kd.distillation_loss(student, student.detach().clone(), divergence=divergence, temperature=1.3)
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


@ALL
@EACH_DTYPE
def test_a_shift_of_all_logits_changes_nothing(backend, divergence, dtype):
    student, teacher = logits_pair(3, 1024, dtype=torch.float64)
    student, teacher = (student * 16).round() / 16, (teacher * 16).round() / 16
    shifts = (0.0, 4.0, -12.0) if dtype != torch.float32 else (0.0, 1000.0, -4096.0)
    for shift in shifts:
        check(student.to(dtype), (teacher + shift).to(dtype), divergence=divergence)


@ALL
@EACH_DTYPE
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_logits(backend, divergence, dtype, scale):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * (2 * torch.rand(6, 2051, generator=generator) - 1) for _ in range(2))
    teacher[3:] = student[3:]
    teacher[4, ::2] += 1.0
    if isinstance(divergence, kd.AlphaBeta) and min(divergence.alpha, divergence.beta) <= 0:
        pytest.skip("unbounded where a probability tends to 0: beyond fp16, and with a negative exponent beyond fp32")
    # Saturated rows: an error of 1e-8 of a probability stands against gradients of 0.
    check(student.to(dtype), teacher.to(dtype), divergence=divergence, floor=1e-2)


@ALL
@EACH_DTYPE
def test_one_column_far_above_the_rest(backend, divergence, dtype):
    # Where a reference guessed from a few columns is off by hundreds of nats.
    if isinstance(divergence, kd.AlphaBeta) and min(divergence.alpha, divergence.beta) <= 0:
        pytest.skip("unbounded where a probability tends to 0")
    student, teacher = logits_pair(4, 30011, dtype=dtype)
    student[0, 29000], teacher[1, 17000], student[2, 5] = 80.0, 40.0, 800.0
    student[3, 20000] = teacher[3, 20000] = 300.0
    check(student, teacher, divergence=divergence, floor=1e-2, reduction="none")


@A_FEW
@EACH_DTYPE
def test_whole_stretches_masked(backend, divergence, dtype):
    # -inf wherever a warp first looks, in one model or in both, far from 0 and near it.
    student, teacher = ((256 * x).round() / 256 for x in logits_pair(5, 40000))  # exact 1000 away from 0
    student, teacher = student.to(dtype), teacher.to(dtype)
    student[0, :39000] = teacher[0, :39000] = -torch.inf
    student[1, 1000:] = teacher[1, 1000:] = -torch.inf
    student[2, :20000] = teacher[2, :20000] = -torch.inf
    student[2] -= 1000
    teacher[3, :] -= 300 if dtype != torch.float16 else 100
    student[4, ::2] = teacher[4, ::2] = -torch.inf
    check(student, teacher, divergence=divergence, reduction="none")
    teacher[1, :] = logits_pair(1, 40000, dtype=dtype, seed=3)[1]
    if divergence.name in ("total_variation", "jensen_shannon"):  # finite where the models' supports differ
        check(student, teacher, divergence=divergence, reduction="none")


@ALL
@EACH_DTYPE
def test_tokens_masked_in_both_models_contribute_nothing(backend, divergence, dtype):
    student, teacher = masked_pair(both=[0, 5, 1001, 1002])
    check(student.to(dtype), teacher.to(dtype), divergence=divergence)


def test_a_teacher_probability_of_zero_contributes_nothing_to_forward_kl(backend):
    check(*masked_pair(teacher_only=[3, 500]), divergence="forward_kl")


@EACH_DTYPE
def test_a_student_that_forbids_what_the_teacher_does_is_infinitely_far(backend, dtype):
    student, teacher = (x.to(dtype).cuda() for x in masked_pair(student_only=[3]))
    leaf = student.requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, divergence="forward_kl")
    loss.backward()
    assert loss.item() == torch.inf
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize(
    "divergence",
    [kd.JensenShannon(), kd.SkewForwardKL(), kd.SkewReverseKL(), kd.TotalVariation(), kd.AlphaBeta()],
    ids=lambda d: d.name,
)
@EACH_DTYPE
def test_one_sided_masks_are_finite_for_bounded_divergences(backend, divergence, dtype):
    student, teacher = masked_pair(student_only=[3, 8], teacher_only=[4, 1002])
    check(student.to(dtype), teacher.to(dtype), divergence=divergence)


@A_FEW
@EACH_DTYPE
def test_nan_stays_in_its_row(backend, divergence, dtype):
    for side in (0, 1):
        for column in (0, 2500, 5002):
            pair = [x.cuda() for x in logits_pair(3, 5003, dtype=dtype)]
            pair[side][1, column] = torch.nan
            leaf = pair[0].requires_grad_()
            loss = kd.distillation_loss(leaf, pair[1], divergence=divergence, reduction="none")
            loss.sum().backward()
            assert loss.isnan().tolist() == [False, True, False]
            assert leaf.grad[1].isnan().all()
            assert not leaf.grad[[0, 2]].isnan().any()


def test_bad_row_temperatures_and_labels_are_nan_in_their_row(backend):
    student, teacher = (x.cuda() for x in logits_pair(8, 1000, dtype=torch.bfloat16))
    temperature = torch.tensor([1.0, 0.0, -1.0, torch.inf, torch.nan, 2.0, 1.0, 1.0]).cuda()
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 1000, -7]).cuda()
    leaf = student.requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, labels, temperature=temperature, ce_weight=0.5, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, True, True, False, True, True]
    loss[[0, 5]].sum().backward()
    assert torch.isfinite(leaf.grad[[0, 5]]).all()


@EACH_DTYPE
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_weights_and_reductions(backend, dtype, reduction, temperature, weighted):
    student, teacher = logits_pair(3, 4, 1000, dtype=dtype)
    weight = torch.tensor([[1.0, 2.0, 0.5, 0.0], [1.0, 0.0, 3.0, 1.0], [0.25, 1.0, 1.0, 1.0]]) if weighted else None
    options = {"reduction": reduction, "temperature": temperature, "weight": weight}
    check(student, teacher, LABELS, kd_weight=0.7, ce_weight=0.3, **options)
    check(student, teacher, LABELS, **options)


@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
@A_FEW
@pytest.mark.parametrize("scale_by_temperature", [True, False])
def test_temperature_per_row(backend, divergence, ce_weight, scale_by_temperature):
    student, teacher = logits_pair(3, 4, 1000)
    temperature = torch.tensor([[0.1, 0.5, 1.0, 2.0], [3.0, 1.0, 20.0, 1.5], [1.0, 1.1, 7.0, 0.9]])
    options = {"divergence": divergence, "ce_weight": ce_weight, "scale_by_temperature": scale_by_temperature}
    check(student, teacher, LABELS, temperature=temperature, **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cross_entropy_alone(backend, temperature):
    student, teacher = logits_pair(3, 4, 1000)
    student[:, :, 500] = -torch.inf  # nothing of an infinite divergence leaks into it
    check(student, teacher, LABELS, kd_weight=0.0, ce_weight=1.0, temperature=temperature)


@EACH_DTYPE
def test_ignored_rows_are_not_read(backend, dtype):
    student, teacher = logits_pair(3, 4, 1000, dtype=dtype)
    student[LABELS == -100] = torch.nan
    teacher[LABELS == -100] = torch.inf
    check(student, teacher, LABELS, ce_weight=0.5)
    check(student, teacher, weight=(LABELS != -100).float(), divergence="jensen_shannon")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(backend, reduction):
    student, teacher = (x.cuda() for x in logits_pair(4, 100))
    leaf = student.requires_grad_()
    labels = torch.full((4,), -100).cuda()
    loss = kd.distillation_loss(leaf, teacher, labels, ce_weight=0.5, reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 100), (2, 0, 100), (0, 3, 1)])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_rows(backend, shape, inplace):
    leaf = torch.empty(shape, device="cuda", requires_grad=True)
    loss = kd.distillation_loss(leaf * 1, torch.empty(shape, device="cuda"), inplace=inplace)
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad.shape == shape


@pytest.mark.parametrize("widths", [(1000, 1000), (1024, 1008), (1000, 1064)])
@EACH_DTYPE
def test_padding_is_no_token(backend, dtype, widths):
    student, _ = logits_pair(5, widths[0], dtype=dtype)
    _, teacher = logits_pair(5, widths[1], dtype=dtype, seed=1)
    student[:, 997:], teacher[:, 997:] = torch.nan, torch.inf
    labels = torch.tensor([0, 996, -100, 5, 5])
    check(student, teacher, labels, vocab_size=997, ce_weight=0.5, reduction="sum")
    leaf = student.cuda().requires_grad_()
    kd.distillation_loss(leaf, teacher.cuda(), vocab_size=997).backward()
    assert (leaf.grad[:, 997:] == 0).all()


ALIGNED_VIEWS = {name: VIEWS[name] for name in ("shifted", "every other row", "expanded", "rows backwards in memory")}


@pytest.mark.parametrize("view", ALIGNED_VIEWS.values(), ids=ALIGNED_VIEWS)
@EACH_DTYPE
def test_views_are_read_where_they_lie(backend, view, dtype):
    student, teacher = logits_pair(3, 5, 1008, dtype=dtype)
    on_gpu = student.cuda(), teacher.cuda()
    against_reference(view(on_gpu[0]), view(on_gpu[1]), divergence="reverse_kl", reduction="sum")
    against_reference(view(on_gpu[0]), view(on_gpu[1]).contiguous(), reduction="sum")


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("width", [1003, 1008])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_view_by_the_automatic_choice(any_dtypes, view, width, dtype):
    student, teacher = (x.cuda() for x in logits_pair(3, 5, width, dtype=dtype))
    against_reference(view(student), view(teacher), divergence="reverse_kl", reduction="sum")


@EACH_DTYPE
@pytest.mark.parametrize("width", [1001, 1002, 1003, 1004, 1005, 1006, 1007])
def test_rows_at_every_offset_from_a_boundary(backend, dtype, width):
    student, teacher = logits_pair(17, width, dtype=dtype)
    check(student, teacher, reduction="sum")
    check(student, teacher, divergence="jensen_shannon", reduction="sum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_mixed_dtypes(any_dtypes, dtype, teacher_dtype):
    student, teacher = logits_pair(3, 1030)
    check(student.to(dtype), teacher.to(teacher_dtype), divergence="jensen_shannon", reduction="sum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logit_transforms(any_dtypes, dtype):
    student, teacher = logits_pair(3, 4, 1003, dtype=dtype)
    options = {"student_logit_scale": 2.0, "student_softcap": 5.0, "teacher_logit_scale": 0.5, "teacher_softcap": 30.0}
    for divergence in ("forward_kl", "jensen_shannon"):
        check(
            student, teacher, LABELS, divergence=divergence, ce_weight=0.5, temperature=1.5, reduction="sum", **options
        )


def test_what_the_cuda_kernels_leave_to_triton_is_an_error_when_they_are_asked_for():
    if backends.why_not("native", torch.device("cuda")) is not None:
        pytest.skip("no CUDA kernels here")
    student, teacher = (x.cuda() for x in logits_pair(3, 1003))
    with backends.use("native"):
        with pytest.raises(RuntimeError, match="student and teacher logits differ in dtype"):
            kd.distillation_loss(student, teacher.bfloat16())
        with pytest.raises(RuntimeError, match="logit scales and softcaps"):
            kd.distillation_loss(student, teacher, student_softcap=30.0)
        with pytest.raises(RuntimeError, match="lie differently within 16 bytes"):
            kd.distillation_loss(student[:, 1:], teacher[:, :-1])
        with pytest.raises(RuntimeError, match="float64 is for the reference"):
            kd.distillation_loss(student.double(), teacher)
        wide = torch.randn(1, 1_000_000, device="cuda")
        with pytest.raises(RuntimeError, match="a vocabulary of 1000000 does not fit"):
            kd.distillation_loss(wide, wide)


def test_large_vocabularies_stay_on_the_cuda_kernels():
    if backends.why_not("native", torch.device("cuda")) is not None:
        pytest.skip("no CUDA kernels here")
    with backends.use("native"):
        for dtype, width in ((torch.bfloat16, 400_001), (torch.float16, 400_000), (torch.float32, 200_003)):
            student, teacher = logits_pair(2, width, dtype=dtype)
            check(student, teacher, divergence="jensen_shannon", reduction="sum")


@EACH_DTYPE
@A_FEW
@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_inplace_gives_the_same_gradient_in_the_logits_memory(backend, dtype, divergence, noise):
    student, teacher = (x.cuda() for x in logits_pair(3, 4, 1003, dtype=dtype, noise=noise))
    options = {"divergence": divergence, "ce_weight": 0.5, "temperature": 2.0}
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = kd.distillation_loss(one, teacher, LABELS.cuda(), **options)
    expected.backward()
    logits = two * 1
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    loss = kd.distillation_loss(logits, teacher, LABELS.cuda(), inplace=True, **options)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(two.grad, one.grad)
    assert seen == [logits.data_ptr()]


@ALL
def test_stats_without_gradient(backend, divergence):
    student, teacher = (x.cuda() for x in logits_pair(3, 4, 1000, dtype=torch.bfloat16))
    options = {"ce_weight": 0.3, "temperature": 2.0, "divergence": divergence, "kd_weight": 3.0}
    loss, stats = kd.distillation_loss(student, teacher, LABELS.cuda(), return_stats=True, **options)
    expected_loss, expected = kd.reference.distillation_loss(
        student.double(), teacher.double(), LABELS.cuda(), return_stats=True, **options
    )
    assert_near("loss", loss, expected_loss, 2e-6)
    for name, actual, want in zip(stats._fields, stats, expected, strict=True):
        assert (actual is None) == (want is None)
        if actual is not None:
            assert_near(name, actual, want, 2e-6)
            assert (actual[LABELS.cuda() == -100] == 0).all()


@A_FEW
@EACH_DTYPE
def test_repeated_runs_agree_bitwise(backend, divergence, dtype):
    student, teacher = (x.cuda() for x in logits_pair(200, 32000, dtype=dtype))
    results = []
    for _ in range(4):
        leaf = student.clone().requires_grad_()
        loss = kd.distillation_loss(leaf, teacher, divergence=divergence, temperature=2.0, reduction="none")
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_backward_scales_on_the_device_and_twice(backend):
    student, teacher = (x.cuda() for x in logits_pair(5, 1003, dtype=torch.bfloat16))
    leaf = student.requires_grad_()
    loss = 3.0 * kd.distillation_loss(leaf, teacher, reduction="sum")
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, second)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, -1.0]).cuda()
    rows = kd.distillation_loss(leaf, teacher, reduction="none")
    (third,) = torch.autograd.grad(rows, leaf, weights)
    assert_near("weighted", third * 3, first * weights[:, None], 1e-2)
    assert (third[1] == 0).all()


def test_no_synchronisation_with_the_host(backend):
    student, teacher = (x.cuda() for x in logits_pair(6, 5000, dtype=torch.bfloat16))
    labels = torch.tensor([0, -100, 5, 7, 9, 4999]).cuda()
    options = {"temperature": torch.ones(6).cuda() * 2, "ce_weight": 0.5, "weight": torch.rand(6).cuda()}
    options["normalizer"] = torch.tensor(5).cuda()

    def step():
        leaf = student.clone().requires_grad_()
        (2.0 * kd.distillation_loss(leaf, teacher, labels, return_stats=True, **options)[0]).backward()

    step()
    with synchronisations("error"):
        step()


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaf is older than the side stream
def test_cuda_graphs(backend):
    student, teacher = (x.cuda() for x in logits_pair(6, 5000, dtype=torch.bfloat16))
    static = student.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = kd.distillation_loss(static, teacher, divergence="jensen_shannon", temperature=1.5)
        (gradient,) = torch.autograd.grad(2.0 * loss, static)
        return loss, gradient

    graph, (loss, gradient) = captured(step)
    with torch.no_grad():
        static.copy_(student.flip(0))
    graph.replay()
    expected = step()
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


def test_the_current_stream_is_used(backend):
    student, teacher = (x.cuda() for x in logits_pair(64, 32000, dtype=torch.bfloat16))
    expected = kd.distillation_loss(student, teacher)
    late = torch.zeros_like(student)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(student)
        actual = kd.distillation_loss(late, teacher)
    stream.synchronize()
    assert torch.equal(actual, expected)


def test_the_device_of_the_tensors_is_used(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    student, teacher = (x.to("cuda:1") for x in logits_pair(4, 5000, dtype=torch.bfloat16))
    assert torch.cuda.current_device() == 0
    against_reference(student, teacher, divergence="jensen_shannon")
    against_reference(student, teacher, temperature=2.0)


def test_more_than_2_31_elements(backend):
    rows, width = 8200, 262144  # 2.15e9 elements, 4.3 GB a tensor
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of GPU memory")
    student = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    teacher = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    leaf = student.requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, reduction="none")
    loss.sum().backward()
    for picked in (0, 4096, rows - 1):
        one = student.detach()[picked : picked + 1].clone().requires_grad_()
        expected = kd.distillation_loss(one, teacher[picked : picked + 1], reduction="none")
        expected.sum().backward()
        assert_near("loss", loss[picked : picked + 1], expected, 1e-6)
        # Alone, a row is laid over more of the chip: sums add up in another order, and a few roundings go another way.
        assert_near("gradient", leaf.grad[picked : picked + 1], one.grad, 1e-3)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_peak_memory(backend, inplace, divergence):
    rows, width = 512, 128256
    teacher = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    leaf = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.arange(rows, device="cuda")

    def step() -> None:
        leaf.grad = None
        logits = leaf.view_as(leaf) if inplace else leaf
        kd.distillation_loss(
            logits, teacher, labels, divergence=divergence, ce_weight=0.5, temperature=2.0, inplace=inplace
        ).backward()

    step()
    leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradient = 0 if inplace else rows * width * 2
    assert gradient <= peak <= gradient + (4 << 20), f"{peak / 2**20:.2f} MiB"


def test_torch_compile(backend):
    student, teacher = (x.cuda() for x in logits_pair(5, 1000, dtype=torch.bfloat16))

    def loss_of(z: Tensor) -> Tensor:
        return kd.distillation_loss(z, teacher, temperature=2.0) * 2

    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = loss_of(one)
    expected.backward()
    actual = torch.compile(loss_of, fullgraph=True)(two)
    actual.backward()
    assert_near("loss", actual, expected, 1e-6)
    assert_near("gradient", two.grad, one.grad, 1e-2)


def test_a_gpu_without_a_name_takes_the_first_backend_that_serves_it(monkeypatch):
    monkeypatch.delenv("KDKERNELS_BACKEND", raising=False)
    device = torch.device("cuda")
    serving = [name for name in backends.ORDER if backends.why_not(name, device) is None]
    assert backends.choose(device, torch.bfloat16, torch.bfloat16) == serving[0]
    assert backends.choose(device, torch.bfloat16, torch.float64) == "reference"
