"""The modules, and AMTMLLoss: Eq 3 put together from the float64 reference."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from backends import CHOSEN, cpu_only, takes
from test_operator_parts import FAKED, TRACED

import amtml_fast as af
from amtml_fast import backend, reference
from amtml_fast.testing import relative_error

N, C, T, D = 12, 7, 3, 6
GROUPS = {"low": 4, "mid": 5, "high": D}


pytestmark = pytest.mark.usefixtures("on")


def _batch():
    maps = {g: torch.randn(N, c, 8 // 2**i, 8 // 2**i, requires_grad=True) for i, (g, c) in enumerate(GROUPS.items())}
    labels = torch.randint(0, C, (N,))
    labels[2] = -100
    return dict(
        student_logits=(2 * torch.randn(N, C)).requires_grad_(),
        teacher_logits=[2 * torch.randn(N, C) for _ in range(T)],
        labels=labels,
        features=maps["high"],
        student_maps=maps,
        teacher_maps=[torch.randn(N, c, 4, 4) for c in (3, 4, 8)],
    )


def _hints(**options):
    return af.MultiGroupHintLoss(GROUPS, [3, 4, 8], **{"teacher_scores": [0.7, 0.9, 0.8], **options})


def _expected(loss, batch, angle_weight, hint_weight, regularizer_weight, trains):
    """Eq 3 in float64, term by term from the equations."""
    used = batch["labels"] != -100
    adapter = loss.adapter
    b = batch["features"].double().amax((2, 3))
    theta, v = adapter.theta.double(), adapter.v.double()
    w = torch.softmax(torch.stack([(v * theta[t] * b).sum(1) for t in range(T)], 1), 1)
    q = (batch["student_logits"].double() / 4).softmax(1)
    p = sum(w[:, t, None] * (z.double() / 4).softmax(1) for t, z in enumerate(batch["teacher_logits"]))
    ce = torch.nn.functional.cross_entropy(batch["student_logits"].double()[used], batch["labels"][used])
    kl = 16 * (p * (p / q).log()).sum(1)[used].mean()
    angle = reference.angle_loss(q[used], p[used] if trains else p[used].detach())
    hint = 0
    for t, group in loss.hints.mapping.items():
        hint = hint + reference.hint_loss(
            batch["student_maps"][group].double(),
            batch["teacher_maps"][t].double(),
            loss.hints.transforms[str(t)].double(),
        )
    regularizer = (v**2).sum() + (theta**2).sum()
    total = 0.3 * ce + 0.7 * kl + angle_weight * angle + hint_weight * hint + regularizer_weight * regularizer
    return total, {"ce": ce, "kl": kl, "angle": angle, "hint": hint, "regularizer": regularizer, "weights": w}


@pytest.mark.parametrize("trains", [False, True])
def test_amtml_loss_is_equation_3(trains):
    loss = af.AMTMLLoss(
        af.TeacherAdapter(D, T),
        _hints(),
        angle_weight=20.0,
        hint_weight=0.5,
        regularizer_weight=0.01,
        angle_trains_weights=trains,
    )
    batch = _batch()
    out = loss(**batch)
    want, parts = _expected(loss, batch, 20.0, 0.5, 0.01, trains)
    leaves = [batch["student_logits"], *batch["student_maps"].values(), *loss.parameters()]
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-6, atol=0)
    for name, value in parts.items():
        torch.testing.assert_close(getattr(out, name).double(), value.detach(), rtol=1e-5, atol=1e-7)
        assert not getattr(out, name).requires_grad
    torch.testing.assert_close(out.kd, 0.3 * out.ce + 0.7 * out.kl)
    for got, expected in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want, leaves)):
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-7)


def test_amtml_loss_compiles_and_trains():
    torch._dynamo.reset()
    loss = af.AMTMLLoss(af.TeacherAdapter(D, T), _hints())
    batch = _batch()
    want = loss(**batch)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(**batch)
    torch.testing.assert_close(tuple(got), tuple(want))
    for output in (got, want):
        loss.zero_grad()
        batch["student_logits"].grad = None
        output.loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
        assert batch["student_logits"].grad.isfinite().all()


def test_num_items_in_batch_splits_a_batch_exactly():
    """Gradient accumulation over uneven parts gives the whole batch's kd."""
    loss = af.AMTMLLoss(af.TeacherAdapter(D, T), angle_weight=0.0, regularizer_weight=0.0)
    batch = {k: v for k, v in _batch().items() if not k.endswith("maps")}
    items = (batch["labels"] != -100).sum()
    whole = loss(**batch).loss
    parts = 0
    for rows in (slice(0, 3), slice(3, N)):
        part = {k: [t[rows] for t in v] if isinstance(v, list) else v[rows] for k, v in batch.items()}
        parts = parts + loss(**part, num_items_in_batch=items).loss
    torch.testing.assert_close(parts, whole)


@cpu_only
def test_the_loop_of_training_md_accumulates_what_one_batch_gives(tmp_path):
    """Uneven numbers of labels in rounds of the same size, with every term but the angle loss, which sees one round."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    block = text[text.index("In your own loop") :].split("```")[1].removeprefix("python")
    loss = af.AMTMLLoss(af.TeacherAdapter(D, T), _hints(), angle_weight=0.0, regularizer_weight=0.5)
    batch = _batch()
    batch["labels"][1:5] = -100
    leaves = [batch["student_logits"], batch["features"], *loss.parameters()]
    want = torch.autograd.grad(loss(**batch).loss, leaves)

    def rows(x, part):
        if isinstance(x, dict):
            return {name: rows(v, part) for name, v in x.items()}
        return [v[part] for v in x] if isinstance(x, list) else x[part]

    def model(part, labels, taught, num_items_in_batch):
        given = {name: rows(x, part) for name, x in batch.items() if name != "teacher_logits"}
        return loss(teacher_logits=taught, num_items_in_batch=num_items_in_batch, **given)

    parts = slice(0, N // 2), slice(N // 2, N)
    rounds = [(part, batch["labels"][part], rows(batch["teacher_logits"], part)) for part in parts]
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        exec(block, {"model": model, "rounds": rounds, "dist": dist})
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close([x.grad for x in leaves], list(want))


def test_three_dimensional_logits():
    loss = af.AMTMLLoss(af.TeacherAdapter(D, T))
    batch = {k: v for k, v in _batch().items() if not k.endswith("maps")}
    want = loss(**batch).loss
    cube = dict(
        batch,
        student_logits=batch["student_logits"].view(3, 4, C),
        teacher_logits=[t.view(3, 4, C) for t in batch["teacher_logits"]],
        labels=batch["labels"].view(3, 4),
    )
    torch.testing.assert_close(loss(**cube).loss, want)


def test_terms_that_are_off_cost_and_say_nothing():
    loss = af.AMTMLLoss(af.TeacherAdapter(D, T), angle_weight=0.0, regularizer_weight=0.0)
    batch = {k: v for k, v in _batch().items() if not k.endswith("maps")}
    out = loss(**batch)
    assert out.angle == out.hint == out.regularizer == 0
    torch.testing.assert_close(out.loss.detach(), out.kd)
    assert loss(**dict(batch, labels=None)).ce == 0


def test_hint_mappings():
    scores = [0.7, 0.9, 0.8]
    assert _hints().mapping == {0: "low", 1: "high", 2: "mid"}
    assert _hints(mapping="best_low").mapping == {0: "high", 1: "low", 2: "mid"}
    assert _hints(mapping={0: "low", 1: "low"}).mapping == {0: "low", 1: "low"}
    drawn = {tuple(_hints(mapping="random").mapping.values()) for _ in range(100)}
    assert drawn == set(itertools.permutations(GROUPS))
    spread = af.MultiGroupHintLoss(dict.fromkeys("abcde", 2), [1, 1, 1], teacher_scores=scores)
    assert spread.mapping == {0: "a", 1: "e", 2: "c"}
    for mapping, group in (("best_high", "high"), ("best_low", "low"), ("random", "high")):
        assert af.MultiGroupHintLoss(GROUPS, [3], mapping=mapping, teacher_scores=[1.0]).mapping == {0: group}


def test_adapter_starts_as_documented():
    adapter = af.TeacherAdapter(4096, 8)
    for parameter in adapter.parameters():
        assert parameter.std().item() == pytest.approx(4096**-0.5, rel=0.1)
    assert af.TeacherAdapter(4096, 8, init_scale=2.0).theta.std().item() == pytest.approx(2.0, rel=0.1)
    torch.testing.assert_close(adapter.regularizer(), adapter.v @ adapter.v + (adapter.theta**2).sum())
    weights = adapter(torch.randn(5, 4096, 2, 2))
    torch.testing.assert_close(weights.sum(1), torch.ones(5))


NARROW = {"delta": 0.1, "reduction": "sum", "eps": 1.5}
WIDE = {"delta": 1.0, "reduction": "mean", "eps": 1e-12}


def test_modules_are_their_functions():
    z, t = torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(
        af.MultiTeacherKDLoss(temperature=2.0, mode="sum")(z, [t]),
        af.multi_teacher_kd_loss(z, [t], None, temperature=2.0, mode="sum"),
    )
    for module, function in ((af.AngleLoss, af.angle_loss), (af.RKDDistanceLoss, af.rkd_distance_loss)):
        want = function(z, t, delta=0.1, reduction="sum", eps=1.5)
        torch.testing.assert_close(module(0.1, "sum", 1.5)(z, t), want)
        assert all(want != function(z, t, **{**NARROW, name: value}) for name, value in WIDE.items())
    scores = z.view(5, 2, 2)
    for options in ({"mode": "product"}, {"dim1": 0, "dim2": 2}, {"dim1": 2, "dim2": 0}):
        torch.testing.assert_close(af.DualSoftmax(**options)(scores), af.dual_softmax(scores, **options))
    adapter, maps = af.TeacherAdapter(4, 3, pool="avg"), torch.randn(5, 4, 2, 2)
    want = af.teacher_weights(maps, adapter.theta, adapter.v, pool="avg")
    torch.testing.assert_close(adapter(maps), want)
    assert not torch.equal(want, af.teacher_weights(maps, adapter.theta, adapter.v))


def test_the_hints_of_all_teachers_are_added():
    for options in ({}, {"normalize": True}):
        hints, batch = _hints(**options), _batch()
        maps, taught = batch["student_maps"], batch["teacher_maps"]
        each = [
            af.hint_loss(maps[group], taught[t], hints.transforms[str(t)], **options)
            for t, group in hints.mapping.items()
        ]
        torch.testing.assert_close(hints(maps, taught), sum(each))


def test_the_default_weights_of_the_terms():
    out = af.AMTMLLoss(af.TeacherAdapter(D, T), _hints())(**_batch())
    torch.testing.assert_close(out.loss.detach(), out.kd + out.angle + out.hint + 1e-3 * out.regularizer)


@cpu_only
@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: af.TeacherAdapter(4, 3, pool="avg"), "(channels=4, num_teachers=3, pool='avg')"),
        (lambda: af.AngleLoss(0.5, "sum"), "(delta=0.5, reduction='sum', eps=1e-12)"),
        (lambda: af.RKDDistanceLoss(0.5), "(delta=0.5, reduction='mean', eps=1e-12)"),
        (lambda: af.DualSoftmax(0, 1), "(dim1=0, dim2=1, mode='sequential')"),
        (lambda: _hints(mapping={1: "low"}), "mapping={1: 'low'}, normalize=False"),
        (lambda: af.TeacherGate(2, 5), "(num_teachers=2, classes=5)"),
        (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), alpha=0.3), "alpha=0.3, mode='mixture'"),
    ],
)
def test_a_module_that_is_printed_says_its_settings(module, said):
    assert said in repr(module())


BAD = [
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), _hints())(**{k: v for k, v in _batch().items() if k != "teacher_maps"}), "must be given exactly when hints are"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T))(**_batch()), "must be given exactly when hints are"),
    (lambda: af.AMTMLLoss(None), "AMTMLLoss: adapter must be a torch.nn.Module, got NoneType"),
    (lambda: af.AMTMLLoss(torch.nn.Linear(D, T)), r"AMTMLLoss: adapter must have a regularizer\(\) where regularizer_weight is not 0, got Linear and 0.001"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), hints=[_hints()]), "AMTMLLoss: hints must be a torch.nn.Module or None, got list"),
    (lambda: af.MultiGroupHintLoss([4, 8], [3, 3]), "MultiGroupHintLoss: student_channels must be a dict group -> channels, got list"),
    (lambda: af.MultiGroupHintLoss({"a": 4, "b": 8}, 3), "MultiGroupHintLoss: teacher_channels must be a list of channels, got int"),
    (lambda: af.MultiGroupHintLoss({"a": 4, "b": 0}, [3, 3], mapping="random"), r"MultiGroupHintLoss: student_channels\['b'\] must be an int >= 1, got 0"),
    (lambda: af.MultiGroupHintLoss({"a": 4, "b": 8}, [3, 3.5], mapping="random"), r"MultiGroupHintLoss: teacher_channels\[1\] must be an int >= 1, got 3.5"),
    (lambda: af.MultiGroupHintLoss({"a": 4, "b": 8}, [3, 3], teacher_scores=[0.9, float("nan")]), r"MultiGroupHintLoss: teacher_scores\[1\] must be a number, got nan"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T + 1), _hints())(**_batch()), r"AMTMLLoss: the adapter.s weights must be \[12, 3\] for 12 rows and 3 teachers, got \[12, 4\]"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D + 1, T), _hints())(**_batch()), "theta must be"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), _hints())(**dict(_batch(), teacher_logits=[torch.randn(N, C + 1)] * T)), r"AMTMLLoss: teacher_logits\[0\] must be \[12, 7\]"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), reduction="none"), "reduction must be one of sum, mean, batchmean"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), gather_angle="odd"), "gather_angle must be False, True or 'even', got 'odd'"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), angle_weight=-1.0), "angle_weight must be a number"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), temperature=0.0), "AMTMLLoss: temperature must be a number"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), alpha=1.5), "AMTMLLoss: alpha must be a number"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), delta=0), "AMTMLLoss: delta must be a number"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), label_smoothing=1.5), "AMTMLLoss: label_smoothing must be a number"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(D, T), mode="logits"), "AMTMLLoss: mode must be one of mixture, sum"),
    (lambda: af.TeacherAdapter(0, 3), "channels must be an int >= 1"),
    (lambda: af.TeacherAdapter(3, 3, pool="min"), "pool must be one of max, avg"),
    (lambda: af.MultiGroupHintLoss(GROUPS, [1, 1, 1]), "teacher_scores must be validation accuracies"),
    (lambda: af.MultiGroupHintLoss(GROUPS, [1, 1, 1], teacher_scores=[1.0]), "teacher_scores must have 3 values, got 1"),
    (lambda: af.MultiGroupHintLoss({"a": 1}, [1, 1], teacher_scores=[1, 2]), "at least 2 groups for 2 teachers"),
    (lambda: af.MultiGroupHintLoss(GROUPS, [1], mapping={1: "low"}), r"a teacher in \[0, 1\)"),
    (lambda: af.MultiGroupHintLoss(GROUPS, [1], mapping={False: "low"}), r"a teacher in \[0, 1\) .*, got False: 'low'"),
    (lambda: af.MultiGroupHintLoss(GROUPS, [1], mapping={0.0: "low"}), r"a teacher in \[0, 1\) .*, got 0.0: 'low'"),
    (lambda: af.MultiGroupHintLoss(GROUPS, [1], mapping={}), "mapping must name at least one teacher, got an empty dict"),
    (lambda: af.MultiGroupHintLoss(GROUPS, [1], mapping=None), "mapping must be a name or a dict teacher -> group, got None"),
    (lambda: af.MultiGroupHintLoss({}, [1], mapping="random"), "student_channels and teacher_channels must not be empty, got 0 and 1"),
    (lambda: af.MultiGroupHintLoss(GROUPS, [], mapping="random"), "student_channels and teacher_channels must not be empty, got 3 and 0"),
    (lambda: af.MultiGroupHintLoss(GROUPS, [1], mapping={0: "top"}), "0: 'top'"),
    (lambda: af.MultiGroupHintLoss(GROUPS, [1], mapping="worst"), "mapping must be one of best_high"),
    (lambda: _hints()({"low": torch.zeros(1, 4, 2, 2)}, [torch.zeros(1, c, 2, 2) for c in (3, 4, 8)]), "must hold 'high'"),
    (lambda: _hints()(_batch()["student_maps"], []), "must hold 3 maps, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("amtml", "amtml_triton"):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


class _OwnAdapter(af.TeacherAdapter):
    """Not TeacherAdapter itself, so the loss has to call it."""

    def forward(self, features):
        return super().forward(features)


def _plain_batch(dtype=torch.float32):
    batch = {k: v for k, v in _batch().items() if not k.endswith("maps")}
    return {
        k: v.detach().to(dtype).requires_grad_() if k in ("student_logits", "features") else v for k, v in batch.items()
    }


@pytest.mark.parametrize("adapter", [af.TeacherAdapter, _OwnAdapter])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_whole_loss_is_one_node_and_passes_opcheck(adapter, dtype, on):
    if not takes(on, dtype):
        pytest.skip("the backend takes no float64")
    every = ({}, {"angle_weight": 0.0}, {"angle_trains_weights": True, "regularizer_weight": 0.0})
    slow = on not in ("cpp", "reference") and (dtype, adapter) != (torch.float32, af.TeacherAdapter)
    for options in every[:1] if slow else every:
        batch = _plain_batch(dtype)
        with _Recorder() as seen:
            out = af.AMTMLLoss(adapter(D, T), **options)(**batch)
            out.loss.backward()
        names = [func.overloadpacket.__name__ for func, _ in seen.calls]
        single = ["teacher_weights_fwd", "teacher_weights_bwd"] if adapter is _OwnAdapter else []
        if on != "reference":
            assert sorted(names) == sorted(["whole_loss_fwd", "whole_loss_bwd", *single])
        else:
            assert not any(name.startswith("whole_loss") for name in names)
        # Tracing dynamic shapes takes an interpreter minutes: one of the calls has to do.
        utils = TRACED if on == "cpp" or (dtype, adapter, options) == (torch.float32, af.TeacherAdapter, {}) else FAKED
        for func, args in seen.calls:
            given = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            torch.library.opcheck(func, given, test_utils=utils)


def _replace_forward(adapter, called):
    forward = adapter.forward  # as accelerate's hooks do
    adapter.forward = lambda features: called.append("forward") or forward(features)


def _replace_regularizer(adapter, called):
    regularizer = adapter.regularizer
    adapter.regularizer = lambda: called.append("regularizer") or regularizer()


REPLACED = {
    "forward": _replace_forward,
    "regularizer": _replace_regularizer,
    "forward hook": lambda adapter, called: adapter.register_forward_hook(lambda *_: called.append("hook")),
    "pre-hook": lambda adapter, called: adapter.register_forward_pre_hook(lambda *_: called.append("hook")),
    "backward hook": lambda adapter, called: adapter.register_full_backward_hook(lambda *_: called.append("hook")),
    "backward pre-hook": lambda adapter, called: adapter.register_full_backward_pre_hook(
        lambda *_: called.append("hook")
    ),
    "hook of all modules": lambda adapter, called: torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append("hook") if module is adapter else None
    ),
}


@pytest.mark.parametrize("replaced", ["its class", *REPLACED])
def test_what_an_adapter_replaces_is_what_runs(replaced, on):
    """The shortcut past the adapter's call is for a TeacherAdapter that nothing was done to; both ways agree."""
    plain = af.AMTMLLoss(af.TeacherAdapter(D, T))
    other = af.AMTMLLoss(_OwnAdapter(D, T) if replaced == "its class" else af.TeacherAdapter(D, T))
    other.load_state_dict(plain.state_dict())
    called = []
    handle = REPLACED[replaced](other.adapter, called) if replaced in REPLACED else None
    batch = _plain_batch()
    try:
        want, got = plain(**batch), other(**batch)
        torch.testing.assert_close(tuple(got), tuple(want))
        leaves = batch["student_logits"], batch["features"]
        for a, b in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want.loss, leaves)):
            torch.testing.assert_close(a, b)
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
    assert len(called) == (replaced != "its class")


@pytest.mark.parametrize("name", ["forward", "regularizer"])
def test_another_forward_or_regularizer_of_the_adapter_changes_the_loss(name, on):
    loss = af.AMTMLLoss(af.TeacherAdapter(D, T))
    batch = _plain_batch()
    if name == "forward":
        uniform = torch.full((N, T), 1 / T)
        loss.adapter.forward = lambda features: uniform
        assert torch.equal(loss(**batch).weights, uniform)
    else:
        loss.adapter.regularizer = lambda: torch.tensor(7.0)
        assert loss(**batch).regularizer == 7


@pytest.mark.parametrize("name", ["forward", "regularizer"])
def test_compiled_code_sees_what_an_adapter_replaces_later(name, on):
    loss = af.AMTMLLoss(af.TeacherAdapter(D, T))
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    batch = _plain_batch()
    as_it_was = compiled(**batch)
    uniform = torch.full((N, T), 1 / T)
    setattr(loss.adapter, name, {"forward": lambda features: uniform, "regularizer": lambda: torch.tensor(7.0)}[name])
    torch.testing.assert_close(tuple(compiled(**batch)), tuple(loss(**batch)))
    delattr(loss.adapter, name)
    torch.testing.assert_close(tuple(compiled(**batch)), tuple(as_it_was))


def test_the_regularizer_of_16_bit_parameters_is_in_float32():
    adapter = af.TeacherAdapter(64, 3).bfloat16()
    exact = sum(p.double().square().sum() for p in adapter.parameters())
    torch.testing.assert_close(adapter.regularizer(), exact.float(), rtol=1e-6, atol=0)


def test_whole_loss_backward_twice_and_scaled():
    loss, batch = af.AMTMLLoss(af.TeacherAdapter(D, T)), _plain_batch()
    leaves = [batch["student_logits"], batch["features"], *loss.parameters()]
    out = loss(**batch).loss
    first = torch.autograd.grad(out, leaves, torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(out, leaves, torch.tensor(3.0), retain_graph=True)
    once = torch.autograd.grad(out, leaves)
    for a, b, c in zip(first, second, once):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, 3 * c)


def test_second_derivative_of_the_whole_loss_is_right_or_loud(on):
    loss, batch = af.AMTMLLoss(af.TeacherAdapter(D, T)), _plain_batch()
    (grad,) = torch.autograd.grad(loss(**batch).loss, batch["student_logits"], create_graph=True)
    if on == "reference":
        assert torch.autograd.grad(grad.square().sum(), batch["student_logits"])[0].norm() > 0
    else:
        of = "AMTMLLoss" if on in ("cpp", "cuda") else ""  # the others are made of several operators
        with pytest.raises(RuntimeError, match=rf"{of}.*use_backend\(\"reference\"\)"):
            grad.square().sum().backward()


class _Cube(torch.nn.Module):
    """An adapter over tokens: [B, S, d] -> [B, S, T]."""

    def forward(self, features):
        return features[..., :T].softmax(-1)

    def regularizer(self):
        return torch.zeros(())


def test_an_adapter_may_weigh_tokens_and_is_checked():
    loss, batch = af.AMTMLLoss(_Cube()), _plain_batch()
    flat = {**batch, "features": torch.randn(N, D)}
    cube = {**flat, "features": flat["features"].view(3, 4, D)}
    torch.testing.assert_close(loss(**cube).loss, loss(**flat).loss)
    loss.adapter = torch.nn.Sequential(torch.nn.Linear(D, T), torch.nn.Softmax(-1))
    loss.regularizer_weight = 0.0
    for given in (flat, cube):  # what an ignored row holds gets into no gradient
        features = given["features"].clone()
        features.view(N, D)[2] = torch.nan
        out = loss(**{**given, "features": features})
        torch.testing.assert_close(out.loss, loss(**given).loss)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.loss, list(loss.adapter.parameters())))
    loss.regularizer_weight, loss.adapter = 1e-3, torch.nn.Sequential()  # gives the features back
    with pytest.raises(ValueError, match=r"AMTMLLoss: the adapter.s weights must be \[12, 3\]"):
        loss(**flat)
    loss.adapter.forward = lambda features: None
    with pytest.raises(TypeError, match="AMTMLLoss: the adapter's weights must be a tensor"):
        loss(**flat)


class _Constant(torch.nn.Module):
    """An adapter or hints whose term is a constant of any kind."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, features, maps=None):
        return torch.full((len(features), T), 1 / T) if maps is None else self.value

    def regularizer(self):
        return self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "must be a tensor, got float"),
        (torch.tensor(2), "must be float32, .* got torch.int64"),  # of which 1e-3 would be 0
        (torch.ones(3), r"must be a scalar, got \[3\]"),
    ],
)
def test_terms_of_other_modules_are_scalars_or_named(value, message):
    batch = _batch()
    maps = {name: batch.pop(name) for name in ("student_maps", "teacher_maps")}
    with pytest.raises((TypeError, ValueError), match=r"AMTMLLoss: the adapter's regularizer\(\) " + message):
        af.AMTMLLoss(_Constant(value))(**batch)
    with pytest.raises((TypeError, ValueError), match="AMTMLLoss: the hints' loss " + message):
        af.AMTMLLoss(_Constant(torch.zeros(())), _Constant(value))(**batch, **maps)


@cpu_only
def test_negative_weights_of_an_adapter_are_refused():
    """As of scores without a softmax; the loss of them would be a number. An ignored row may hold any."""
    loss, batch = af.AMTMLLoss(torch.nn.Identity(), regularizer_weight=0.0), _plain_batch()
    weights = torch.full((N, T), 1 / T)
    weights[2] = -1
    want = loss(**{**batch, "features": weights}).loss
    weights[2] = 1
    torch.testing.assert_close(loss(**{**batch, "features": weights}).loss, want)
    weights[3, 1] = -0.25
    with pytest.raises(
        ValueError, match=r"AMTMLLoss: the adapter.s weights must be 0 or more, such as those of a softmax, got -0\.25"
    ):
        loss(**{**batch, "features": weights})
    weights[3, 1] = torch.nan
    assert loss(**{**batch, "features": weights}).loss.isnan()


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("temperature", 0.0),
        ("alpha", 2.0),
        ("delta", -1.0),
        ("mode", "x"),
        ("reduction", "none"),
        ("reduction", "x"),
        ("angle_weight", -1.0),
        ("hint_weight", -1.0),
        ("regularizer_weight", float("nan")),
        ("gather_angle", "x"),
    ],
)
def test_settings_changed_later_are_checked_too(attribute, value):
    loss = af.AMTMLLoss(af.TeacherAdapter(D, T))
    setattr(loss, attribute, value)
    with pytest.raises(ValueError, match=f"{attribute} must be"):
        loss(**_plain_batch())


def test_hint_loss_of_one_float64_map_is_float64():
    student, teacher, weight = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 8, 8), torch.randn(5, 3)
    want = reference.hint_loss(student.double(), teacher.double(), weight.double(), normalize=True)
    for given in ((student.double(), teacher, weight), (student, teacher.double(), weight)):
        try:
            got = af.hint_loss(*given, normalize=True)
        except RuntimeError as error:
            assert "its kernels compute in float32" in str(error)
            continue
        assert got.dtype == torch.float64 and relative_error(got, want) < 1e-14


@pytest.mark.skipif(CHOSEN == "emulated", reason="a checkpoint tells the stand-in for a GPU from the CPU")
def test_a_first_derivative_with_a_graph_under_a_checkpoint():
    """Whose tensors are there but once."""
    batch = _batch()
    z, teachers, labels = (batch[name] for name in ("student_logits", "teacher_logits", "labels"))
    losses = {
        "multi_teacher_kd": lambda x: af.multi_teacher_kd_loss(x, teachers, None, labels),
        "divergence": lambda x: af.multi_teacher_kd_loss(x, teachers, None, labels, divergence="jsd"),
        "angle": lambda x: af.angle_loss(x, teachers[0]),
        "linear": lambda x: af.fused_linear_kd_loss(x, torch.eye(C), teachers, None, labels),
    }
    for name, loss in losses.items():
        (want,) = torch.autograd.grad(loss(z), z)
        value = torch.utils.checkpoint.checkpoint(loss, z, use_reentrant=False)
        (got,) = torch.autograd.grad(value, z, create_graph=True)
        assert torch.equal(got, want), name


def test_forward_derivatives_have_the_dtype_of_the_loss():
    batch = _batch()
    module = af.AMTMLLoss(af.TeacherAdapter(D, T))

    def loss(student):
        return module(student, batch["teacher_logits"], batch["labels"], batch["features"].detach()).loss

    z = batch["student_logits"].detach()
    value, tangent = torch.func.jvp(loss, (z,), (torch.ones_like(z),)) if _takes_transforms() else (z, z)
    assert tangent.dtype == value.dtype


def _takes_transforms():
    return backend._active in ("auto", "reference")


@cpu_only
@pytest.mark.parametrize("compiled", [False, True])
def test_settings_of_a_module_are_attributes_that_count(compiled):
    """As of AMTMLLoss and of torch's losses: a schedule sets the temperature, a library the reduction."""
    z, t, y = torch.randn(4, 5), torch.randn(4, 5), torch.arange(4)
    top = t.log_softmax(-1).topk(3)
    given = {
        af.MultiTeacherKDLoss(): (af.multi_teacher_kd_loss, (z, [t], None, y)),
        af.TopKKDLoss(): (af.topk_kd_loss, (z, [top.indices], [top.values], None, y)),
        af.FusedLinearKDLoss(): (af.fused_linear_kd_loss, (z, torch.eye(5), [t], None, y)),
    }
    for module, (function, args) in given.items():
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        for options in ({}, {"temperature": 1.5}, {"alpha": 0.25, "reduction": "none"}, {"reduction": "sum"}):
            for name, value in options.items():
                setattr(module, name, value)
                assert getattr(module, name) == value == module.options[name]
            torch.testing.assert_close(call(*args), function(*args, **module.options))
        again = copy.deepcopy(module)
        again.alpha = 0.9
        assert (module.alpha, again.options["alpha"]) == (0.25, 0.9) and "alpha=0.25" in repr(module)
        with pytest.raises(AttributeError, match="'temprature'"):
            module.temprature  # noqa: B018
        with pytest.raises(ValueError, match="temperature must be a number"):
            again.temperature = -1.0
            again(*args)


@cpu_only
def test_an_adapter_that_is_set_later_has_a_regularizer_or_is_named(on):
    loss = af.AMTMLLoss(af.TeacherAdapter(3, 2))
    loss.adapter = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Softmax(-1))
    with pytest.raises(
        TypeError, match=r"AMTMLLoss: adapter must have a regularizer\(\) .*, got Sequential and 0\.001"
    ):
        loss(torch.randn(4, 5), [torch.randn(4, 5)] * 2, torch.arange(4), torch.randn(4, 3))
    loss.regularizer_weight = 0.0
    assert loss(torch.randn(4, 5), [torch.randn(4, 5)] * 2, torch.arange(4), torch.randn(4, 3)).loss.isfinite()


class _Quantized(torch.Tensor):
    """As those of torchao: made wide where it is asked to be, and otherwise an argument of F.linear alone."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.t, torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            raise NotImplementedError(f"{function.__name__} of a quantized tensor")
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) if function is torch.nn.functional.linear else out


@cpu_only
def test_output_layers_that_know_nothing_but_linear():
    hidden, weight, taught = torch.randn(6, 4), torch.randn(9, 4), torch.randn(9, 4)
    want = af.fused_linear_kd_loss(hidden, weight, [af.LinearTeacher(hidden, taught)], None)
    with af.use_backend("reference"):
        teacher = af.LinearTeacher(hidden, taught.as_subclass(_Quantized))
        torch.testing.assert_close(af.fused_linear_kd_loss(hidden, weight, [teacher], None), want)
