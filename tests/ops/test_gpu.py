"""What only a GPU can show: graphs, syncs, launches, streams, devices, large memory. ``make gpu`` runs it."""

import pytest
import torch
from backends import CHOSEN

import amtml_fast as af
from amtml_fast.testing import CASES, tensors, value_and_grads

pytestmark = pytest.mark.skipif(CHOSEN != "gpu", reason="needs a GPU (AMTML_TEST_BACKENDS=gpu)")
each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@pytest.fixture(autouse=True)
def plain_empties():
    """Without the fill of new memory, which costs launches of its own."""
    torch.use_deterministic_algorithms(False)


def _step(case, args, options):
    leaves = [t for t in tensors(args) if t.requires_grad]
    upstream = torch.ones((), device="cuda")

    def step():
        out = case.function(*args, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream.expand(out.shape))

    return step


def _whole_loss():
    student, teachers, _, labels = CASES["multi_teacher_kd"].inputs(128, 100, 3)
    features = torch.randn(128, 64, 8, 8, requires_grad=True)
    loss = af.AMTMLLoss(af.TeacherAdapter(64, 3))
    leaves = [student, features, *loss.parameters()]

    def step():
        out = loss(student, teachers, labels, features)
        return out.loss.detach(), *torch.autograd.grad(out.loss, leaves)

    return step


@each_case
def test_captured_in_a_graph_and_without_a_sync(case, fused):
    for options in case.variants[:2]:
        if options.get("dim1") != 0:
            _check_graph(_step(case, case.inputs(*case.parallel), options))


def test_whole_loss_is_captured_in_a_graph_and_without_a_sync(fused):
    _check_graph(_whole_loss())


def _check_graph(step):
    want = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for t in got:
        t.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, want))  # the same bits: kernels are deterministic


def test_whole_loss_launches_at_most_10_kernels():
    with af.use_backend("cuda"), torch.device("cuda"):
        step = _whole_loss()
        step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(names) <= 10, names


def test_runs_on_the_current_stream(fused):
    """Work that is queued before it on another stream is seen, without a synchronization."""
    student, teacher = torch.randn(512, 1000, requires_grad=True), torch.empty(512, 1000)
    values, stream = torch.randn(512, 1000), torch.cuda.Stream()
    want = af.multi_teacher_kd_loss(student, [values], None)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        teacher.copy_(values)
        got = af.multi_teacher_kd_loss(student, [teacher], None)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [32000, 50257, 128256])
def test_long_vocabularies(classes, dtype, fused):
    """Rows over a cluster of blocks, and rows that start at odd addresses."""
    case = CASES["multi_teacher_kd"]
    args = case.inputs(6, classes, 3, dtype=dtype)
    exact = tuple([x.double() for x in a] if isinstance(a, list) else a for a in args)
    exact = exact[0].detach().double().requires_grad_(), exact[1], exact[2].detach().double().requires_grad_(), exact[3]
    for options in case.variants[:2]:
        got, grads = value_and_grads(case.function, args, **options)
        want, want_grads = value_and_grads(case.reference, exact, **options)
        assert (got.double() - want).norm() <= 1e-6 * want.norm()
        step = 2**-8 if dtype == torch.bfloat16 else 0
        assert all((g.double() - w).norm() <= (1e-5 + step) * w.norm() for g, w in zip(grads, want_grads))


def test_rows_past_2_31_elements_on_the_gpu(fused):
    stride = 2**31 + 64
    far = torch.empty_strided((2, 64), (stride, 1), dtype=torch.bfloat16)
    near = torch.randn(2, 64).bfloat16()
    far.copy_(near)
    want = af.multi_teacher_kd_loss(near, [near.flip(0)], None, reduction="none")
    assert torch.equal(af.multi_teacher_kd_loss(far, [near.flip(0)], None, reduction="none"), want)


def test_angle_of_8192_rows_takes_less_than_4_gigabytes(fused):
    student, teacher = (torch.randn(8192, 1000).softmax(1) for _ in range(2))
    student.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(af.angle_loss(student, teacher), student)
    assert torch.cuda.max_memory_allocated() - before < 4e9
