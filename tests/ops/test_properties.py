"""Drawn cases against the float64 reference: shapes, dtypes, strides, temperatures, masks, extreme and degenerate rows.

``make test`` runs the same 2,000 and more cases each time; ``make fuzz`` draws new ones, many times as many.
"""

import dataclasses
import itertools
import math
import os

import pytest
import torch
from backends import CHOSEN, DEVICE, FUSED, takes
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import amtml_fast as af
from amtml_fast.ops.divergence import ALL_MODES, DIVERGENCES
from amtml_fast.terms import DEFAULT_BETA
from amtml_fast.testing import CASES, convert, tensors, value_and_grads

FUZZ = int(os.environ.get("AMTML_FUZZ", "0"))  # how many times as many cases, drawn anew
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
STEP = {torch.float32: 2**-24, torch.float64: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """At these sizes a second thread only costs time; other tests run on all of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(cases):
    return settings(
        max_examples=cases * max(FUZZ, 1),
        derandomize=not FUZZ,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


_calls = itertools.count()


def _turn_of(name):
    """Triton (interpreted, or compiling a variant for each case) and the emulator are slow: they take every 24th case."""
    return name == "cpp" or (CHOSEN == "gpu" and name == "cuda") or next(_calls) % 24 == 0


def differences(got, exact):
    """Norm of the difference over the norm of ``exact``, and the largest difference; both infinite unless infinities and
    NaN stand in the same places. In the dtype of ``got`` large elements of ``exact`` may be infinite, small ones 0, and
    one in the middle of two numbers may be either: of ``exact`` and what it rounds to, the nearer counts."""
    got, exact, rounded = got.double(), exact.double(), exact.to(got.dtype).double()
    finite = rounded.isfinite()
    if not torch.equal(got.isnan(), rounded.isnan()):
        return math.inf, math.inf
    if not torch.equal(got[~finite & ~rounded.isnan()], rounded[rounded.isinf()]):
        return math.inf, math.inf
    difference = torch.minimum((got - exact).abs(), (got - rounded).abs())[finite]
    if not difference.any():
        return 0.0, 0.0
    size = exact[exact.isfinite()].norm().item()
    return difference.norm().item() / size if size else math.inf, difference.max().item()


def check(case, args, options, upstream=1.0, unit=1.0, grad_unit=None, then=None):
    """Contract 1: within 1e-6 (losses) and 1e-5 (gradients) of float64, within twice the error of plain PyTorch in the
    same dtype, or within the rounding of the terms where they cancel: a few steps of ``unit``, the size of those. ``then`` is called
    with each backend, too."""
    exact = any(t.dtype == torch.float64 for t in tensors(args) if t.is_floating_point())
    rounding = 32 * torch.finfo(torch.float64).eps if exact else 4 * torch.finfo(torch.float32).eps

    def run(function, arguments):
        with torch.no_grad():
            out = function(*arguments, **options)
        return value_and_grads(function, arguments, torch.full(out.shape, upstream), **options)

    def agrees(got, want, eager, tolerance, size):
        assert got.dtype == eager.dtype and got.shape == want.shape
        (ours, largest), (theirs, _) = differences(got, want), differences(eager, want)
        fits = ours <= tolerance + STEP[got.dtype] or ours <= 2 * theirs or largest <= rounding * size
        assert fits, f"error {ours} (at most {largest}), of plain torch {theirs}"

    names = [name for name in FUSED if (not exact or takes(name, torch.float64)) and _turn_of(name)]
    if not names:  # no backend's turn
        return None
    want, want_grads = run(case.reference, convert(args, dtype=torch.float64))
    with af.use_backend("reference"):
        eager, eager_grads = run(case.function, args)
    for name in names:
        with af.use_backend(name):
            got, grads = run(case.function, args)
        agrees(got, want, eager, 1e-12 if exact else 1e-6, unit)
        for grad, want_grad, eager_grad in zip(grads, want_grads, eager_grads, strict=True):
            agrees(grad, want_grad, eager_grad, 1e-10 if exact else 1e-5, (grad_unit or unit) * abs(upstream))
        assert [g.dtype for g in grads] == [t.dtype for t in tensors(args) if t.requires_grad]
        if then is not None:
            with af.use_backend(name):
                then()
        result = got
    return result


def strided(t, kind):
    """The same values in another layout, on the device of the tests."""
    t = t.detach().to(DEVICE)
    if kind == "transposed" and t.dim() > 1:
        return t.mT.contiguous().mT
    if kind == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan, dtype=t.dtype, device=t.device)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if kind == "expanded" and len(t) > 0:
        return t[:1].expand(t.shape)
    return t.clone()


LAYOUTS = st.sampled_from(["contiguous", "contiguous", "transposed", "sliced", "expanded"])


def leaf(t, dtype, layout):
    return strided(t.to(dtype), layout).requires_grad_()


DISTILLATIONS = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 2**31),
        n=st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 40])),  # few classes: 16 rows at once on the CPU
        c=st.one_of(st.integers(1, 40), st.sampled_from([62, 63, 64, 127, 128, 129, 1024, 1025, 1500])),
        dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
        layouts=st.tuples(LAYOUTS, LAYOUTS),
        logits=st.sampled_from([0.0, 0.01, 2.0, 2.0, 30.0, 1e4]),
        teachers=st.lists(st.sampled_from(["other", "other", "same"]), min_size=1, max_size=4),
        masked=st.sampled_from(["none", "none", "both", "student", "teacher"]),
        ignored=st.sampled_from([None, 0.0, 0.3, 1.0]),
        weights=st.sampled_from(["rows", "rows", "zeros", "row", "none", "large"]),
        upstream=st.sampled_from([1.0, 1.0, -0.5, 1024.0]),
        options=st.fixed_dictionaries(
            dict(
                temperature=st.sampled_from([0.01, 0.3, 1.0, 4.0, 4.0, 100.0]),
                alpha=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
                mode=st.sampled_from(["mixture", "sum"]),
                reduction=st.sampled_from(["none", "sum", "mean", "batchmean"]),
                t2_scale=st.booleans(),
                label_smoothing=st.sampled_from([0.0, 0.0, 0.1]),
            )
        ),
    )
)


def distillation(p):
    """Arguments of a drawn problem, and its weights."""
    g = torch.Generator().manual_seed(p["seed"])
    n, c, teachers = p["n"], p["c"], len(p["teachers"])
    z = p["logits"] * torch.randn(n, c, generator=g)
    ts = [z if kind == "same" else p["logits"] * torch.randn(n, c, generator=g) for kind in p["teachers"]]
    mask = torch.rand(n, c, generator=g) < 0.3
    mask[:, int(torch.randint(0, c, (1,), generator=g))] = False
    if p["masked"] in ("both", "student"):
        z = z.masked_fill(mask, -math.inf)
    if p["masked"] in ("both", "teacher"):
        ts = [t.masked_fill(mask, -math.inf) for t in ts]
    labels = None
    if p["ignored"] is not None:
        labels = torch.randint(0, c, (n,), generator=g)
        labels[torch.rand(n, generator=g) < p["ignored"]] = -100
    w = torch.rand(n, teachers, generator=g)
    w = w / w.sum(1, keepdim=True)
    if p["weights"] == "zeros":
        w = w * (torch.rand(n, teachers, generator=g) < 0.5)
    if p["weights"] == "row":
        w = torch.rand(teachers, generator=g)
    if p["weights"] == "large":
        w = 10 * w
    args = (
        leaf(z, p["dtypes"][0], p["layouts"][0]),
        [strided(t.to(p["dtypes"][1]), p["layouts"][1]) for t in ts],
        None if p["weights"] == "none" else leaf(w, torch.float32, "contiguous"),
        None if labels is None else labels.to(DEVICE),
    )
    return args, w


def added(p):
    """How often the rounding of ten rows is in the loss."""
    return max(1.0, p["n"] / 10) if p["options"]["reduction"] == "sum" else 1.0


@drawn(900)
@given(DISTILLATIONS, st.sampled_from(["0", "64"]))
def test_multi_teacher_kd(p, few_classes):
    args, w = distillation(p)
    n, c = p["n"], p["c"]
    # What cancels in a KL near 0 are logarithms of probabilities.
    unit = (
        max(1.0, p["options"]["temperature"] ** 2) * max(1.0, float(w.sum(-1).max()) if n else 1.0) * (1 + math.log(c))
    )
    steepness = 1.0 if p["options"]["t2_scale"] else max(1.0, 1 / p["options"]["temperature"])
    with pytest.MonkeyPatch.context() as patch:  # with and without the CUDA kernel of few classes
        patch.setenv("AMTML_FEW_CLASSES", few_classes)
        got = check(CASES["multi_teacher_kd"], args, p["options"], p["upstream"], unit * added(p), unit * steepness)
    if args[3] is None and p["weights"] in ("rows", "none") and got is not None and got.isfinite().all():
        assert (got >= -1e-6 * unit * max(n, 1)).all(), "a KL below 0"


TEMPERATURES = [0.01, 0.3, 1.0, 4.0, 100.0]


def undecided(args, options):
    """Whether the sign of p - q, which is all that the gradient of "tvd" has of a class, hangs on a rounding."""
    (z, ts, w, *_), tau = convert(args, dtype=torch.float64), options["temperature"]
    tau = tau.double().unsqueeze(1) if isinstance(tau, torch.Tensor) else tau
    of_teachers = options["teacher_temperature"] or [tau] * len(ts)
    w = torch.full((len(z), len(ts)), 1 / len(ts), device=z.device) if w is None else w.expand(len(z), -1)
    ps = [t / by for t, by in zip(ts, of_teachers)]
    if options["mode"] == "logits":
        ps = [sum(torch.where(w[:, t, None] == 0, 0, w[:, t, None] * x) for t, x in enumerate(ps))]
    ps = [x.softmax(1) for x in ps]
    if options["mode"] == "mixture":
        ps = [sum(w[:, t, None] * x for t, x in enumerate(ps))]
    q = (z / tau).softmax(1)
    return any((((p - q).abs() < 1e-4 * torch.maximum(p, q)) & (q > 1e-9)).any() for p in ps)


@drawn(300)
@given(
    p=DISTILLATIONS,
    divergence=st.sampled_from(DIVERGENCES),
    mode=st.sampled_from(ALL_MODES),
    beta=st.sampled_from([None, 0.01, 0.5, 0.97]),
    of_teachers=st.sampled_from([None, "one", "each"]),
    by_row=st.sampled_from(["nothing", "nothing", "alpha", "temperature", "both"]),
)
def test_divergence(p, divergence, mode, beta, of_teachers, by_row):
    args, w = distillation(p)
    g = torch.Generator().manual_seed(p["seed"] + 1)
    n, teachers, tau = p["n"], len(p["teachers"]), p["options"]["temperature"]
    options = dict(p["options"], divergence=divergence, mode=mode)
    options["beta"] = beta if divergence in DEFAULT_BETA else None
    drawn_taus = [TEMPERATURES[i] for i in torch.randint(0, 5, (teachers,), generator=g).tolist()]
    options["teacher_temperature"] = {None: None, "one": drawn_taus[:1] * teachers, "each": drawn_taus}[of_teachers]
    taus = torch.full((n,), tau)
    if by_row in ("temperature", "both"):
        taus = tau * torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, (n,), generator=g)]
        options["temperature"] = taus.to(DEVICE)
    case = CASES["divergence"]
    if by_row in ("alpha", "both") and args[3] is not None:
        alpha = torch.rand(n, generator=g)
        if n:
            alpha[0] = p["options"]["alpha"]
        args = *args, leaf(alpha, torch.float32, "contiguous")
        del options["alpha"]
        functions = [lambda *a, f=f, **o: f(*a[:4], alpha=a[4], **o) for f in (case.function, case.reference)]
        case = dataclasses.replace(case, function=functions[0], reference=functions[1])
    if divergence == "tvd" and undecided(args, options):
        return
    lowest = min([*taus.tolist(), *(options["teacher_temperature"] or [])], default=1.0)
    infinite = mode == "logits" and p["masked"] != "none"  # minus infinity, where D is
    # That gradient hangs on whether a number next to 0 is 0: a p, or, without any p, a q.
    hangs = mode == "mixture" and p["weights"] == "zeros"
    hangs = hangs and p["logits"] > {"forward_kl": 50, "tvd": math.inf}.get(divergence, 15) * lowest
    if ((divergence == "forward_kl" and infinite) or hangs) and args[2] is not None:
        args[2].requires_grad_(False)  # as that gradient
    # What cancels: logarithms of probabilities, which are differences of logits.
    sizes = [x.masked_fill(x.isinf(), 0).abs().max() for x in (args[0].detach(), *args[1]) if x.numel()]
    logs = 1 + math.log(p["c"]) + 2 * float(max(sizes, default=0.0)) / lowest
    most = float(taus.max()) if n else 1.0
    unit = (most**2 if options["t2_scale"] else 1.0) * max(1.0, float(w.sum(-1).max()) if n else 1.0) * logs
    check(case, args, options, p["upstream"], max(unit, logs) * added(p), max(unit, logs) * max(1.0, 1 / lowest) * logs)


@drawn(300)
@given(
    p=DISTILLATIONS,
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    tail=st.sampled_from(["renormalize", "ignore", "uniform", "bucket", "bucket"]),
    kind=st.sampled_from(["largest", "largest", "drawn", "twice"]),
    divergence=st.sampled_from(DIVERGENCES),
    support=st.sampled_from(["teacher", "student"]),
)
def test_topk_kd(p, sizes, tail, kind, divergence, support):
    g = torch.Generator().manual_seed(p["seed"])
    n, c, tau = p["n"], p["c"], p["options"]["temperature"]
    z = p["logits"] * torch.randn(n, c, generator=g)
    indices, log_probs = [], []
    for k in (min(k, c) for k in sizes):
        x = (p["logits"] * torch.randn(n, c, generator=g) / tau).log_softmax(-1)
        index = x.topk(k).indices if kind == "largest" else torch.rand(n, c, generator=g).argsort(-1)[:, :k]
        log_prob = x.gather(1, index)
        if kind == "twice" and k > 1:
            index[:, 1] = index[:, 0]
        if p["masked"] in ("both", "teacher"):
            log_prob = log_prob.masked_fill(torch.rand(n, k, generator=g) < 0.3, -math.inf)
        along = "transposed" if p["layouts"][1] == "sliced" else p["layouts"][1]  # integers hold no NaN between slices
        indices.append(strided(index, along))
        log_probs.append(strided(log_prob.to(p["dtypes"][1]), p["layouts"][1]))
    if p["masked"] in ("both", "student"):
        z = z.masked_fill(torch.rand(n, c, generator=g) < 0.3, -math.inf)
    labels = None
    if p["ignored"] is not None:
        labels = torch.randint(0, c, (n,), generator=g)
        labels[torch.rand(n, generator=g) < p["ignored"]] = -100
    w = torch.rand(n, len(sizes), generator=g)
    if p["weights"] == "zeros":
        w = w * (torch.rand(w.shape, generator=g) < 0.5)
    args = (
        leaf(z, p["dtypes"][0], p["layouts"][0]),
        indices,
        log_probs,
        None if p["weights"] == "none" else leaf(w, torch.float32, "contiguous"),
        None if labels is None else labels.to(DEVICE),
    )
    options = {k: v for k, v in p["options"].items() if k != "mode"}
    unit = max(1.0, tau**2) * max(1.0, float(w.sum(-1).max()) if n else 1.0) * (1 + math.log(c))
    steepness = 1.0 if options["t2_scale"] else max(1.0, 1 / tau)
    if tail == "bucket":
        options.update(divergence=divergence, support=support)
    op = "topk_bucket" if tail == "bucket" else "topk_kd"
    options["tail"] = tail
    of_loss = unit * added(p)
    check(CASES[op], args, options, p["upstream"], of_loss, unit * steepness, lambda: check_stats(args, options, unit))


@torch.no_grad()
def check_stats(args, options, unit):
    _, stats = af.topk_kd_loss(*args, **options, return_stats=True)
    _, want = af.reference.topk_kd_loss(*convert(args, dtype=torch.float64), **options, return_stats=True)
    for name, got, right in zip(stats._fields, stats, want):
        got, right = got.cpu().double(), right.cpu()
        bound = 1e-6 * unit + 1e-5 * right.abs()
        same = (got == right) | (got.isnan() & right.isnan()) | ((got - right).abs() <= bound)
        # The agreement hangs on the last bit of equal probabilities.
        assert same.all() or name == "agreement", (name, got, right)


def rows_of(kind, n, c, g):
    x = torch.randn(n, c, generator=g)
    if kind == "probabilities":
        return (2 * x).softmax(-1)
    if kind.startswith("clustered"):  # what the rows of a trained network look like
        margin = float(kind.removeprefix("clustered"))
        labels = torch.randint(0, min(c, 5), (n,), generator=g)
        return (margin * torch.nn.functional.one_hot(labels, c) + x).softmax(-1)
    if kind == "duplicates" and n:
        return x[torch.randint(0, (n + 1) // 2, (n,), generator=g)]
    if kind == "equal":
        return x[:1].expand(n, c).clone()
    if kind == "small":
        return 1e-6 * x
    if kind == "offset":
        return 1000 + x
    if kind == "line":
        return torch.arange(n).float().unsqueeze(1).expand(n, c).clone()
    return x


ROWS = st.sampled_from(
    ["normal", "normal", "probabilities", "probabilities", "clustered3", "clustered10", "clustered20", "duplicates",
     "equal", "small", "offset", "line"]
)  # fmt: skip


def relations(most_rows, reductions):
    return st.fixed_dictionaries(
        dict(
            seed=st.integers(0, 2**31),
            n=st.one_of(st.integers(0, 20), st.integers(0, most_rows)),
            kinds=st.tuples(ROWS, ROWS),
            widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
            dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
            layouts=st.tuples(LAYOUTS, LAYOUTS),
            needs=st.sampled_from([(True, True), (True, False), (True, False), (False, True)]),
            options=st.fixed_dictionaries(
                dict(delta=st.sampled_from([1.0, 1.0, 0.1, 5.0]), reduction=st.sampled_from(reductions))
            ),
        )
    )


def check_relation(op, p):
    g = torch.Generator().manual_seed(p["seed"])
    sides = [
        leaf(rows_of(kind, p["n"], width, g), dtype, layout)
        for kind, width, dtype, layout in zip(p["kinds"], p["widths"], p["dtypes"], p["layouts"])
    ]
    for side, needed in zip(sides, p["needs"]):
        side.requires_grad_(needed)
    # Collinear rows (probabilities of two classes are) have the same angles whatever moves, and equal rows no distances: the exact gradient can be 0, and what
    # is left is rounding of 1 / distance. In float64 the law of cosines cannot do better than the ratio of distances.
    distances = torch.cat([torch.pdist(x.detach().double()) for x in sides])
    distances = distances[distances > 1e-12]
    nearest, farthest = (distances.min().item(), distances.max().item()) if len(distances) else (1.0, 1.0)
    unit = 1e-6
    if torch.float64 in p["dtypes"]:
        unit = max(1.0, farthest / nearest) * max(1.0, 1 / nearest)
    elif (
        min(p["widths"]) < 3 or "expanded" in p["layouts"] or {"line", "equal", "duplicates", "offset"} & {*p["kinds"]}
    ):
        unit = max(1.0, 1 / nearest)
    if p["options"]["reduction"] in ("sum", "none"):
        unit *= max(p["n"], 1) ** 3
    check(CASES[op], tuple(sides), p["options"], unit=unit)


@drawn(500)
# The interpreter is slow.
@given(relations(40 if CHOSEN == "triton" else 140, ["mean", "mean", "distinct", "sum", "none"]))
def test_angle(p):
    check_relation("angle", p)


@drawn(200)
@given(relations(70, ["mean", "distinct", "sum"]))
def test_distance(p):
    check_relation("distance", p)


@drawn(300)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 9),
    d=st.integers(1, 40),
    teachers=st.integers(1, 4),
    plane=st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(1, 9))),
    ties=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.one_of(LAYOUTS, st.just("channels_last")),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    pool=st.sampled_from(["max", "avg"]),
)
def test_teacher_weights(seed, n, d, teachers, plane, ties, dtype, layout, scale, pool):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, *(plane or ()), generator=g)
    features = leaf(x.round() if ties else x, dtype, layout)
    factors = [
        leaf(scale * torch.randn(*size, generator=g), torch.float32, "contiguous") for size in ((teachers, d), (d,))
    ]
    check(CASES["teacher_weights"], (features, *factors), {"pool": pool}, unit=max(1.0, scale**2 * d))


@drawn(100)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 4),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    planes=st.tuples(*[st.tuples(st.integers(1, 9), st.integers(1, 9))] * 2),
    dead_pixels=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.one_of(LAYOUTS, st.just("channels_last"))] * 2),
    normalize=st.booleans(),
)
def test_hint(seed, n, channels, planes, dead_pixels, dtype, layouts, normalize):
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(n, c, *plane, generator=g) for c, plane in zip(channels, planes)]
    if dead_pixels:
        maps = [m.masked_fill(torch.rand(m[:, :1].shape, generator=g) < 0.2, 0) for m in maps]
    weight = leaf(torch.randn(channels[::-1], generator=g), torch.float32, "sliced")
    args = *(leaf(m, dtype, layout) for m, layout in zip(maps, layouts)), weight
    # A pixel without features is divided by 1e-12: so is the rounding of its gradient.
    check(CASES["hint"], args, {"normalize": normalize}, unit=1e12 if dead_pixels and normalize else 10.0)


@drawn(100)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(0, 9), min_size=2, max_size=4),
    dims=st.permutations(range(2)),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    layout=LAYOUTS,
    mode=st.sampled_from(["sequential", "product"]),
)
def test_dual_softmax(seed, shape, dims, scale, dtype, layout, mode):
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    options = {"dim1": dims[0] - 2, "dim2": dims[1] - 2, "mode": mode}
    check(CASES["dual_softmax"], (leaf(x, dtype, layout),), options)


def test_make_test_draws_at_least_two_thousand_cases():
    tests = [
        test_multi_teacher_kd,
        test_divergence,
        test_topk_kd,
        test_angle,
        test_distance,
        test_teacher_weights,
        test_hint,
        test_dual_softmax,
    ]
    cases = sum(t._hypothesis_internal_use_settings.max_examples for t in tests)
    assert cases >= 2000


if os.environ.get("AMTML_BACKEND", "auto") not in ("auto", "cpp"):
    pytest.skip("these compare the C++ kernels", allow_module_level=True)
