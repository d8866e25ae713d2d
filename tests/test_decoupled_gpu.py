"""The decoupled family on a GPU: both backends against the reference in fp64, and the threshold against a sort."""

from __future__ import annotations

import pytest
import torch
from checks import against_reference, assert_near, logits_pair
from decoupled_cases import FAMILY, labels_for, light_weak_set, on_device, tied
from gpu_tools import synchronisations
from test_gpu import EACH_DTYPE
from torch import Tensor

import kdkernels as kd
from kdkernels import reference

pytestmark = pytest.mark.gpu

EACH = pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
KINDS = {name: FAMILY[name] for name in ("label", "dkd", "cakd_top_k", "cakd_top_p", "cakd_given", "adaptive_kl")}
A_FEW = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def check(student: Tensor, teacher: Tensor, make, labels: Tensor | None = None, **options) -> None:
    width = options.get("vocab_size") or student.shape[-1]
    labels = labels_for(student.shape[0], width) if labels is None and student.dim() == 2 else labels
    divergence = on_device(make(width) if callable(make) else make, "cuda")
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    on_gpu = None if labels is None else labels.cuda()
    try:
        against_reference(student.cuda(), teacher.cuda(), on_gpu, divergence=divergence, **moved)
    except RuntimeError as error:
        if "do not lie at multiples of 16 bytes" not in str(error):
            raise
        pytest.skip("the CUDA kernels leave these rows and their mask to Triton")


def gpu_stats(student, teacher, divergence, **options) -> tuple[kd.RowStats, kd.RowStats]:
    """Of the backend at hand and of the reference in fp64."""
    options = {"divergence": on_device(divergence, "cuda"), "return_stats": True, **options}
    student, teacher = student.cuda(), teacher.cuda()
    _, actual = kd.distillation_loss(student, teacher, **options)
    _, expected = reference.distillation_loss(student.double(), teacher.double(), **options)
    return actual, expected


@EACH
@EACH_DTYPE
@pytest.mark.parametrize("width", [1, 7, 1000, 1008, 50257, 128256])
def test_widths(backend, make, dtype, width):
    student, teacher = logits_pair(5 if width <= 1000 else 2, width, dtype=dtype)
    check(student, teacher, make, reduction="sum", floor=0.1 if width <= 7 else 0.0)


@A_FEW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [32000, 151936, 262144])
def test_vocabularies(backend, make, dtype, width):
    student, teacher = logits_pair(3, width, dtype=dtype)
    check(student, teacher, make, reduction="sum")


@EACH
@EACH_DTYPE
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0, 20.0])
def test_temperatures(backend, make, dtype, temperature):
    student, teacher = logits_pair(8, 3008, dtype=dtype)
    check(student, teacher, make, temperature=temperature, slack=2.0 if temperature < 0.5 else 1.0)


@EACH
@EACH_DTYPE
@pytest.mark.parametrize("noise", [1e-3, 0.05])
def test_close_models(backend, make, dtype, noise):
    student, teacher = logits_pair(6, 5008, dtype=torch.float32, noise=noise)
    check(student.to(dtype), teacher.to(dtype), make, reduction="sum")


@A_FEW
@EACH_DTYPE
def test_equal_models(backend, make, dtype):
    student, _ = logits_pair(4, 2000, dtype=dtype)
    student = student.cuda().requires_grad_()
    divergence = on_device(make(2000), "cuda")
    loss = kd.distillation_loss(student, student.detach(), labels_for(4, 2000).cuda(), divergence=divergence)
    loss.backward()
    assert float(loss.detach()) < 1e-12
    assert float(student.grad.abs().max()) < 1e-8


@A_FEW
@EACH_DTYPE
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_arguments(backend, make, dtype, ce_weight, temperature):
    student, teacher = logits_pair(3, 4, 1008, dtype=dtype)
    labels = torch.tensor([[3, -100, 0, 999], [-100, 5, 5, -100], [17, 2, -100, 1]])
    weight = torch.tensor([[1.0, 2.0, 0.5, 0.0], [1.0, 0.0, 3.0, 1.0], [0.25, 1.0, 1.0, 1.0]])
    for options in ({"weight": weight}, {"reduction": "none"}, {"vocab_size": 992, "scale_by_temperature": False}):
        here = labels.clamp(max=991) if "vocab_size" in options else labels
        divergence = make(options.get("vocab_size", 1008))
        check(
            student, teacher, divergence, here, ce_weight=ce_weight, temperature=temperature, kd_weight=0.7, **options
        )
    temperatures = torch.tensor([[0.1, 0.5, 1.0, 2.0], [3.0, 1.0, 20.0, 1.5], [1.0, 1.1, 7.0, 0.9]])
    check(student, teacher, make(1008), labels, ce_weight=ce_weight, temperature=temperatures)
    check(student, teacher, make(1008), labels, ce_weight=0.3, kd_weight=0.0, temperature=temperature)


@A_FEW
@EACH_DTYPE
def test_shifted_views_and_in_place(backend, make, dtype):
    student, teacher = logits_pair(2, 5, 1001, dtype=dtype)
    labels = labels_for(8, 1001).view(2, 4)
    if backend == "native":  # rows that student, teacher and gradient lay out alike
        student, teacher = student[..., :1000].contiguous(), teacher[..., :1000].contiguous()
        labels = labels.clamp(max=999)
    width = student.shape[-1]
    check(student[:, :-1], teacher[:, :-1], make(width), labels)
    divergence = on_device(make(width), "cuda")
    gradients = []
    for inplace in (False, True):
        leaf = student.cuda().requires_grad_()
        logits = leaf * 1.0
        kd.distillation_loss(
            logits,
            teacher.cuda(),
            None if labels is None else one_more(labels).cuda(),
            divergence=divergence,
            inplace=inplace,
        ).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def one_more(labels: Tensor) -> Tensor:
    """Labels of one more column, ignored."""
    return torch.nn.functional.pad(labels, (0, 1), value=-100)


@EACH_DTYPE
@pytest.mark.parametrize("per_row", [False, True])
def test_masks(backend, dtype, per_row):
    student, teacher = logits_pair(6, 1008, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    wide = torch.rand(*((6, 2064) if per_row else (1008,)), generator=generator) < 0.1
    masks = [wide[..., :1008], wide[..., 1040:2048]] if per_row else [wide]
    for mask in masks:
        check(student, teacher, kd.CAKD(1.0, 2.0, kd.Given(mask)))
        check(student, teacher, kd.Decoupled(kd.Given(mask[..., :992]), wcd=2.0), vocab_size=992)


@EACH_DTYPE
def test_masks_of_any_alignment(any_dtypes, dtype):
    student, teacher = logits_pair(6, 1001, dtype=dtype)
    wide = torch.rand(6, 2003, generator=torch.Generator().manual_seed(1)) < 0.1
    for mask in (wide[..., :1001], wide[..., 1002:2003], wide[0, 3:1004]):
        check(student, teacher, kd.CAKD(1.0, 2.0, kd.Given(mask)))


@pytest.mark.parametrize("name", ["label", "top_5", "top_p_0.5"])
def test_all_weights_one_are_forward_kl(backend, name):
    student, teacher = logits_pair(4, 4992)
    labels = labels_for(4, 4992).cuda()
    mask = kd.Decoupled(kd.Given(torch.arange(4992) < 3))
    for (z, y), divergence in (
        ((student, teacher), FAMILY[name](4992)),
        (light_weak_set(4, 4992, 3), mask),
        (light_weak_set(4, 4992, 3), kd.Decoupled(kd.TopK(3))),
    ):
        gradients = []
        losses = []
        for which in (on_device(divergence, "cuda"), kd.ForwardKL()):
            leaf = z.cuda().requires_grad_()
            loss, stats = kd.distillation_loss(
                leaf, y.cuda(), labels, divergence=which, reduction="none", return_stats=True
            )
            loss.sum().backward()
            losses.append(loss)
            gradients.append(leaf.grad)
            if stats.bcd is not None:
                weak = reference.distillation_loss(
                    z.double().cuda(), y.double().cuda(), labels, divergence=which, return_stats=True
                )[1]
                assert_near("wcd", stats.wcd, weak.wcd, 2e-6)
        assert_near("loss", losses[0], losses[1], 1e-6)
        assert_near("gradient", gradients[0], gradients[1], 1e-6)


@A_FEW
@EACH_DTYPE
def test_stats(backend, make, dtype):
    for noise in (1.0, 0.01):
        student, teacher = logits_pair(6, 4000, dtype=torch.float32, noise=noise)
        labels = labels_for(6, 4000).cuda()
        labels[2] = -100
        actual, expected = gpu_stats(student.to(dtype), teacher.to(dtype), make(4000), labels=labels)
        for name, value in actual._asdict().items():
            other = getattr(expected, name)
            assert (value is None) == (other is None), name
            if value is not None:
                # A term alone may be far smaller than what it is a part of; BCD between far models is a difference.
                floor = (0.1 if noise == 1 else 0.0) if name != "bcd" else 1.0 if noise == 1 else 1e-3
                assert_near(name, value, other, 2e-6, floor=floor)
                assert float(value[2]) == 0


def teachers(width: int) -> dict[str, Tensor]:  # (6, width) each
    """Rows of every shape a threshold is looked for in."""
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(6, width, generator=generator)
    peaked = normal.clone()
    peaked[:, : min(9, width)] += torch.linspace(14, 6, min(9, width))
    half_dead = normal.clone()
    half_dead[:, ::2] = -torch.inf
    return {
        "normal": normal,
        "wide": 5 * normal,
        "peaked": peaked[:, torch.randperm(width, generator=generator)],
        "tied": tied(6, width)[1],
        "constant": torch.full((6, width), 0.75),
        "half dead": half_dead,
        "high": normal + 500,
        "low": normal - 90,
        "tiny": 1e-6 * normal,
        "huge": 1e4 * normal,
        "zeros": torch.zeros(6, width) * normal.sign(),
    }


@EACH_DTYPE
@pytest.mark.parametrize("width", [5, 300, 4099, 50304, 128256])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_thresholds(backend, dtype, width, temperature):
    student = torch.randn(6, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    sets = [kd.TopK(k) for k in sorted({1, 2, 32, 300, width // 2, width}) if 1 <= k <= width]
    sets += [kd.TopP(mass) for mass in (0.01, 0.5, 0.9, 0.999)]
    for name, teacher in teachers(width).items():
        teacher = teacher.to(dtype)
        for strong in sets:
            actual, expected = gpu_stats(student, teacher, kd.Decoupled(strong), temperature=temperature)
            mass, exact = actual.strong_mass_teacher.double(), expected.strong_mass_teacher
            agree = (mass - exact).abs() <= 4e-6 * exact + 1e-12
            if isinstance(strong, kd.TopP):
                # Where a set's mass is the one asked for up to rounding, either set is right.
                p = (teacher.cuda().double() / temperature).softmax(-1)
                edge = p.masked_fill(~reference.strong_tokens(teacher.cuda(), p.log(), strong), torch.inf).amin(-1)
                count = (p == edge[:, None]).sum(-1)
                close = ((exact - strong.mass).abs() < 1e-5) | ((exact - count * edge - strong.mass).abs() < 1e-5)
                agree |= close
            assert agree.all(), f"{name}, {strong}: {mass.tolist()} for {exact.tolist()}"


@A_FEW
@EACH_DTYPE
def test_extremes(backend, make, dtype):
    student, teacher = logits_pair(4, 512, dtype=dtype)
    labels = labels_for(4, 512)
    student[1] *= 30
    teacher[2] *= 30
    check(student, teacher, make, labels, reduction="none", floor=1e-2, slack=2.0)
    if dtype != torch.float16:
        huge = [1500 * logits.clamp(-6, 6) for logits in (student, teacher)]  # to ±1e4
        check(*huge, make, labels, reduction="none", floor=1e-2, slack=2.0)
    dead = torch.zeros(512, dtype=torch.bool)
    dead[10:60] = True
    alive = torch.where(dead[labels], 99, labels)
    check(student.masked_fill(dead, -torch.inf), teacher.masked_fill(dead, -torch.inf), make, alive, slack=2.0)


@A_FEW
def test_a_row_of_nan_is_its_own(backend, make):
    student, teacher = logits_pair(4, 704)
    for spoilt in (student, teacher):
        kept = spoilt.clone()
        spoilt[1, 5] = torch.nan
        leaf = student.cuda().requires_grad_()
        divergence = on_device(make(704), "cuda")
        loss, stats = kd.distillation_loss(
            leaf, teacher.cuda(), labels_for(4, 704).cuda(), divergence=divergence, reduction="none", return_stats=True
        )
        loss.sum().backward()
        for values in (loss, *(stat for stat in stats if stat is not None), leaf.grad.sum(-1)):
            assert values.isnan().tolist() == [False, True, False, False]
        spoilt.copy_(kept)


def test_a_label_out_of_range_is_nan(backend):
    student, teacher = (x.cuda() for x in logits_pair(3, 100))
    loss = kd.distillation_loss(
        student, teacher, torch.tensor([5, 100, -1], device="cuda"), divergence=kd.DKD(), reduction="none"
    )
    assert loss.isnan().tolist() == [False, True, True]


@A_FEW
@EACH_DTYPE
def test_masked_rows_and_no_rows(backend, make, dtype):
    student, teacher = logits_pair(9, 1504, dtype=dtype)
    labels = labels_for(9, 1504)
    labels[::2] = -100
    spoilt = teacher.clone()
    spoilt[::2] = torch.nan  # not read
    check(student, spoilt, make, labels)
    check(student[:0], teacher[:0], make, labels[:0])


@A_FEW
@EACH_DTYPE
def test_the_same_bits_every_time(backend, make, dtype):
    student, teacher = (x.cuda() for x in logits_pair(40, 33008, dtype=dtype))
    labels = labels_for(40, 33008).cuda()
    divergence = on_device(make(33008), "cuda")
    runs = []
    for _ in range(3):
        leaf = student.clone().requires_grad_()
        loss, stats = kd.distillation_loss(leaf, teacher, labels, divergence=divergence, return_stats=True)
        loss.backward()
        runs.append([loss.detach(), leaf.grad, *(stat for stat in stats if stat is not None)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@A_FEW
def test_without_a_gradient(backend, make):
    student, teacher = (x.cuda() for x in logits_pair(5, 3008, dtype=torch.bfloat16))
    options = {"divergence": on_device(make(3008), "cuda"), "reduction": "none", "return_stats": True}
    labels = labels_for(5, 3008).cuda()
    with torch.no_grad():
        alone, stats = kd.distillation_loss(student, teacher, labels, **options)
    loss, others = kd.distillation_loss(student.requires_grad_(), teacher, labels, **options)
    assert_near("loss", alone, loss, 1e-6)
    for one, other in zip(stats, others, strict=True):
        if one is not None:
            assert_near("stats", one, other, 2e-6, floor=0.1)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaf is older than the side stream
@A_FEW
def test_never_waits_for_the_device_and_is_captured(backend, make):
    student, teacher = (x.cuda() for x in logits_pair(6, 2000, dtype=torch.bfloat16))
    labels = labels_for(6, 2000).cuda()
    divergence = on_device(make(2000), "cuda")
    weighted = kd.Decoupled(kd.TopK(3), torch.tensor(0.5, device="cuda"), 1.0, torch.tensor(2.0, device="cuda"))
    leaf = student.clone().requires_grad_()

    def step(which) -> Tensor:
        leaf.grad = None
        kd.distillation_loss(leaf, teacher, labels, divergence=which).backward()
        return leaf.grad

    for which in (divergence, weighted):
        expected = step(which).clone()
        with synchronisations("error"):
            step(which)
        graph = torch.cuda.CUDAGraph()
        leaf.grad = None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(which)
            leaf.grad = None
            with torch.cuda.graph(graph, stream=stream):
                gradient = step(which)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_on_the_device(backend, dtype):
    student, teacher = logits_pair(5, 1200, dtype=dtype)
    numbers = kd.Decoupled(kd.TopK(9), 0.5, 2.0, 3.0)
    tensors = kd.Decoupled(kd.TopK(9), torch.tensor(0.5), 2.0, torch.tensor(3.0, dtype=torch.float64))
    gradients = []
    for divergence in (numbers, on_device(tensors, "cuda"), tensors):
        leaf = student.cuda().requires_grad_()
        kd.distillation_loss(leaf, teacher.cuda(), divergence=divergence).backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize(
    "numbers", [(4, 384, 8192, 1, 0), (2, 384, 8192, 1, 0), (8, 128, 4096, 2, 0), (8, 256, 8192, 1, 1)]
)
@A_FEW
def test_plans(plan, make, numbers):
    """Other layouts over the chip give the same."""
    student, teacher = logits_pair(11, 50000, dtype=torch.bfloat16)
    plan(*numbers)
    with kd.backends.use("native"):
        check(student, teacher, make)
