"""amtml_fast.dropin against the plain formulas it replaces (``drop_ins.KINDS``), in the dtype of their inputs."""

import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from backends import CHOSEN, DEVICE, cpu_only
from drop_ins import (
    KINDS,
    MAP_S,
    SOFT,
    TARGET,
    TOKENS_S,
    TOKENS_T,
    C,
    N,
    S,
    T,
    converted,
    decoupled,
    draw,
    exactly,
    gradients,
    leaf,
    mean_kl,
    over_examples,
    over_teachers,
    plain_angle,
    plain_distance,
    plain_learning_loss,
    plain_loss,
)

from amtml_fast import angle_loss, dropin, rkd_distance_loss
from amtml_fast.testing import relative_error


def test_every_drop_in_is_compared():
    language, liger = dropin.dropin_language.__all__, dropin.dropin_liger.__all__  # have test files of their own
    elsewhere = {*language, *liger}
    assert {name.split("-")[0] for name in KINDS} == set(dropin.__all__) - elsewhere


# What their constructors and calls take, each with its default.
SIGNATURES = {
    "Adapter": "(teacher_models, pool_size) (conv_map, te_logits_list=None)",
    "AngleWiseRKD": "(loss_weight=50.0, with_l2_norm=True) (preds_S, preds_T)",
    "DKDLoss": "(tau=1.0, alpha=1.0, beta=1.0, reduction='batchmean', loss_weight=1.0) (preds_S, preds_T, gt_labels)",
    "DistanceWiseRKD": "(loss_weight=25.0, with_l2_norm=True) (preds_S, preds_T)",
    "DistillKL": "(T) (y_s, y_t, is_ca=False, unreduce=False)",
    "FitNet": "(in_feature, out_feature) (student, teacher)",
    "ForwardKLLoss": "(ignore_index=-100) (student_logits, teacher_logits, labels, normalize=True)",
    "ForwardKLWithChunkedOutputLoss": "(num_output_chunks=8, ignore_index=-100) (student_logits, teacher_logits, labels)",
    "HintLoss": "() (f_s, f_t)",
    "KLDivergence": "(tau=1.0, reduction='batchmean', loss_weight=1.0, teacher_detach=True) (preds_S, preds_T)",
    "LearningAdapter": "(teacher_models, pool_size) (conv_map, te_logits_list=None)",
    "LigerFusedLinearJSD": "(jsd_beta=0.5, ignore_index=-100, temperature=1.0, accum_dtype=None) "
    "(student_input, student_weight, teacher_input, teacher_weight, shift_labels=None)",
    "LigerFusedLinearJSDLoss": "(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, ignore_index=-100, temperature=1.0, "
    "compiled=True, chunk_size=None, return_soft_hard_loss=False) "
    "(student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias=None, teacher_bias=None)",
    "LogitsDistillationLoss": "(temperature=1.0, reduction='mean') (logits_s, logits_t)",
    "MatchLogits": "(opt) (logit_s, logit_t_list, logits_weight)",
    "MixtureAdapter": "(teacher_models, pool_size) (conv_map, te_logits_list=None)",
    "RKDLoss": "(w_d=25, w_a=50) (f_s, f_t)",
    "RKdAngle": "() (student, teacher)",
    "ReverseKLLoss": "(ignore_index=-100) (student_logits, teacher_logits, labels, normalize=True)",
    "ReverseKLWithChunkedOutputLoss": "(num_output_chunks=8, ignore_index=-100) (student_logits, teacher_logits, labels)",
    "RkdDistance": "() (student, teacher)",
    "SymmetricKLLoss": "(sym_kd_ratio=0.5, ignore_index=-100) (student_logits, teacher_logits, labels, normalize=True)",
    "SymmetricKLWithChunkedOutputLoss": "(num_output_chunks=8, sym_kd_ratio=0.5, ignore_index=-100) "
    "(student_logits, teacher_logits, labels)",
    "dense_kl_div": "(logits, target_logits, mask=None, temperature=1.0)",
    "dkd_loss": "(logits_student, logits_teacher, target, alpha, beta, temperature, logit_stand=False)",
    "forward_kl": "(logits, teacher_logits, no_model_batch)",
    "generalized_jsd_loss": "(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction='batchmean', "
    "num_items_in_batch=None)",
    "js_distance": "(logits, teacher_logits, no_model_batch, lam=0.9)",
    "kd_loss": "(logits_student, logits_teacher, temperature, logit_stand=False)",
    "reverse_kl": "(logits, teacher_logits, no_model_batch)",
    "rkd_loss": "(f_s, f_t, squared=False, eps=1e-12, distance_weight=25, angle_weight=50)",
    "skewed_forward_kl": "(logits, teacher_logits, no_model_batch, lam=0.1)",
    "skewed_reverse_kl": "(logits, teacher_logits, no_model_batch, lam=0.1)",
    "sparse_kl_div": "(logits, target_ids, target_values, mask=None, eps=1e-06, missing='zero', log_target=True, "
    "temperature=1.0, target_generation_temperature=1.0, student_generation_temperature=1.0, chunk_length=None)",
    "symmetric_kl": "(logits, teacher_logits, no_model_batch, lam=0.9)",
    "tv_distance": "(logits, teacher_logits, no_model_batch)",
}


def _taken(call):
    given = [p for p in inspect.signature(call).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    given = [p for p in given if p.name != "self"]
    return f"({', '.join(p.name if p.default is p.empty else f'{p.name}={p.default!r}' for p in given)})"


@cpu_only
def test_constructors_and_calls_take_what_theirs_take():
    """By position, by name and by default: of a default that is another one nobody would hear."""
    found = {}
    for name in dropin.__all__:
        kind = getattr(dropin, name)
        calls = (kind.__init__, kind.forward) if inspect.isclass(kind) else (kind,)
        found[name] = " ".join(map(_taken, calls))
    assert found == SIGNATURES
    for kind in (dropin.Adapter, dropin.MixtureAdapter, dropin.LearningAdapter):
        assert _taken(kind.loss) == "(y, labels, weighted_logits, T=10.0, alpha=0.7)"


@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_those_of_the_formula(name, on):
    ours, plain, args = KINDS[name]
    want, want_grads = gradients(plain, exactly(args))
    got, grads = gradients(ours, converted(args, lambda a: a.to(DEVICE)))
    assert got.dtype == torch.float32 and got.shape == want.shape and (want > 0).all()
    assert relative_error(got, want) < 1e-6
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert want_grad.norm() > 0 and relative_error(grad, want_grad) < 1e-5


NARROW = {"bf16": (torch.bfloat16, False), "fp16": (torch.float16, False), "bf16-autocast": (torch.bfloat16, True)}


@pytest.mark.parametrize(
    "name, dtype, autocast",
    [
        pytest.param(name, *how, id=f"{name}-{key}")
        for i, name in enumerate(KINDS)
        for j, (key, how) in enumerate(NARROW.items())
        if CHOSEN in ("", "gpu") or (i - j) % len(NARROW) == 0  # an interpreter's time is for one of them, in turn
    ],
)
def test_16_bit_inputs_are_computed_in_float32(name, dtype, autocast, on):
    """The value of the rounded inputs to float32's rounding; of the gradient, only the last step is 16-bit."""
    ours, plain, args = KINDS[name]
    narrow = converted(args, lambda a: a.to(DEVICE, dtype) if a.is_floating_point() else a.to(DEVICE))
    want, want_grads = gradients(
        plain, converted(narrow, lambda a: a.cpu().double() if a.is_floating_point() else a.cpu())
    )
    got, grads = gradients(ours, narrow, autocast)
    assert got.dtype == torch.float32 and relative_error(got, want) < 1e-6
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert grad.dtype == dtype and relative_error(grad, want_grad) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("name", KINDS)
def test_autocast_narrows_nothing(name, on):
    ours, _, args = KINDS[name]
    args = converted(args, lambda a: a.to(DEVICE))
    want, want_grads = gradients(ours, args)
    got, grads = gradients(ours, args, autocast=True)
    torch.testing.assert_close([got, *grads], [want, *want_grads], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_none_or_one(name, length, on):
    """0 where theirs are NaN, and finite gradients."""
    ours, plain, args = KINDS[name]
    short = converted(args, lambda a: a[:length] if a.shape[:1] == (N,) else a)
    got, grads = gradients(ours, converted(short, lambda a: a.to(DEVICE)))
    assert all(g.isfinite().all() for g in (got, *grads))
    if length == 0:
        assert got.sum() == 0
    elif name != "LearningAdapter-loss":  # the sum of what is and what is not NaN in the formula
        want, _ = gradients(plain, exactly(short))
        assert relative_error(got, want.nan_to_num()) < 1e-5  # of one row, where no rounding averages out


# --- where the logits are not [N, C]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dropin.DistillKL(4)(TOKENS_S, TOKENS_T, is_ca=True), r"DistillKL: y_s must be \[N, C\] with is_ca"),
        (lambda: dropin.DistillKL(4)(TOKENS_S, TOKENS_T, unreduce=True), r"DistillKL: y_s must be \[N, C\] with is_ca"),
        (lambda: dropin.DistillKL(4)(S[0], T[0]), r"DistillKL: y_s must be \[N, C\] or \[N, C, ...\], .* got \[9\]"),
        (lambda: dropin.DistillKL(4)(S, T[:1]), r"DistillKL: y_t must be \[12, 9\] like y_s, got \[1, 9\]"),
        (
            lambda: dropin.kd_loss(TOKENS_S, TOKENS_T.mT, 4),
            r"kd_loss: logits_teacher must be \[12, 9, 7\] like logits_student, got \[12, 7, 9\]",
        ),
        (
            lambda: dropin.MatchLogits(4)(TOKENS_S, [TOKENS_T], torch.ones(N, 1)),
            r"MatchLogits: logit_s must be \[N, C\], got \[12, 9, 7\]",
        ),
        (
            lambda: dropin.Adapter([None], MAP_S.shape).loss(TOKENS_S, torch.zeros(N).long(), TOKENS_T),
            r"Adapter.loss: y must be \[N, C\], got \[12, 9, 7\]",
        ),
        (
            lambda: dropin.LearningAdapter([None], MAP_S.shape).loss(S, torch.zeros(N).long(), SOFT),
            r"LearningAdapter.loss: weighted_logits must be \[12, 9\] or broadcast to it, got \[12, 4, 9\]",
        ),
        (
            lambda: dropin.MixtureAdapter([None] * 3, MAP_S.shape)(MAP_S, SOFT),
            r"MixtureAdapter: te_logits_list must be \[12, 3, C\], got \[12, 4, 9\]",
        ),
        (
            lambda: dropin.FitNet(3, 7)(MAP_S, draw(N, 7, 2, 2)),
            r"FitNet: teacher must have the height and width of student",
        ),
        (
            lambda: dropin.MixtureAdapter([None] * 4, MAP_S.shape)(MAP_S, [*SOFT]),
            "MixtureAdapter: te_logits_list must be a tensor, got list",
        ),
        (
            lambda: dropin.DKDLoss()(S, T, TARGET.float()),
            "DKDLoss: gt_labels must be an int64 or int32 tensor, got torch.float32",
        ),
        (lambda: dropin.HintLoss()(S, T[:, :1]), r"HintLoss: f_t must be \[12, 9\] like f_s, got \[12, 1\]"),
        (
            lambda: dropin.KLDivergence(reduction="none"),
            r"KLDivergence: reduction must be one of batchmean, sum, mean, got 'none'",
        ),
        (lambda: dropin.KLDivergence(teacher_detach=False), r"KLDivergence: teacher_detach must be True .* got False"),
        (lambda: dropin.DKDLoss(reduction="mean"), r"DKDLoss: reduction must be one of batchmean, sum, got 'mean'"),
        (lambda: dropin.DKDLoss()(TOKENS_S, TOKENS_T, TARGET), r"DKDLoss: preds_S must be \[N, C\], got \[12, 9, 7\]"),
        (lambda: dropin.DKDLoss()(S, T[:1], TARGET), r"DKDLoss: preds_T must be \[12, 9\] like preds_S, got \[1, 9\]"),
        (lambda: dropin.dkd_loss(S, T, TARGET[:3], 1, 8, 4), r"dkd_loss: target must be \[12\], got \[3\]"),
        (lambda: dropin.dkd_loss(S, T, TARGET + 1, 1, 8, 4), r"dkd_loss: target must be in \[0, 9\), got 9"),
        (lambda: dropin.dkd_loss(S, T, TARGET - 100, 1, 8, 4), r"dkd_loss: target must be in \[0, 9\), got -100"),
        (lambda: dropin.dkd_loss(S, S, TARGET, 1, 8, 4), r"teacher_logits\[0\] must be detached"),
        (lambda: dropin.dkd_loss(S, "t", TARGET, 1, 8, 4, True), "dkd_loss: logits_teacher must be a tensor, got str"),
        (lambda: dropin.kd_loss("s", T, 4, True), "kd_loss: logits_student must be a tensor, got str"),
    ],
)
def test_what_would_differ_from_theirs_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@cpu_only
def test_maps_of_two_devices_are_named():
    with pytest.raises(ValueError, match="HintLoss: f_t must be on cpu like f_s, got meta"):
        dropin.HintLoss()(S, T.to("meta"))


@pytest.mark.parametrize("size", [(N, 2), (2,), (1, 2), (N, 1), (1, 1), ()], ids=str)
def test_match_logits_broadcasts_its_weights(size, on):
    args = S, [T, T.flip(0)], draw(N, 3).abs()[: size[0] if len(size) > 1 else 1, : size[-1] if size else 1]
    weights = args[2].reshape(size).requires_grad_()
    want, want_grads = gradients(lambda s, ts, w: over_teachers(s, ts, w, 4), exactly((*args[:2], weights)))
    got, grads = gradients(dropin.MatchLogits(4), converted((*args[:2], weights), lambda a: a.to(DEVICE)))
    assert relative_error(got, want) < 1e-6
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(grads, want_grads, strict=True))


def test_the_gradient_of_a_weight_that_all_rows_share_is_summed_in_float32(on):
    """Of a single row it is below half's smallest number."""
    teacher = draw(4096, 3)
    student = teacher + 0.02 * draw(4096, 4)[:, :3]
    weight = torch.tensor(1.0, dtype=torch.half, device="cpu")
    args = student.half(), [teacher.half()], weight.requires_grad_()
    _, (want,) = gradients(lambda s, ts, w: over_teachers(s, ts, w, 4), exactly(args))
    assert want / len(student) < torch.finfo(torch.half).smallest_normal / 1024
    _, (got,) = gradients(dropin.MatchLogits(4), converted(args, lambda a: a.to(DEVICE)))
    assert relative_error(got, want) < torch.finfo(torch.half).eps / 2


@pytest.mark.parametrize("size", [(3,), (2, 1), (N, 3), (1, N, 2)], ids=str)
def test_match_logits_refuses_other_weights(size):
    with pytest.raises(ValueError, match=r"MatchLogits: logits_weight must be \[12, 2\] or broadcast to it, got \["):
        dropin.MatchLogits(4)(S, [T, T.flip(0)], torch.ones(size))


# --- where the originals are NaN


def test_the_decoupled_loss_loses_nothing_where_the_student_is_sure(on):
    """Beside a logit of 200 the softmax of the others is 0 in float32: theirs is infinite, its gradient NaN."""
    student = (S.detach() + 200 * F.one_hot(TARGET, C)).requires_grad_()
    want, (want_grad,) = gradients(lambda s, t: decoupled(s, t, TARGET, 1, 8, 1) / N, exactly((student, T)))
    args = converted((student, T, TARGET), lambda a: a.to(DEVICE))
    got, (grad,) = gradients(lambda s, t, y: dropin.dkd_loss(s, t, y, 1.0, 8.0, 1.0), args)
    assert want > 10 and relative_error(got, want) < 1e-6 and relative_error(grad, want_grad) < 1e-5


def test_the_decoupled_loss_of_rows_without_another_class(on):
    """Nothing is left to compare there: a KL of 0."""
    one = S[:, :1].detach().to(DEVICE).requires_grad_()
    got, (grad,) = gradients(
        lambda s: dropin.dkd_loss(s, s.detach() + 1, torch.zeros(N).long().to(DEVICE), 1, 8, 4), (one,)
    )
    assert got == 0 and (grad == 0).all()
    student, teacher = converted((S, T), lambda a: a.to(DEVICE))
    want, _ = gradients(
        lambda s, t: decoupled(s, t, TARGET[1:], 1, 8, 4) / N, exactly((S.detach()[1:].requires_grad_(), T[1:]))
    )
    with torch.no_grad():
        for z in (student, teacher):
            z[0] = torch.where(torch.arange(C).to(DEVICE) == TARGET[0].to(DEVICE), z[0], -math.inf)
    got, (grad,) = gradients(lambda s: dropin.dkd_loss(s, teacher, TARGET.to(DEVICE), 1, 8, 4), (student,))
    assert relative_error(got, want) < 1e-6 and (grad[0] == 0).all() and grad.isfinite().all()


def test_an_infinite_part_of_the_decoupled_loss_without_weight_counts_nothing(on):
    student, teacher = converted((S, T), lambda a: a.to(DEVICE))
    with torch.no_grad():
        student[torch.arange(N), TARGET] = -math.inf
    target = TARGET.to(DEVICE)
    assert dropin.dkd_loss(student, teacher, target, 1.0, 8.0, 1.0) == math.inf
    got, (grad,) = gradients(lambda s, t, y: dropin.dkd_loss(s, t, y, 0.0, 8.0, 1.0), (student, teacher, target))
    assert got.isfinite() and got > 0 and grad.isfinite().all() and grad.norm() > 0


def without(z, c):
    return torch.cat([z[:, :c], z[:, c + 1 :]], 1)


@pytest.mark.parametrize(
    "name", ["DistillKL", "DistillKL-is_ca", "DistillKL-tokens", "kd_loss", "kd_loss-tokens", "kd_loss-standardized"]
)
def test_a_masked_class_counts_nothing(name, on):
    """-inf on both sides is as if the class were not there; on the teacher's alone, as if it had probability 0."""
    ours, plain, (student, teacher) = KINDS[name]
    masked = [z.detach().clone() for z in (student, teacher)]
    for z in masked:
        z[:, 4] = -math.inf
    want, (want_grad,) = gradients(plain, exactly((without(student, 4).detach().requires_grad_(), without(teacher, 4))))
    got, (grad,) = gradients(ours, (masked[0].to(DEVICE).requires_grad_(), masked[1].to(DEVICE)))
    assert relative_error(got, want) < 1e-6 and (grad[:, 4] == 0).all()
    assert relative_error(without(grad, 4), want_grad) < 1e-5

    got, (grad,) = gradients(ours, (student.detach().to(DEVICE).requires_grad_(), masked[1].to(DEVICE)))
    assert got.isfinite().all() and grad.isfinite().all() and (grad[:, 4] != 0).all()
    if "standardized" not in name:  # theirs is finite, too
        want, (want_grad,) = gradients(plain, exactly((student, masked[1])))
        assert relative_error(got, want) < 1e-6 and relative_error(grad, want_grad) < 1e-5


def test_constant_rows_are_standardized_to_0(on):
    student = torch.full((3, 5), 2.0, device=DEVICE, requires_grad=True)
    got, (grad,) = gradients(lambda s, t: dropin.kd_loss(s, t, 4, True), (student, torch.ones(3, 5, device=DEVICE)))
    assert abs(got) < 1e-6 and (grad.abs() < 1e-6).all()


def test_a_row_of_one_class_is_standardized_to_0(on):
    """One finite logit has no deviation."""
    student = S.detach().clone()
    student[1, 1:] = -math.inf
    student = student.to(DEVICE).requires_grad_()
    got, (grad,) = gradients(lambda s: dropin.kd_loss(s, s.detach(), 4, True), (student,))
    assert abs(got) < 1e-6 and grad.isfinite().all()


@pytest.mark.parametrize("kind", [dropin.Adapter, dropin.MixtureAdapter, dropin.LearningAdapter])
def test_a_class_without_mass_counts_nothing_in_the_adapters_loss(kind, on):
    """All teachers -inf at a class, or so far below the others that float32 has 0: the weights' gradients stay right."""
    ours, plain, (*adapted, _, _, labels) = KINDS[f"{kind.__name__}-loss"]
    for masked in (-math.inf, -600.0):  # the softmax at T = 5 of the latter is 0 in float32, not in float64
        logits = torch.stack([draw(N, C + i)[:, :C] for i in range(4)], 1)
        logits[..., 4] = masked
        args = (*adapted, (logits / 5).softmax(-1), leaf(N, C), labels)
        assert (args[3][..., 4] == 0).all()
        sure = args[3].double().clamp(min=1e-60)  # which float64 can take the logarithm of
        want, want_grads = gradients(plain, (*exactly(args)[:3], sure, *exactly(args)[4:]))
        got, grads = gradients(ours, converted(args, lambda a: a.to(DEVICE)))
        assert relative_error(got, want) < 1e-6
        assert all(relative_error(g, w) < 1e-5 for g, w in zip(grads, want_grads, strict=True))


def test_the_adapters_loss_where_most_of_a_softmax_underflows(on):
    """In float64 nothing does: its gradients are the right ones."""
    ours, plain, (*adapted, _, y, labels) = KINDS["Adapter-loss"]
    logits = torch.stack([draw(N, C + i)[:, :C] - 200 * (draw(N, C) > 0.5) for i in range(4)], 1)
    assert (logits.softmax(-1).sum(1) == 0).any() and (logits.double().softmax(-1) > 0).all()
    want, want_grads = gradients(plain, exactly((*adapted, logits.double().softmax(-1), y, labels)))
    args = (*adapted, logits.softmax(-1), y, labels)
    got, grads = gradients(ours, converted(args, lambda a: a.to(DEVICE)))
    assert relative_error(got, want) < 1e-6
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(grads, want_grads, strict=True))


def test_an_infinite_part_of_the_adapters_loss_without_weight_counts_nothing(on):
    """Masked in the student: a class that the teachers have, or that is the label."""
    *_, y, labels = KINDS["Adapter-loss"][2]
    y, labels, mixed = (x.to(DEVICE) for x in (y.detach().clone(), labels.clamp(max=3), draw(N, C).softmax(1)))
    of, masked = dropin.Adapter([None], MAP_S.shape).eval(), y.clone()
    masked[:, 4] = -math.inf
    want = F.cross_entropy(without(masked, 4), labels)
    got, (grad,) = gradients(lambda y: of.loss(y, labels, mixed, 5.0, 0.0), (masked.requires_grad_(),))
    torch.testing.assert_close(got, want)
    assert grad.isfinite().all() and (grad[:, 4] == 0).all()
    targets = torch.cat([mixed[:, :4], 0 * mixed[:, :1], mixed[:, 5:]], 1)
    got, (grad,) = gradients(lambda y: of.loss(y, torch.full_like(labels, 4), targets, 5.0, 1.0), (masked,))
    assert got.isfinite() and grad.isfinite().all()
    got, (grad,) = gradients(lambda y: of.loss(y, labels, mixed, 5.0), (masked,))  # with weight it is
    assert got == math.inf and (grad[:, 4] == 0).all()


@pytest.mark.parametrize("kind", [dropin.Adapter, dropin.LearningAdapter])
def test_the_adapters_loss_of_a_student_with_masked_classes(kind, on):
    *_, y, labels = KINDS["Adapter-loss"][2]
    labels, mixed = labels.clamp(max=3), draw(N, C - 1).softmax(1)

    def plain(y):
        log_q = F.log_softmax(y / 5, 1)
        kl = mean_kl(log_q, mixed.double(), 5, 0.7) * (C - 1) / C  # the masked class counts in the mean
        if kind is dropin.Adapter:
            return kl + 0.3 * F.cross_entropy(y, labels)
        relations = plain_angle(log_q, mixed.double()) + plain_distance(log_q, mixed.double())
        return kl + 0.3 * F.cross_entropy(log_q, labels) + relations

    want, (want_grad,) = gradients(plain, exactly((without(y, 4).detach().requires_grad_(),)))
    student = y.detach().clone()
    student[:, 4] = -math.inf
    targets = torch.cat([mixed[:, :4], 0 * mixed[:, :1], mixed[:, 4:]], 1).to(DEVICE)
    of = kind([None] * 4, MAP_S.shape).eval()
    got, (grad,) = gradients(
        lambda y: of.loss(y, labels.to(DEVICE), targets, 5.0), (student.to(DEVICE).requires_grad_(),)
    )
    assert relative_error(got, want) < 1e-6 and (grad[:, 4] == 0).all()
    assert relative_error(without(grad, 4), want_grad) < 1e-5


def test_nan_stays_nan(on):
    """Nothing takes it for a masked class or for equal rows."""
    student = S.detach().clone()
    student[2, 3] = math.nan
    student, teacher = student.to(DEVICE), T.to(DEVICE)
    for loss in (
        dropin.DistillKL(4),
        dropin.rkd_loss,
        lambda s, t: dropin.kd_loss(s, t, 4, True),
        lambda s, t: dropin.Adapter([None], MAP_S.shape).eval().loss(s, t.argmax(1), t.softmax(1)),
    ):
        assert loss(student, teacher).isnan()


def test_squared_distances_of_large_half_features(on):
    student, teacher = (300 * draw(8, width)[:, :2048].half().to(DEVICE) for width in (2048, 2049))
    got = dropin.rkd_loss(student, teacher, squared=True, angle_weight=0)
    want = 25 * plain_distance(student.cpu().double(), teacher.cpu().double(), squared=True)
    assert relative_error(got, want) < 1e-6


def test_equal_rows_have_finite_gradients_where_the_plain_formulas_blow_up():
    student = torch.cat([S.detach()[:6]] * 2).requires_grad_()
    for loss in (dropin.RKdAngle(), dropin.RkdDistance(), dropin.rkd_loss, partial(dropin.rkd_loss, squared=True)):
        (grad,) = torch.autograd.grad(loss(student, T), student)
        assert grad.isfinite().all() and 0 < grad.abs().max() < 100


@cpu_only  # in float32 such distances have no digits
def test_pairs_that_are_nearly_equal_are_left_out_of_the_mean():
    """Below 1e-6, and of rkd_loss below the root of ``eps``."""
    near, apart, teacher = S.detach().double(), S.detach().double(), T.double()
    near[1] = near[0] + 1e-7 * draw(C)
    apart[1] = near[0]
    adapter = dropin.LearningAdapter([None], MAP_S.shape).eval()
    for loss in (
        dropin.RkdDistance(),
        partial(dropin.rkd_loss, angle_weight=0),
        dropin.DistanceWiseRKD(with_l2_norm=False),
        lambda s, t: adapter.loss(s, TARGET, t.softmax(1), 1.0) - angle_loss(s.log_softmax(1), t.softmax(1)),
    ):
        torch.testing.assert_close(loss(near, teacher), loss(apart, teacher), rtol=1e-5, atol=0)
    wide = dropin.rkd_loss(S.detach(), T, eps=16.0, angle_weight=0)
    torch.testing.assert_close(wide, 25 * rkd_distance_loss(S.detach(), T, eps=4.0))
    assert wide != dropin.rkd_loss(S.detach(), T, angle_weight=0)
    got = dropin.rkd_loss(*exactly((S, T)), squared=True, eps=0.0, angle_weight=0)  # a row and itself are no pair
    assert relative_error(got, 25 * plain_distance(*exactly((S, T)), squared=True)) < 1e-6


# --- the modules


def test_fitnet_is_the_authors():
    net = dropin.FitNet(3, 7)
    assert net.transform.weight.abs().max() <= 0.005 and net.transform.bias is None
    assert list(net.state_dict()) == ["transform.weight"]


@pytest.mark.parametrize("kind", [dropin.Adapter, dropin.MixtureAdapter, dropin.LearningAdapter])
def test_adapter_is_the_authors(kind):
    ours = kind([None] * 4, MAP_S.shape)
    torch.manual_seed(1)
    assert torch.equal(ours.theta, torch.randn(4, 3)) and torch.equal(ours.W, torch.randn(3, 1))
    mixed, labels = SOFT[:, 0], torch.arange(N) % C
    decay = 0.1 * (ours.W.square().sum() + ours.theta.square().sum())
    training = ours.loss(S, labels, mixed)
    evaluated = ours.eval().loss(S, labels, mixed)
    torch.testing.assert_close(training, evaluated + decay)
    plain = plain_learning_loss if kind is dropin.LearningAdapter else plain_loss
    torch.testing.assert_close(evaluated, plain(S, labels, mixed, 10, 0.7))
    assert ours.train().val is False
    for one_term in (0.0, 1.0):
        torch.testing.assert_close(
            ours.eval().loss(S, labels, mixed, 5, one_term), plain(S, labels, mixed, 5, one_term)
        )


def test_adapter_is_made_on_the_default_device():
    with torch.device("meta"):
        assert dropin.Adapter([None] * 4, MAP_S.shape).theta.device.type == "meta"


def test_the_adapters_loss_broadcasts_one_soft_target():
    ours, labels = dropin.Adapter([None], MAP_S.shape).eval(), torch.arange(N) % C
    torch.testing.assert_close(ours.loss(S, labels, SOFT[0, 0]), ours.loss(S, labels, SOFT[0, 0].expand(N, C)))


@pytest.mark.parametrize("kind", [dropin.Adapter, dropin.MixtureAdapter, dropin.LearningAdapter])
def test_the_adapters_loss_takes_integer_labels_alone(kind):
    ours, labels, soft = kind([None], MAP_S.shape).eval(), torch.arange(N) % C, SOFT[:, 0]
    want = ours.loss(S, labels, soft)
    for dtype in (torch.uint8, torch.int32):
        assert ours.loss(S, labels.to(dtype), soft) == want
    with pytest.raises(TypeError, match=f"{kind.__name__}.loss: labels must be integer classes, got torch.float32"):
        ours.loss(S, F.one_hot(labels, C).float(), soft)  # their mean was over N * C
    with pytest.raises(ValueError, match=rf"{kind.__name__}.loss: labels must be \[{N}\] like y, got \[{N - 1}\]"):
        ours.loss(S, labels[1:], soft)


def test_teachers_that_require_grad_are_refused_or_constant():
    teacher = T.clone().requires_grad_()
    for loss in (dropin.DistillKL(4), lambda s, t: dropin.kd_loss(s, t, 4), lambda s, t: dropin.kd_loss(s, t, 4, True)):
        with pytest.raises(ValueError, match="must be detached"):
            loss(S, teacher)
    relations = dropin.RKdAngle(), dropin.RkdDistance(), dropin.RKDLoss(), partial(dropin.rkd_loss, squared=True)
    for loss in (*relations, dropin.KLDivergence(4)):
        assert torch.autograd.grad(loss(S, teacher), [S, teacher], allow_unused=True)[1] is None


@cpu_only
@pytest.mark.parametrize("name", [n for n in KINDS if not n.startswith(("FitNet", "Adapter", "Mixture", "Learning"))])
def test_compiles_in_one_piece(name):
    ours, _, args = KINDS[name]
    want, want_grads = gradients(ours, args)
    got, grads = gradients(torch.compile(ours, fullgraph=True, backend="aot_eager"), args)
    torch.testing.assert_close([got, *grads], [want, *want_grads])


@cpu_only
@pytest.mark.parametrize("kind", [dropin.Adapter, dropin.MixtureAdapter, dropin.LearningAdapter])
def test_adapter_compiles_in_one_piece(kind):
    of = kind([None] * 4, MAP_S.shape)
    net = dropin.FitNet(3, 7)

    def step(conv_map, soft, y, labels):
        mixed = of(conv_map, soft)
        mixed = mixed if mixed.shape[1] == C else (mixed.unsqueeze(2) * soft).sum(1)
        return of.loss(y, labels, mixed) + net(conv_map, draw_map)

    draw_map = draw(N, 7, 4, 5)
    args = MAP_S, SOFT, S, torch.arange(N) % C
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*args))


SCRIPT = """
import torch
{imports}

torch.manual_seed(0)
student = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
teacher = torch.nn.Linear(6, 5).eval()
optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
criterion_div, criterion_rkd = DistillKL(4), RKDLoss(1, 2)
losses = []
for step in range(8):
    images = torch.randn(16, 6)
    logit_s = student(images)
    with torch.no_grad():
        logit_t = teacher(images)
    loss = criterion_div(logit_s, logit_t) + criterion_rkd(logit_s, logit_t)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""


class DistillKL(torch.nn.Module):
    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, y_s, y_t):
        return over_examples(y_s, y_t, self.T)


class RKDLoss(torch.nn.Module):
    def __init__(self, w_d, w_a):
        super().__init__()
        self.w_d, self.w_a = w_d, w_a

    def forward(self, f_s, f_t):
        return self.w_d * plain_distance(f_s, f_t) + self.w_a * plain_angle(f_s, f_t)


def test_a_training_script_switches_by_its_import_line():
    """The same script with the plain losses and with ours follows the same path."""
    runs = []
    for imports in ("from test_dropin import DistillKL, RKDLoss", "from amtml_fast.dropin import DistillKL, RKDLoss"):
        scope = {}
        exec(SCRIPT.format(imports=imports), scope)
        runs.append(scope["losses"])
    assert runs[0][-1] < runs[0][0]
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
