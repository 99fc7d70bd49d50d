"""AMTMLLoss as one node of the graph: each line of the contract, against the float64 reference of the single operators."""

import copy
import ctypes
import sys

import pytest
import torch
from backends import CHOSEN, cpu_only, in_memory_of_the_cpu, takes
from parallel import on_threads

import amtml_fast as af
from amtml_fast.ops import whole_loss
from amtml_fast.testing import convert, relative_error, tensors

D = 6  # channels of the features
pytestmark = pytest.mark.usefixtures("fused")


def _problem(n=9, c=7, t=3, plane=(3, 3), scale=2.0):
    """student, teachers, labels, features; the first and the last are differentiated."""
    g = torch.Generator().manual_seed(n + c + t)
    here = torch.get_default_device()
    randn = lambda *shape: torch.randn(shape, generator=g, device="cpu").to(here)  # noqa: E731
    labels = torch.randint(0, c, (n,), generator=g, device="cpu").to(here)
    student, features = scale * randn(n, c), randn(n, D, *plane)
    return student.requires_grad_(), [scale * randn(n, c) for _ in range(t)], labels, features.requires_grad_()


def _run(loss, problem, backend=None):
    """Loss, the terms for the log, and the gradients to student, features and the adapter's parameters."""
    student, teachers, labels, features = problem
    with af.use_backend(backend or af.backend._active):
        out = loss(student, teachers, labels, features)
        leaves = [student, features, *loss.parameters()]
        return out, torch.autograd.grad(out.loss, leaves)


def _check(problem, loss_tolerance=1e-6, grad_tolerance=1e-5, teachers=3, **options):
    torch.manual_seed(1)
    loss = af.AMTMLLoss(af.TeacherAdapter(D, teachers, pool=options.pop("pool", "max")), angle_weight=20.0, **options)
    exact = copy.deepcopy(loss).double()
    want, want_grads = _run(exact, convert(problem, dtype=torch.float64), "reference")
    got, grads = _run(loss, problem)
    for name, g, w in zip(got._fields, got, want):
        torch.testing.assert_close(
            g.double(), w, rtol=0, atol=loss_tolerance * max(1.0, w.abs().max().item()), msg=name
        )
    for g, w in zip(grads, want_grads):
        assert g.shape == w.shape and relative_error(g, w) <= grad_tolerance
    return got, grads


OPTIONS = [
    {},
    {"mode": "sum", "reduction": "mean"},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"temperature": 1.0, "alpha": 0.0, "angle_trains_weights": True},
    {"alpha": 1.0, "delta": 0.05, "regularizer_weight": 0.1},
    {"pool": "avg", "angle_trains_weights": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_float64_reference(options):
    _check(_problem(), **options)


@pytest.mark.parametrize(
    "size",
    [{"n": 1}, {"n": 2}, {"c": 2}, {"t": 1}, {"n": 130, "c": 33}, {"plane": (1, 1)}, {"plane": (5, 13)}],
    ids=str,
)
def test_sizes(size):
    _check(_problem(**size), teachers=size.get("t", 3))


class _Given(torch.nn.Module):
    """The features are the weights."""

    def forward(self, features):
        return features.softmax(1)

    def regularizer(self):
        return torch.zeros(())


def test_more_rows_than_one_program_adds_up():
    student, teachers, labels, _ = _problem(n=4100, c=2)
    labels[::7] = -100
    problem = student, teachers, labels, torch.randn(4100, 3).requires_grad_()
    loss = af.AMTMLLoss(_Given(), angle_weight=0.0)
    want, want_grads = _run(loss, convert(problem, dtype=torch.float64), "reference")
    got, grads = _run(loss, problem)
    for g, w in zip((got.loss, got.ce, got.kl), (want.loss, want.ce, want.kl)):
        torch.testing.assert_close(g.double(), w, rtol=0, atol=1e-6)
    assert all(relative_error(g, w) <= 1e-5 for g, w in zip(grads, want_grads))


def test_one_class():
    """All rows are then the same, but for the rounding of the teachers' mixture: nothing to compare, nothing to learn."""
    got, grads = _run(af.AMTMLLoss(af.TeacherAdapter(D, 3), regularizer_weight=0.0), _problem(c=1))
    assert got.loss.isfinite() and got.ce == 0 and abs(got.kl) <= 1e-6 and not grads[0].any()


def test_no_rows_and_no_labels():
    loss = af.AMTMLLoss(af.TeacherAdapter(D, 3), regularizer_weight=0.0)
    student, teachers, labels, features = _problem(n=0)
    out, grads = _run(loss, (student, teachers, labels, features))
    assert out.loss == 0 and all(not g.any() for g in grads)
    student, teachers, _, features = _problem()
    got, grads = _check((student, teachers, None, features))
    assert got.ce == 0 and grads[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    """16-bit gradients are rounded once; teachers and features may have dtypes of their own."""
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 0}[dtype]
    if not takes(af.backend._active, dtype):
        pytest.skip("float64")
    problem = convert(_problem(), dtype=dtype)
    _, grads = _check(problem, grad_tolerance=1e-5 + step)
    assert grads[0].dtype == grads[1].dtype == dtype
    student, teachers, labels, features = _problem()
    mixed = (
        student,
        [teachers[0].bfloat16(), teachers[1].half(), teachers[2]],
        labels,
        convert((features,), dtype=dtype)[0],
    )
    _, grads = _check(mixed, grad_tolerance=1e-5 + step)
    assert grads[0].dtype == torch.float32 and grads[1].dtype == dtype


class _Weights(torch.nn.Module):
    """An adapter that is called: float64 weights of float32 features."""

    def forward(self, features):
        return features.double().mean((2, 3))[:, :3].softmax(-1)


@pytest.mark.parametrize("adapter", [lambda: af.TeacherAdapter(D, 3).double(), _Weights], ids=["parameters", "weights"])
def test_a_float64_adapter_makes_a_float64_loss_or_is_refused(adapter):
    student, teachers, labels, features = problem = _problem()
    loss = af.AMTMLLoss(adapter(), regularizer_weight=0.0)
    if not takes(af.backend._active, torch.float64):
        with pytest.raises(RuntimeError, match="got a float64 tensor"):
            loss(*problem)
        return
    got, want = loss(*problem), loss(student.double(), [t.double() for t in teachers], labels, features.double())
    assert got.loss.dtype == got.weights.dtype == torch.float64
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)


def test_strides_do_not_matter_and_inputs_are_not_written():
    student, teachers, labels, features = _problem()
    want = _run(loss := af.AMTMLLoss(af.TeacherAdapter(D, 3)), (student, teachers, labels, features))
    apart = lambda x: torch.stack([x.detach(), -x.detach()], -1)[..., 0]  # noqa: E731
    strided = (
        apart(student.t()).t().requires_grad_(),
        [teachers[0].t().contiguous().t(), apart(teachers[1]), teachers[2]],
        torch.stack([labels, labels], 1)[:, 0],
        features.detach().to(memory_format=torch.channels_last).requires_grad_(),
    )
    before = [t.detach().clone() for t in tensors(strided)]
    got = _run(loss, strided)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(strided)))
    assert torch.equal(got[0].loss, want[0].loss)
    assert all(relative_error(g, w) <= 1e-6 for g, w in zip(got[1], want[1]))
    sideways = (*strided[:3], features.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_())
    assert all(relative_error(g, w) <= 1e-6 for g, w in zip(_run(loss, sideways)[1], want[1]))
    row = [t[:1].expand(9, -1) for t in teachers]  # the same row for all
    _check((student, row, labels, features))


def test_masked_classes_and_ignored_rows():
    student, teachers, labels, features = _problem()
    with torch.no_grad():
        for t in (student, *teachers):
            t[:, 2] = -torch.inf
    labels[labels == 2] = 0
    labels[[1, 4]] = -100
    _, grads = _check((student, teachers, labels, features))
    assert not grads[0][:, 2].any()
    with torch.no_grad():
        for t in (student, *teachers):
            t[1] = torch.nan
    got, same = _run(af.AMTMLLoss(af.TeacherAdapter(D, 3)), (student, teachers, labels, features))
    assert got.loss.isfinite() and all(g.isfinite().all() for g in same)
    assert not same[0][[1, 4]].any()


@pytest.mark.parametrize(("scale", "tau"), [(1e4, 4.0), (2.0, 0.01), (2.0, 100.0)])
def test_extreme_logits_and_temperatures(scale, tau):
    """tau**2 magnifies the rounding of a KL of terms that nearly cancel; sharp rows that of distances."""
    rounding = max(1e-6, tau**2 * 2**-24)
    _, grads = _check(_problem(scale=scale), loss_tolerance=rounding, grad_tolerance=1e-3, temperature=tau)
    assert all(g.isfinite().all() for g in grads)


def test_nan_comes_out_where_nan_goes_in():
    student, teachers, labels, features = _problem()
    with torch.no_grad():
        features[3, 2, 1, 1] = torch.nan
    out, _ = _run(af.AMTMLLoss(af.TeacherAdapter(D, 3)), (student, teachers, labels, features))
    assert out.loss.isnan() and out.weights[3].isnan().all() and out.weights[:3].isfinite().all()


@cpu_only
def test_same_bits_twice_and_from_any_number_of_threads():
    problem = _problem(n=300, c=40, plane=(8, 8))
    loss = af.AMTMLLoss(af.TeacherAdapter(D, 3), angle_trains_weights=True)
    runs = on_threads((1, 1, 2, 3), lambda: _run(loss, problem))
    for out, grads in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip((*out, *grads), (*runs[0][0], *runs[0][1])))


def test_no_gradient_is_made_where_none_is_asked_for(monkeypatch, fused):
    made, namespace = [], whole_loss.kernels(fused)

    class Spy:
        def __getattr__(self, name):
            op = getattr(namespace, name).default
            return type("Op", (), {"default": staticmethod(lambda *args: made.append(op(*args)) or made[-1])})

    monkeypatch.setattr(whole_loss, "kernels", lambda name: Spy())
    student, teachers, labels, features = _problem()
    loss = af.AMTMLLoss(af.TeacherAdapter(D, 3), angle_trains_weights=True)
    with torch.no_grad():
        loss(student, teachers, labels, features)
    assert made[0][-1].numel() == made[0][-2].numel() == 0
    loss(student, teachers, labels, features.detach()).loss.backward()
    assert [g.numel() for g in made[-1]] == [student.numel(), 0, 0, 3 * D, D]
    loss.requires_grad_(False)(student, teachers, labels, features.detach()).loss.backward()
    assert [g.numel() for g in made[-1]] == [student.numel(), 0, 0, 0, 0]


@in_memory_of_the_cpu
def test_rows_past_2_31_elements():
    stride = 2**31 + 64
    storage = torch.UntypedStorage(4 * (stride + 64), device="cpu")  # untouched pages cost nothing
    far = lambda like: torch.empty(0).set_(storage, 0, (2, *like), (stride, *torch.empty(like).stride()))  # noqa: E731
    loss = af.AMTMLLoss(af.TeacherAdapter(D, 1))
    student, (teacher,), labels, features = _problem(n=2, t=1)
    for position in range(3):
        near = [student.detach(), teacher, features.detach()]
        want = loss(near[0], [near[1]], labels, near[2])
        near[position] = far(near[position].shape[1:]).copy_(near[position])
        got = loss(near[0], [near[1]], labels, near[2])
        torch.testing.assert_close(tuple(got), tuple(want))


@in_memory_of_the_cpu
def test_wrong_labels_are_named_before_anything_runs():
    student, teachers, labels, features = _problem()
    labels[5] = 7
    for backend in (af.backend._active, "reference"):
        with af.use_backend(backend), pytest.raises(ValueError, match=r"labels\[5\] must be in \[0, 7\) .* got 7"):
            af.AMTMLLoss(af.TeacherAdapter(D, 3))(student, teachers, labels, features)


@pytest.mark.skipif(CHOSEN != "emulated", reason="the emulator counts launches")
@pytest.mark.parametrize(
    "options, launches", [({}, 7), ({"angle_trains_weights": True}, 7), ({"angle_weight": 0.0}, 5)], ids=str
)
def test_few_launches(options, launches):
    """Of forward and backward, at the batch size of the paper: each costs about as much as it computes."""
    count = ctypes.CDLL(sys.modules["amtml_fast._C"].__file__).amtml_emulated_launches
    loss, problem = af.AMTMLLoss(af.TeacherAdapter(D, 3), **options), _problem(n=128, c=10, plane=(1, 1))
    before = count()
    _run(loss, problem)
    assert count() - before == launches


@pytest.mark.skipif(CHOSEN != "emulated", reason="the emulator counts launches")
def test_logits_that_must_be_copied_are_waited_for():
    """The rows' kernel reads them before it waits for the kernel in front, so that kernel must not be the copy."""
    count = ctypes.CDLL(sys.modules["amtml_fast._C"].__file__).amtml_emulated_early_launches
    loss, problem = af.AMTMLLoss(af.TeacherAdapter(D, 3)), _problem(n=128, c=10, plane=(1, 1))
    student, teachers, labels, features = problem
    by_columns = [t.detach().t().contiguous().t() for t in (student, *teachers)]
    early = []
    for logits in (
        (student, teachers),
        (by_columns[0].requires_grad_(), teachers),
        (student, [*teachers[:2], by_columns[3]]),
    ):
        before = count()
        loss(*logits, labels, features)
        early.append(count() - before)
    assert early == [4, 3, 3]
