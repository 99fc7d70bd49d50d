"""docs/dropin.md: every number in its tables is what the code beside it gives."""

import ast
import functools
import itertools
import pathlib
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from backends import cpu_only

import amtml_fast as af
from amtml_fast import dropin

pytestmark = cpu_only
TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "dropin.md").read_text()
EXAMPLE = {
    name: torch.tensor(ast.literal_eval(re.search(rf"^    {name} = (.+)$", TEXT, re.M)[1]), device="cpu").double()
    for name in "zt"
}
SCOPE: dict = {**vars(af), **vars(dropin), **EXAMPLE, "T": 2.0, "F": F, "torch": torch, "kd": af.multi_teacher_kd_loss}


def table(columns, heading):
    """The rows of the table that begins with this heading."""
    lines = TEXT[TEXT.index(heading) :].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in itertools.takewhile(lambda x: x, lines)]
    assert rows and all(len(row) == columns for row in rows)
    return rows


def value_of(cell):
    return f"{float(eval(cell.strip('`'), SCOPE)):.4f}"


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_the_docs_say_how_the_libraries_define_kl():
    """Of every row: its columns say what makes the value, and so does what stands under ``here``."""
    log_q, p = F.log_softmax(EXAMPLE["z"] / 2, 1), F.softmax(EXAMPLE["t"] / 2, 1)
    kl = (p * (p.log() - log_q)).sum().item()
    factor = {"yes": 4, "no": 1, "twice": 8}
    divisor = {"rows": 2, "valid tokens": 2, "rows x classes": 6, "nothing": 1}
    rows = table(6, "| whose | call | T^2 |")
    for whose, call, squared, divided_by, here, value in rows:
        assert f"{factor[squared] * kl / divisor[divided_by]:.4f}" == value, whose
        assert value_of(call if here == "the same" else here) == value, whose
        if whose.startswith("torch,"):
            assert value_of(call) == value, whose
    assert {"RepDistiller", "mdistiller", "optax"} <= {row[0] for row in rows}


def test_the_docs_say_how_the_libraries_define_other_divergences():
    d = functools.partial(af.multi_teacher_kd_loss, EXAMPLE["z"], [EXAMPLE["t"]], None, temperature=2.0, t2_scale=False)
    entropy = d(return_stats=True)[1].target_entropy.mean()
    scope = {"d": d, "H": entropy, "y": torch.zeros(2, dtype=torch.long, device="cpu")}
    scope["I"] = torch.eye(3, dtype=torch.float64, device="cpu")
    rows = table(5, "| whose | call | what it is | here |")
    for whose, call, _, here, value in rows:
        for cell in (call, here):
            assert f"{float(eval(cell.strip('`'), {**SCOPE, **scope})):.4f}" == value, whose
    called = {row[1].strip("`").split("(")[0] for row in rows}
    assert called == {*dropin.dropin_language.__all__, *dropin.dropin_liger.__all__} - {"LogitsDistillationLoss"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_language_losses_are_the_formulas_of_their_libraries(dtype):
    """Value and gradient over the tokens that count; a token that does not may hold anything."""
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(2, 5, 7, generator=g, dtype=dtype, device="cpu") for _ in range(2))
    y = torch.randint(0, 7, (2, 5), generator=g, device="cpu")
    y[0, :2] = -100
    z[0, 0] = torch.nan
    z.requires_grad_()
    p, q = ((x[y != -100].double()).softmax(-1) for x in (t, z))

    def kl(a, b):
        return (a * (a / b).log()).sum(-1).mean()

    cross, reverse, batch = -(p * q.log()).sum(-1).mean(), kl(q, p), {"label": y}
    m = [share * p + (1 - share) * q for share in (0.1, 0.9, 0.5)]
    js = (0.1 * kl(p, m[0]) + 0.9 * kl(q, m[0])), (kl(p, m[2]) + kl(q, m[2])) / 2
    flat = z.flatten(0, 1), t.flatten(0, 1), y.flatten()
    for got, want in (
        (dropin.forward_kl(z, t, batch), cross),
        (dropin.reverse_kl(z, t, batch), reverse),
        (dropin.symmetric_kl(z, t, batch), 0.1 * cross + 0.9 * reverse),
        (dropin.js_distance(z, t, batch), js[0]),
        (dropin.tv_distance(z, t, batch), (p - q).abs().sum(-1).mean() / 2),
        (dropin.skewed_forward_kl(z, t, batch), -(p * m[0].log()).sum(-1).mean()),
        (dropin.skewed_reverse_kl(z, t, batch), kl(q, m[1])),
        (dropin.ForwardKLLoss()(*flat), cross),
        (dropin.ReverseKLLoss()(*flat, normalize=False), reverse * len(p)),
        (dropin.SymmetricKLLoss(0.3)(*flat), 0.3 * cross + 0.7 * reverse),
        (dropin.generalized_jsd_loss(z, t, y), js[1]),
        (dropin.generalized_jsd_loss(z, t, y, 1, reduction="mean"), reverse / 7),
        (dropin.generalized_jsd_loss(z, t, y, num_items_in_batch=16), js[1] * len(p) / 16),
    ):
        torch.testing.assert_close(got, want.to(dtype), rtol=2e-6, atol=1e-7)
        (grad,), (right,) = (torch.autograd.grad(x, z, retain_graph=True) for x in (got, want))
        torch.testing.assert_close(grad, right.nan_to_num(0), rtol=2e-5, atol=1e-7)


CALLS = {
    "forward_kl": lambda z, t, y: dropin.forward_kl(z, t, {"label": y}),
    "reverse_kl": lambda z, t, y: dropin.reverse_kl(z, t, {"label": y}),
    "symmetric_kl": lambda z, t, y: dropin.symmetric_kl(z, t, {"label": y}),
    "js_distance": lambda z, t, y: dropin.js_distance(z, t, {"label": y}),
    "tv_distance": lambda z, t, y: dropin.tv_distance(z, t, {"label": y}),
    "skewed_forward_kl": lambda z, t, y: dropin.skewed_forward_kl(z, t, {"label": y}),
    "skewed_reverse_kl": lambda z, t, y: dropin.skewed_reverse_kl(z, t, {"label": y}),
    "generalized_jsd_loss": dropin.generalized_jsd_loss,
    "ForwardKLLoss": lambda z, t, y: dropin.ForwardKLLoss()(z, t, y),
    "ReverseKLLoss": lambda z, t, y: dropin.ReverseKLLoss()(z, t, y),
    "SymmetricKLLoss": lambda z, t, y: dropin.SymmetricKLLoss()(z, t, y),
}


# The others: without labels, or with labels of another form.
OTHERS = {
    "dense_kl_div": lambda z, t, y: dropin.dense_kl_div(z, t, y != -100),
    "sparse_kl_div": lambda z, t, y: dropin.sparse_kl_div(z, *t.topk(3)[::-1], y != -100, log_target=False),
    "LogitsDistillationLoss": lambda z, t, y: dropin.LogitsDistillationLoss()(z, t),
    **{
        name: lambda z, t, y, name=name: getattr(dropin, name)(2)(z.chunk(2, 1), t.chunk(2, 1), y)
        for name in dropin.dropin_language.__all__
        if name.endswith("WithChunkedOutputLoss")
    },
}


EVERY = {**CALLS, **OTHERS}


def example_of_tokens():
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(2, 5, 7, generator=g, device="cpu") for _ in range(2))
    return z, t, torch.randint(0, 7, (2, 5), generator=g, device="cpu")


def test_every_language_loss_is_called_here():
    assert EVERY.keys() == set(dropin.dropin_language.__all__)


@pytest.mark.parametrize("name", sorted({*EVERY} - {"LogitsDistillationLoss", "sparse_kl_div"}))
def test_language_losses_refuse_a_teacher_that_requires_grad(name):
    """Theirs have a gradient to it: without one here it would be missing silently."""
    z, t, y = example_of_tokens()
    call = EVERY[name]
    with pytest.raises(ValueError, match="must be detached"):
        call(z, t.requires_grad_(), y)
    with torch.no_grad():
        call(z, t, y)


@pytest.mark.parametrize("name", CALLS)
def test_where_no_token_counts_a_language_loss_is_0(name):
    z, t, y = example_of_tokens()
    loss = CALLS[name](z.requires_grad_(), t, torch.full_like(y, -100))
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


@pytest.mark.parametrize("name", [name for name in EVERY if not name.endswith("WithChunkedOutputLoss")])
def test_an_empty_batch_of_tokens_is_0(name):
    z, t, y = (x[:0] for x in example_of_tokens())
    loss = EVERY[name](z.requires_grad_(), t, y)
    loss.backward()
    assert loss == 0 and z.grad.shape == (0, 5, 7)
    assert dropin.generalized_jsd_loss(z, t) == dropin.LogitsDistillationLoss(reduction="batchmean")(z, t) == 0


@pytest.mark.parametrize("name", CALLS)
def test_labels_may_be_bytes(name):
    """Of which 156 has the bits of -100."""
    z, t, y = example_of_tokens()
    y[0, 1] = 156
    assert CALLS[name](z, t, y.to(torch.uint8)) == CALLS[name](z, t, y)


def test_trls_loss_without_labels():
    """``"batchmean"`` is by the first dimension, not by tokens."""
    z, t, _ = (x.double() if x.is_floating_point() else x for x in example_of_tokens())
    z.requires_grad_()
    total = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum()
    for reduction, by in (("batchmean", 2), ("sum", 1), ("mean", 2 * 5 * 7)):
        assert_same(dropin.generalized_jsd_loss(z, t, None, 0, reduction=reduction), total / by, z)
    assert_same(dropin.generalized_jsd_loss(z, t, None, 0, num_items_in_batch=3), total / 3, z)
    with pytest.raises(ValueError, match=r"generalized_jsd_loss: reduction must be one of batchmean, .*, got 'none'"):
        dropin.generalized_jsd_loss(z, t, reduction="none")


@pytest.mark.parametrize("name", ["LogitsDistillationLoss", "sparse_kl_div"])
def test_a_teacher_is_constant_where_it_is_in_theirs(name):
    z, t, y = example_of_tokens()
    loss = OTHERS[name](z.requires_grad_(), t.requires_grad_(), y)
    loss.sum().backward()
    assert z.grad.norm() > 0 and t.grad is None and loss == OTHERS[name](z, t.detach(), y)


def assert_same(got, want, z, tolerance=1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    (grad,), (right,) = (torch.autograd.grad(x.sum(), z, retain_graph=True) for x in (got, want))
    torch.testing.assert_close(grad, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("plain", ["ForwardKL", "ReverseKL", "SymmetricKL"])
def test_torchtunes_losses_of_chunks_are_those_of_the_whole(plain, chunks):
    z, t, y = (x.double() if x.is_floating_point() else x for x in example_of_tokens())
    y[0, 1:4] = 7
    z.requires_grad_()
    loss = getattr(dropin, f"{plain}WithChunkedOutputLoss")(num_output_chunks=chunks, ignore_index=7)
    assert (loss.num_output_chunks, loss.ignore_index) == (chunks, 7) and not loss.state_dict()
    given = z.chunk(chunks, 1), list(t.chunk(chunks, 1)), y
    loss.ignore_index = 3  # settings count as they are when it is called
    assert_same(loss(*given), getattr(dropin, f"{plain}Loss")(ignore_index=3)(z, t, y), z)
    loss.ignore_index = 7
    if plain == "SymmetricKL":
        loss.sym_kd_ratio = 1.0
        assert_same(loss(*given), dropin.ForwardKLLoss(ignore_index=7)(z, t, y), z)
        loss.sym_kd_ratio = 0.5
    assert_same(loss(*given), getattr(dropin, f"{plain}Loss")(ignore_index=7)(z, t, y), z)
    nothing = loss(*given[:2], torch.full_like(y, 7))
    nothing.backward()
    assert nothing == 0 and (z.grad == 0).all()
    for wrong, message in (
        ((given[0], t, y), f"teacher_logits must be {chunks} chunks like those of labels, got Tensor"),
        ((given[0], 3, y), f"teacher_logits must be {chunks} chunks like those of labels, got int"),
        ((given[0][1:], given[1], y), f"student_logits must be {chunks} chunks .* got {chunks - 1}"),
        ((*given[:2], y.flatten()), r"labels must be \[B, S\], got \[10\]"),
    ):
        with pytest.raises(ValueError, match=f"{plain}WithChunkedOutputLoss: {message}"):
            loss(*wrong)


@pytest.mark.parametrize("size", [(4, 7), (2, 5, 7), (2, 3, 2, 7)], ids=str)
def test_modelopts_loss_is_theirs(size):
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(size, generator=g, dtype=torch.float64, device="cpu") for _ in range(2))
    terms = 9 * F.kl_div(F.log_softmax(z.requires_grad_() / 3, -1), F.softmax(t / 3, -1), reduction="none")
    for reduction, want in (
        ("mean", terms.mean()),
        ("batchmean", terms.sum() / size[0]),
        ("sum", terms.sum()),
        ("none", terms.sum(-1)),
    ):
        assert_same(dropin.LogitsDistillationLoss(3.0, reduction)(z, t), want, z)
    assert isinstance(dropin.LogitsDistillationLoss(), torch.nn.modules.loss._Loss)
    with pytest.raises(ValueError, match=r"LogitsDistillationLoss: reduction must be one of mean, .*, got 'max'"):
        dropin.LogitsDistillationLoss(reduction="max")
    with pytest.raises(ValueError, match=r"LogitsDistillationLoss: logits_s must be \[..., C\], got \[7\]"):
        dropin.LogitsDistillationLoss()(z.flatten()[:7], t.flatten()[:7])
    with pytest.raises(ValueError, match=r"LogitsDistillationLoss: logits_t must be \[.*\] like logits_s"):
        dropin.LogitsDistillationLoss()(z, t[..., :6])


MASKS = {
    "none": None,
    "bool": torch.tensor([[True, True, False, True, True], [False, True, True, True, True]]),
    "int, 3-D": torch.tensor([[1, 2, 0, 1, 1], [0, 1, 1, 3, 1]])[..., None],
    "weights": torch.tensor([[1, 0.5, 0, 2, 1], [0, 1, 1, 3, 1]]),
}


@pytest.mark.parametrize("mask", MASKS)
def test_distillkits_losses_are_theirs(mask):
    """Sums over the tokens of the mask, times what it holds; a token that it leaves out may hold anything."""
    z, t, _ = (x.double() if x.is_floating_point() else x for x in example_of_tokens())
    mask = MASKS[mask]
    weights = torch.ones(2, 5, dtype=torch.float64, device="cpu") if mask is None else mask.reshape(2, 5).double()
    z.requires_grad_()
    garbled = torch.where(weights[..., None] == 0, torch.nan, z)

    def kl(log_p, log_q):
        return ((log_p.exp() * (log_p - log_q)).sum(-1) * weights).sum()

    want = kl((t / 3).log_softmax(-1), (z / 3).log_softmax(-1))
    assert_same(dropin.dense_kl_div(garbled, t, mask, 3.0), want, z)

    ids, values = t.topk(3).indices, 0.5 * t.log_softmax(-1).topk(3).values - 1  # with mass left
    for made_at, at, student_at in ((1, 1, 1), (2, 3, 1), (1.5, 0.5, 2)):
        log_q = (z * student_at / at).log_softmax(-1).gather(-1, ids)
        options = dict(temperature=at, target_generation_temperature=made_at, student_generation_temperature=student_at)
        for log_target in (True, False):
            got = dropin.sparse_kl_div(garbled, ids, values, mask, log_target=log_target, **options)
            assert_same(got, kl((values * made_at / at).log_softmax(-1), log_q), z)
        both = [torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True))], -1) for x in (values, log_q)]
        want = kl((both[0] * made_at / at).log_softmax(-1), both[1])
        for missing in ("symmetric_uniform", SimpleNamespace(value="symmetric_uniform")):
            assert_same(dropin.sparse_kl_div(garbled, ids, values, mask, missing=missing, **options), want, z)


def test_a_teacher_that_gives_more_than_1_by_rounding_has_an_empty_bucket():
    z, t, _ = example_of_tokens()
    more = dict(missing="symmetric_uniform", temperature=2.0)
    ids, values = t.topk(7).indices, t.log_softmax(-1).topk(7).values
    got = dropin.sparse_kl_div(z, ids, values + 1e-6, **more)
    torch.testing.assert_close(got, dropin.dense_kl_div(z, t, temperature=2.0), rtol=1e-4, atol=0)


def test_distillkits_losses_name_what_is_wrong():
    z, t, _ = example_of_tokens()
    given = z, t.topk(3).indices, t.topk(3).values
    for call, message in (
        (
            lambda: dropin.sparse_kl_div(*given, missing="uniform"),
            "missing must be one of zero, symmetric_uniform, got 'uniform'",
        ),
        (
            lambda: dropin.sparse_kl_div(*given, missing="symmetric_uniform", log_target=False),
            'missing must be "zero" with log_target=False, got "symmetric_uniform"',
        ),
        (lambda: dropin.sparse_kl_div(*given, torch.ones(2, 4)), r"mask must be \[2, 5\] or \[2, 5, 1\], got \[2, 4\]"),
        (lambda: dropin.dense_kl_div(z, t, [1]), r"mask must be \[2, 5\] or \[2, 5, 1\], got list"),
        (lambda: dropin.sparse_kl_div(*given, temperature=0.0), r"temperature must be a number in"),
        (
            lambda: dropin.sparse_kl_div(*given, target_generation_temperature=-1.0),
            r"target_generation_temperature must be",
        ),
    ):
        with pytest.raises(ValueError, match=f"_kl_div: {message}"):
            call()


@pytest.mark.parametrize("name", CALLS)
def test_language_losses_take_labels_flat_or_in_the_shape_of_the_tokens(name):
    z, t, y = example_of_tokens()
    y[0, 1] = y[1, 3] = -100
    want = CALLS[name](z, t, y)
    for got in (
        CALLS[name](z, t, y.flatten()),
        CALLS[name](z.flatten(0, 1), t.flatten(0, 1), y),
    ):
        assert got == want
    wanted = r"must be \[2, 5\] or \[10\], got"
    for labels, got in ((y.t(), r"\[5, 2\]"), (y[:, 1:], r"\[2, 4\]"), (y[None], r"\[1, 2, 5\]")):
        with pytest.raises(ValueError, match=f"label.* {wanted} {got}"):
            CALLS[name](z, t, labels)
    with pytest.raises(TypeError, match=r"label.* must be a tensor, got list"):
        CALLS[name](z, t, y.tolist())


def test_distillms_shares_at_their_ends():
    """Without a share of the teacher a skewed divergence is the plain one. Else one side of the mixture is against itself."""
    z, t, y = example_of_tokens()
    batch = {"label": y}
    for skewed, plain in ((dropin.skewed_forward_kl, dropin.forward_kl), (dropin.skewed_reverse_kl, dropin.reverse_kl)):
        for lam in (0, 0.0):
            assert skewed(z, t, batch, lam) == plain(z, t, batch)
            assert skewed(z, t, batch, lam=1e-6) == pytest.approx(plain(z, t, batch).item(), rel=1e-4)
    for loss, shares in (
        (dropin.js_distance, (0, 1, 0.0, -0.5, 2)),
        (dropin.skewed_forward_kl, (1, 1.0, -0.5)),
        (dropin.skewed_reverse_kl, (1, 1.0, -0.5)),
    ):
        for lam in shares:
            with pytest.raises(ValueError, match=rf"{loss.__name__}: lam must be .*, got {lam}$"):
                loss(z, t, batch, lam)
        with pytest.raises(TypeError, match=rf"{loss.__name__}: lam must be .*, got '0.3'$"):
            loss(z, t, batch, "0.3")


def test_torchtunes_losses_have_their_attributes():
    for loss in (dropin.ForwardKLLoss(-1), dropin.ReverseKLLoss(-1), dropin.SymmetricKLLoss(0.3, -1)):
        assert loss.ignore_index == -1 and not loss.state_dict()
    loss = dropin.SymmetricKLLoss(0.3, -1)
    assert (loss.sym_kd_ratio, loss.fkl.ignore_index, loss.rkl.ignore_index) == (0.3, -1, -1)


def test_the_docs_say_what_is_no_kl():
    for whose, _, _, formula, value in table(5, "| whose | call | what it is |"):
        assert value_of(formula) == value, whose


def test_the_docs_say_what_becomes_of_the_tail():
    torch.manual_seed(0)
    z, t = torch.randn(4, 9, device="cpu"), 2 * torch.randn(4, 9, device="cpu")
    top, log_q = t.log_softmax(-1).topk(3), z.log_softmax(-1)
    log_p, log_q_top = top.values, log_q.gather(1, top.indices)
    rest = (torch.log1p(-x.exp().sum(1, keepdim=True)) for x in (log_p, log_q_top))
    with_rest = [torch.cat([x, r], 1) for x, r in zip((log_p, log_q_top), rest)]

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(1).mean()

    got = [
        *(
            af.topk_kd_loss(z, [top.indices], [log_p], None, temperature=1.0, tail=tail)
            for tail in ("renormalize", "ignore", "uniform", "bucket")
        ),
        kl(log_p.log_softmax(1), log_q_top.log_softmax(1)),
        af.multi_teacher_kd_loss(z, [t], None, temperature=1.0),
    ]
    formulas = [kl(log_p.log_softmax(1), log_q_top), kl(log_p, log_q_top), kl(*with_rest)]
    values = [row[-1] for row in table(3, "| the classes beyond the k |")]
    assert [f"{x:.4f}" for x in got] == values and [f"{x:.4f}" for x in formulas] == [values[0], values[1], values[3]]
