"""Every operator, on every backend that runs here, against the float64 reference: values and every gradient."""

import pytest
import torch
from backends import CHOSEN, DEVICE, FUSED, cpu_only, run_on, takes

import amtml_fast as af
from amtml_fast import backend
from amtml_fast.ops import _base
from amtml_fast.ops.hint import hint_pool
from amtml_fast.ops.multi_teacher_kd import multi_teacher_kd
from amtml_fast.terms import KDOptions
from amtml_fast.testing import CASES, convert, relative_error, tensors, value_and_grads

GRID = [
    pytest.param(case, size, options, id=f"{case.op}-{'x'.join(map(str, size))}-{i}")
    for case in CASES.values()
    for size in case.sizes
    for i, options in enumerate(case.variants)
    if len(size) > 2 or options.get("dim1") != 0 or case.op != "dual_softmax"
]

# What Triton's interpreter and the CUDA emulator leave out for the sake of time: of all but the first variant the 16-bit dtypes; of
# the first one of both, from one size to the next in turn; and all but float32's first variant of sizes that only fill more threads.
SLOW = [] if CHOSEN == "gpu" else ["triton", "cuda"]
MANY = {
    (256, 257, 5), (96, 257, 7, 3), (33, 100, 9, 3), (5, 1030, 2), (33, 100, 3), (67, 10), (150, 20), (19, 300), (37, 300),
    (18, 8, 8, 16, 8),
}  # fmt: skip


def _runs(name, case, size, options, dtype):
    if name not in SLOW or dtype == torch.float64:  # which is refused
        return True
    first, turn = options == case.variants[0], case.sizes.index(size) % 2
    if dtype == torch.float32:
        return first or size not in MANY
    return first and size not in MANY and dtype == (torch.bfloat16, torch.float16)[turn]


# Loss and gradient against float64 on the same (rounded) inputs. A 16-bit gradient is rounded once, to half a step.
STEP = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize(
    ("case", "size", "options", "dtype", "name"),
    [
        pytest.param(*grid.values, dtype, name, id=f"{grid.id}-{str(dtype).removeprefix('torch.')}-{name}")
        for grid in GRID
        for dtype in STEP
        for name in (*FUSED, "reference")
        if _runs(name, *grid.values, dtype)
    ],
)
def test_matches_the_float64_reference(case, size, options, dtype, name):
    if not takes(name, dtype):
        with run_on(name), pytest.raises(RuntimeError, match="its kernels compute in float32, got a float64 tensor"):
            case.function(*case.inputs(*size, dtype=dtype), **options)
        return
    with run_on(name):
        args = case.inputs(*size, dtype=dtype)
    want, want_grads = value_and_grads(case.reference, convert(args, dtype=torch.float64), **options)
    with run_on(name):
        got, grads = value_and_grads(case.function, args, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == (dtype if case.op == "dual_softmax" else wide)
    exact = dtype == torch.float64
    step = STEP[dtype]  # what a 16-bit result may differ by from the exact one, rounded: a tie broken the other way
    assert relative_error(got, want.to(got.dtype)) <= (1e-12 if exact else 1e-6) + (step if got.dtype == dtype else 0)
    for leaf, grad, want_grad in zip((t for t in tensors(args) if t.requires_grad), grads, want_grads):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert relative_error(grad, want_grad.to(dtype)) <= (1e-11 if exact else 1e-5) + step


def test_the_compiled_backends_are_under_test():
    assert "cpp" in FUSED or CHOSEN
    for name in FUSED:
        why_not = {op: backend.why_not(op, name, backend.DEVICES[name][0]) for op in backend.KERNELS[name]}
        assert why_not and not any(why_not.values()), why_not


@pytest.mark.parametrize("op", ["teacher_weights", "multi_teacher_kd"])
def test_figure_4_of_the_paper(op):
    """Eq 7's arithmetic as printed: probabilities are mixed, not logarithms. Plane, dog, digit 2."""
    probs = torch.tensor([[0.57, 0.31, 0.12], [0.48, 0.14, 0.26], [0.28, 0.36, 0.41]])
    weights = torch.tensor([[0.70, 0.25, 0.05], [0.73, 0.02, 0.25], [0.10, 0.38, 0.52]])
    printed = [0.48, 0.42, 0.38]
    if op == "teacher_weights":  # weights come out of the adapter as the softmax of its scores
        got = af.teacher_weights(weights.log(), torch.eye(3), torch.ones(3))
        torch.testing.assert_close(got, weights / weights.sum(1, keepdim=True))
        return
    teachers = [torch.stack([p, 1 - p], 1).log() for p in probs.unbind(1)]
    for name in (*FUSED, "reference"):
        with run_on(name):
            options = KDOptions(1.0, 0.7, "mixture", "none", True, -100, 0.0)
            on_device = [t.to(DEVICE) for t in teachers], weights.to(DEVICE)
            terms = multi_teacher_kd(torch.zeros(3, 2), *on_device, None, options)
        assert [round(p, 2) for p in terms.soft_targets[:, 0].tolist()] == printed


@cpu_only
@pytest.mark.parametrize("name", ["cpp", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_gradcheck(case, name):
    args = case.inputs(*case.small, dtype=torch.float64)
    leaves = [t for t in tensors(args) if t.requires_grad]
    for options in case.variants:
        if options.get("dim1") == 0:
            continue

        def function(*_, options=options):
            return case.function(*args, **options)

        with af.use_backend(name):
            torch.autograd.gradcheck(function, leaves)
            if name == "reference" and options == case.variants[-1]:
                torch.autograd.gradgradcheck(function, leaves)


@cpu_only
@pytest.mark.parametrize("mode", ["mixture", "sum"])
def test_gradcheck_through_the_probabilities(mode):
    """The extra outputs that the angle loss of AMTMLLoss is fed with are differentiable, together with the loss."""
    student, teachers, weights, labels = CASES["multi_teacher_kd"].inputs(4, 5, 2, dtype=torch.float64)

    def parts(z, w):
        options = KDOptions(2.0, 0.7, mode, "batchmean", True, -100, 0.1)
        terms = multi_teacher_kd(z, teachers, w, labels, options)
        return terms.loss, terms.student_probs, terms.soft_targets

    with af.use_backend("cpp"):
        torch.autograd.gradcheck(parts, (student, weights))


@pytest.mark.parametrize("margin", [3, 10, 20, 40])
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_angle_gradient_on_rows_of_a_trained_network(margin, tau, fused):
    """Clustered rows, where float32 distances and sums cancel: within 1e-6, or twice the error of plain float32."""
    n = 64 if fused == "cpp" or CHOSEN == "gpu" else 32  # an interpreter's time
    label = torch.randint(0, 100 * n // 64, (n,))
    args = tuple(
        torch.softmax(
            (torch.nn.functional.one_hot(label, 100) * margin + torch.randn(n, 100)) / tau, 1
        ).requires_grad_()
        for _ in range(2)
    )
    _, want = value_and_grads(af.reference.angle_loss, convert(args, dtype=torch.float64))
    _, plain = value_and_grads(af.reference.angle_loss, args)
    _, got = value_and_grads(af.angle_loss, args)
    for g, p, w in zip(got, plain, want):
        assert g.isfinite().all()
        assert relative_error(g, w) <= max(1e-6, 2 * relative_error(p, w))


def test_max_pool_ties_go_to_the_first_maximum(on):
    features = torch.zeros(2, 3, 2, 2, requires_grad=True)
    theta, v = torch.randn(2, 3), torch.randn(3)
    for layout in (features, features.to(memory_format=torch.channels_last), features.transpose(2, 3)):
        (grad,) = torch.autograd.grad(af.teacher_weights(layout, theta, v)[:, 0].sum(), features)
        assert (grad[:, :, 0, 0] != 0).all() and grad.flatten(2)[:, :, 1:].count_nonzero() == 0


@pytest.mark.parametrize(
    "plane", [(1, 1), (1, 3), (2, 2), (1, 5), (3, 3), (1, 15), (4, 4), (1, 17), (7, 7), (8, 8), (9, 11)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_max_pool_of_any_plane(plane, dtype, fused):
    """Few distinct values, infinities and NaN: the first maximum, or the first NaN, wherever vectors begin and end."""
    if not takes(fused, dtype):
        pytest.skip("float64")
    d, pixels = 64, plane[0] * plane[1]
    features = torch.randint(-3, 3, (5, d, pixels)).to(dtype)
    features[1, ::3] = -torch.inf
    features[2][torch.rand(d, pixels) < 0.2] = torch.inf
    features[3][torch.rand(d, pixels) < 0.1] = torch.nan
    features[4] = torch.nan
    factors = torch.ones(2, d, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    want = torch.from_numpy(features.float().cpu().numpy().argmax(2)).to(features.device)  # a NaN counts as the maximum
    dense = features.view(5, d, *plane)
    strided = torch.stack([dense, dense], -1)[..., 0]
    for x in (dense, dense.contiguous(memory_format=torch.channels_last), strided):
        _, pooled, index = _base.kernels(fused).teacher_weights_fwd.default(x, factors, factors[0], True)
        assert torch.equal(index.long(), want)
        torch.testing.assert_close(pooled, features.gather(2, want[..., None])[..., 0].to(pooled.dtype), equal_nan=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_teacher_weights_in_either_layout(memory_format, fused):
    args = CASES["teacher_weights"].inputs(5, 24, 7, 6, 3)
    want, want_grads = value_and_grads(af.reference.teacher_weights, convert(args, dtype=torch.float64))
    features = args[0].detach().to(memory_format=memory_format).requires_grad_()
    got, grads = value_and_grads(af.teacher_weights, (features, *args[1:]))
    assert grads[0].is_contiguous(memory_format=memory_format)
    assert relative_error(got, want) <= 1e-6
    assert all(relative_error(g, w) <= 1e-5 for g, w in zip(grads, want_grads))


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_a_single_channel_has_any_stride(pool, fused):
    """In channels_last it may be 1, which says nothing of where its pixels are."""
    _, theta, v = CASES["teacher_weights"].inputs(5, 1, 7, 6, 3)
    features = torch.randn(5 * 42).as_strided((5, 1, 7, 6), (42, 1, 6, 1)).requires_grad_()
    args = features, theta, v
    want, want_grads = value_and_grads(af.reference.teacher_weights, convert(args, dtype=torch.float64), pool=pool)
    got, grads = value_and_grads(af.teacher_weights, args, pool=pool)
    assert relative_error(got, want) <= 1e-6
    assert all(relative_error(g, w) <= 1e-5 for g, w in zip(grads, want_grads))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "planes", [((8, 8), (8, 8)), ((8, 12), (4, 4)), ((7, 5), (3, 9))], ids=["one", "halved", "uneven"]
)
def test_hints_with_channels_last(planes, normalize, fused):
    maps = [torch.randn(3, c, *plane) for c, plane in zip((18, 7), planes)]
    weight = torch.randn(7, 18, requires_grad=True)

    def leaves(layout):
        return *(m.clone(memory_format=layout).requires_grad_() for m in maps), weight

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        args = convert(leaves(torch.channels_last), dtype=dtype)
        assert args[0].is_contiguous(memory_format=torch.channels_last)
        want, want_grads = value_and_grads(
            af.reference.hint_loss, convert(args, dtype=torch.float64), normalize=normalize
        )
        got, grads = value_and_grads(af.hint_loss, args, normalize=normalize)
        assert relative_error(got, want) <= tolerance
        assert all(relative_error(g, w) <= tolerance for g, w in zip(grads, want_grads))
        if fused == "cpp":  # no copy: the gradients lie as the maps do
            assert all(g.stride() == m.stride() for g, m in zip(grads[:2], args))


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fakes_of_hints_know_channels_last(dtype):
    last = torch.channels_last
    student, teacher = (torch.randn(2, c, 6, 6, dtype=dtype).contiguous(memory_format=last) for c in (5, 3))
    kernels = torch.ops.amtml
    for normalize in (False, True):
        torch.library.opcheck(kernels.hint_pool_fwd.default, (student, 3, 2, normalize))
        pooled, norms = kernels.hint_pool_fwd(student, 3, 2, normalize)
        torch.library.opcheck(kernels.hint_pool_bwd.default, (pooled, student, norms, normalize))
    torch.library.opcheck(kernels.hint_fwd.default, (student, teacher, torch.randn(3, 5), True, True, True))


@pytest.mark.parametrize("margin", [10, 15, 20])
def test_angle_gradient_of_soft_rows_beside_tight_pairs(margin, fused):
    """Two confident rows of a class are very close: their 1/distance must cancel in the gradient of every other row."""
    n = 64 if fused == "cpp" or CHOSEN == "gpu" else 32  # an interpreter's time
    label = torch.arange(n) % (n // 6)
    scale = torch.full((n, 1), float(margin))
    scale[::4] = 1.0  # a quarter of the rows are soft
    logits = [(torch.nn.functional.one_hot(label, 10) * scale + 0.3 * torch.randn(n, 10)).double() for _ in range(2)]
    probs = tuple(z.softmax(1).float().requires_grad_() for z in logits)

    def through_softmax(grads):  # d loss / d logits, exactly: without the component that a common shift takes away
        return [q * (g - (g * q).sum(1, keepdim=True)) for g, q in zip(grads, (p.detach().double() for p in probs))]

    _, want = value_and_grads(af.reference.angle_loss, convert(probs, dtype=torch.float64))
    _, got = value_and_grads(af.angle_loss, probs)
    for g, w in zip(through_softmax(got), through_softmax(want)):
        assert relative_error(g[::4], w[::4]) <= 1e-6


# Windows of one size (1, 2, 4: constants; 3, 16), of two sizes, overlapping ones, all of an axis; rows past a vector.
POOLED = [
    (4, 4, 4, 4),
    (6, 6, 3, 3),
    (8, 16, 2, 4),
    (6, 9, 2, 3),
    (16, 34, 1, 17),
    (16, 36, 16, 9),
    (7, 9, 5, 4),
    (5, 21, 3, 20),
    (3, 32, 2, 2),
]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", POOLED)
def test_pooling_by_any_windows(size, dtype, normalize, fused):
    if not takes(fused, dtype):
        pytest.skip("float64")
    feature_map = torch.randn(2, 3, *size[:2]).to(dtype)
    feature_map[0, :, 0, 0] *= 1e-13  # shorter than what it is divided by
    args = (feature_map.requires_grad_(),)
    want, want_grads = value_and_grads(
        lambda m: af.reference.hint_pool(m, *size[2:], normalize), convert(args, dtype=torch.float64)
    )
    got, grads = value_and_grads(lambda m: hint_pool(fused, m, *size[2:], normalize), args)
    if size[:2] == size[2:] and not normalize:
        assert got.data_ptr() == feature_map.data_ptr()
    exact, step = dtype == torch.float64, STEP[dtype]
    assert relative_error(got, want) <= (1e-12 if exact else 1e-6)
    short = feature_map.detach().double().norm(dim=1, keepdim=True) < 1e-12  # there the gradient is 1e12 times as large
    for part in (short, ~short):
        assert relative_error(grads[0] * part, want_grads[0] * part) <= (1e-11 if exact else 1e-5) + step


@cpu_only
@pytest.mark.parametrize("size", [(1, 256, 2, 512, 2), (1, 257, 2, 512, 2)])
def test_hints_on_either_side_of_the_largest_weight(size):
    args = CASES["hint"].inputs(*size)
    want, want_grads = value_and_grads(af.reference.hint_loss, convert(args, dtype=torch.float64))
    with run_on("cpp"):
        got, grads = value_and_grads(af.hint_loss, args)
        node = type(af.hint_loss(*args).grad_fn).__name__  # name() is not there in torch 2.11
    assert node == ("HintBackward" if size[1] == 256 else "HintMSEBackward")
    assert relative_error(got, want) <= 1e-6
    assert all(relative_error(g, w) <= 1e-5 for g, w in zip(grads, want_grads))
