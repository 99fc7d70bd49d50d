"""The training methods: each objective against its formula in plain PyTorch, and what a configuration can make of them."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_step import CHANNELS, TEACHER_CHANNELS, C, N, Peer, T, kl, make_config, make_step, objective, seen
from small_run import ROOT
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from amtml_fast import TeacherAdapter, reference
from amtml_fast.dropin import FitNet
from amtml_fast.train.compare.plan import checked
from amtml_fast.train.config import reading
from amtml_fast.train.config.presets import paper_code
from amtml_fast.train.config.schema import ConfigError, TrainConfig, VariantConfig
from amtml_fast.train.methods import mmkd, mtkd_rl
from amtml_fast.train.methods.aekd import min_norm_weights
from amtml_fast.train.methods.amtml_kd import mixed_targets
from amtml_fast.train.methods.base import Step, StepLoss
from amtml_fast.train.methods.ca_mkd import confidence_weights
from amtml_fast.train.methods.eb_kd import entropy_weights
from amtml_fast.train.methods.registry import METHODS, chosen, known


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_the_student_and_its_own_parts(name: str) -> None:
    made, step = objective(name), seen(METHODS[name])
    out = made(step)
    out.loss.backward()
    assert out.loss.ndim == 0 and out.loss.isfinite()
    assert step.logits.grad is not None and step.logits.grad.abs().sum() > 0
    for key, parameter in made.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    assert all(not value.requires_grad and value.ndim == 0 for value in out.terms.values())
    if out.weights is not None:
        assert out.weights.shape == (N, T) and not out.weights.requires_grad
        torch.testing.assert_close(out.weights.sum(1), torch.ones(N))


@pytest.mark.parametrize("name", METHODS)
def test_every_objective_and_all_its_parts_return_tensors_or_tuples(name: str) -> None:
    """FSDP2 looks for the tensors of an output in tuples, lists and dicts. What it does not find trains nothing, and no
    error says so: an object of a class of one's own; on torch 2.11 a dataclass, too."""
    made, seen_types = objective(name), set()
    for part in made.modules():
        part.register_forward_hook(lambda module, args, output: seen_types.add(type(output)))
    out = made(seen(METHODS[name]))
    assert StepLoss in seen_types and all(issubclass(kind, Tensor | tuple) for kind in seen_types), seen_types
    assert any(leaf is out.loss for leaf in tree_leaves(out))


def test_only_the_keys_that_a_method_reads_make_its_runs_another_configuration() -> None:
    assert set(METHODS["avg_mkd"].loss(make_config())) == {
        "temperature",
        "alpha",
        "alpha_end",
        "mode",
        "label_smoothing",
    }
    assert set(METHODS["student"].loss(make_config())) == {"label_smoothing"}
    of_one = {"at": {"at_weight"}, "aekd": {"aekd_gradients", "aekd_bound"}}
    for name, keys in of_one.items():
        assert keys <= set(METHODS[name].loss(make_config()))
        assert all(keys.isdisjoint(other.loss(make_config())) for key, other in METHODS.items() if key != name)


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_avg_mkd_and_okd_are_hintons_loss() -> None:
    step, tau, alpha = make_step(), 3.0, 0.6
    ce = F.cross_entropy(step.logits, step.labels)
    p = torch.stack([(z / tau).softmax(-1) for z in step.teacher_logits])
    want = (1 - alpha) * ce + alpha * kl(p.mean(0), step.logits, tau).mean()
    torch.testing.assert_close(objective("avg_mkd", temperature=tau, alpha=alpha)(step).loss, want)
    each = torch.stack([kl(part, step.logits, tau).mean() for part in p]).mean()
    want = (1 - alpha) * ce + alpha * each
    torch.testing.assert_close(objective("avg_mkd_sum", temperature=tau, alpha=alpha)(step).loss, want)
    alone = step._replace(teacher_logits=step.teacher_logits[1:2])
    want = (1 - alpha) * ce + alpha * kl(p[1], step.logits, tau).mean()
    torch.testing.assert_close(objective("okd-t1", temperature=tau, alpha=alpha)(alone).loss, want)


def test_eb_kd_weighs_by_certainty() -> None:
    logits = [torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])]
    entropies = [-(z.softmax(-1) * z.log_softmax(-1)).sum().item() for z in logits]
    want = torch.tensor([[(1 - h / sum(entropies)) / 2 for h in entropies]])
    torch.testing.assert_close(entropy_weights(logits), want)
    assert want[0, 0] > want[0, 1] > want[0, 2]
    certain = [torch.tensor([[500.0, 0.0]]), torch.tensor([[0.0, 500.0]])]
    torch.testing.assert_close(entropy_weights(certain), torch.full((1, 2), 0.5))
    torch.testing.assert_close(entropy_weights(logits[:1]), torch.ones(1, 1))


def test_ca_mkd_weighs_by_the_label_and_its_hints_alike() -> None:
    step = make_step()
    ce = torch.stack([F.cross_entropy(z, step.labels, reduction="none") for z in step.teacher_logits], 1)
    weights = (1 - ce.softmax(1)) / (T - 1)
    torch.testing.assert_close(confidence_weights(step.teacher_logits, step.labels), weights)
    torch.testing.assert_close(confidence_weights(step.teacher_logits[:1], step.labels), torch.ones(N, 1))

    made = objective("ca_mkd", hint_weight=0.5)
    rows = [kl((z / 4).softmax(-1), step.logits, 4.0) for z in step.teacher_logits]
    want = 0.3 * F.cross_entropy(step.logits, step.labels) + 0.7 * (weights * torch.stack(rows, 1)).sum(1).mean()
    for t, teacher in enumerate(step.teacher_maps):
        u = F.adaptive_avg_pool2d(teacher, 2)  # to the smaller side, the student's
        difference = u - F.conv2d(step.features, made.transforms[str(t)][:, :, None, None])
        want = want + 0.5 * (weights[:, t] * difference.square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(made(step).loss, want)


@pytest.mark.parametrize("bound", [1.0, 0.6, 0.4])
def test_aekd_takes_the_min_norm_point(bound: float) -> None:
    g = torch.Generator().manual_seed(0)
    shares = torch.distributions.Dirichlet(torch.full((T,), 0.7))
    torch.manual_seed(0)
    bounded = 0
    for _ in range(20):
        vectors = torch.randn(T, 4, generator=g) + torch.randn(1, 4, generator=g)
        gram = vectors @ vectors.T
        w = min_norm_weights(gram, bound)
        assert (w >= 0).all() and w.max() <= bound + 1e-6 and abs(w.sum().item() - 1) < 1e-6
        others = shares.sample((4000,))
        others = others[(others <= bound).all(1)]
        value = (w @ vectors).square().sum()
        assert value <= (others @ vectors).square().sum(1).min() + 1e-6
        # The condition of the minimum: no weight can be moved from one vector to another to make it less.
        slope = vectors @ (w @ vectors)
        assert slope[w < bound - 1e-6].min() >= slope[w > 0].max() - 1e-5
        bounded += int((w > bound - 1e-6).any())
    assert bounded > 0


def test_gated_kd_asks_who_said_so() -> None:
    step, tau, alpha = make_step(), 3.0, 0.6
    made = objective("gated_kd", temperature=tau, alpha=alpha)
    made.fit(step.teacher_logits, step.labels)
    gate = made.gate(step.teacher_logits)
    assert gate.max() - gate.min() > 0.1  # it has learned something
    p = torch.stack([z.softmax(-1) for z in step.teacher_logits], 1)
    right = gate * p[torch.arange(N), :, step.labels]
    weights = right / right.sum(1, keepdim=True)
    mixed = (weights[..., None] * torch.stack([(z / tau).softmax(-1) for z in step.teacher_logits], 1)).sum(1)
    want = (1 - alpha) * F.cross_entropy(step.logits, step.labels) + alpha * kl(mixed, step.logits, tau).mean()
    out = made(step)
    torch.testing.assert_close(out.weights, weights)
    torch.testing.assert_close(out.loss, want)


@pytest.mark.parametrize(("name", "end"), [("gated_kd", None), ("avg_mkd", 0.2), ("ca_mkd", 0.0)])
def test_alpha_falls_from_the_teachers_to_the_labels(name: str, end: float | None) -> None:
    step, options = make_step(), {} if name == "gated_kd" else {"alpha_end": end}
    made = objective(name, alpha=0.6, hint_weight=0.0, **options)
    losses = {p: made(step._replace(progress=torch.tensor(p))).loss for p in (0.0, 0.5, 1.0)}
    at_first, at_last = (
        objective(name, alpha=alpha, alpha_end=alpha, hint_weight=0.0)(step).loss for alpha in (0.6, end or 0.0)
    )
    torch.testing.assert_close(losses[0.0], at_first)
    torch.testing.assert_close(losses[1.0], at_last)
    torch.testing.assert_close(losses[0.5], (at_first + at_last) / 2)
    if not end:
        torch.testing.assert_close(at_last, F.cross_entropy(step.logits, step.labels))
    hidden = step._replace(labels=torch.full_like(step.labels, -100), truth=step.labels, hidden=True)
    always = [made(hidden._replace(progress=torch.tensor(p))).loss for p in (0.0, 1.0)]
    torch.testing.assert_close(*always)  # there is nothing else to learn from


def test_the_oracle_takes_the_teacher_that_knows() -> None:
    step = make_step()
    out = objective("oracle")(step)
    right = torch.stack([z.softmax(-1)[torch.arange(N), step.labels] for z in step.teacher_logits], 1)
    assert torch.equal(out.weights, F.one_hot(right.argmax(1), T).float())


WITHOUT_TEACHERS = [name for name, method in METHODS.items() if not method.needs_teachers]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in (*WITHOUT_TEACHERS, "oracle")])
def test_an_example_whose_label_is_hidden_learns_from_the_teachers_alone(name: str) -> None:
    method = METHODS[name]
    step = seen(method)
    known = torch.arange(N) % 3 == 0
    hidden = step._replace(labels=step.labels.where(known, -100), truth=step.labels, hidden=True)

    def gradient(step: Step) -> Tensor:
        made = objective(name, hidden_labels=True)
        made.fit(step.teacher_logits, step.labels)
        loss = made(step).loss
        assert loss.isfinite()
        return torch.autograd.grad(loss, step.logits)[0]

    mine = gradient(hidden)
    other = hidden._replace(truth=(step.labels + 1) % C)
    assert torch.equal(gradient(other), mine)  # what is behind does not count
    # Labels that are known do.
    assert not torch.allclose(gradient(hidden._replace(labels=hidden.labels.where(~known, 0))), mine)
    if method.teachers == "all":
        assert (mine[~known].abs().sum(1) > 0).all()
    else:  # hints alone
        assert (mine[~known] == 0).all()


class WidePeer(Peer):
    """Its parameters and logits are in float64."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.double())


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].teachers == "all"])
def test_a_student_may_have_logits_in_float64(name: str) -> None:
    step = seen(METHODS[name])
    wide = step._replace(logits=step.logits.detach().double().requires_grad_(), student=WidePeer().double())
    made = objective(name)
    made.fit(step.teacher_logits, step.labels)
    for one in (made.train(), made):  # mmkd keeps images in the first step
        loss = one(wide).loss
        assert loss.isfinite() and torch.autograd.grad(loss, wide.logits)[0].dtype == torch.float64


def test_what_an_example_without_a_label_adds() -> None:
    """Its KL at full weight, and no cross-entropy with any class."""
    step, tau, alpha = make_step(), 3.0, 0.6
    known = torch.arange(N) % 3 == 0
    hidden = step._replace(labels=step.labels.where(known, -100), truth=step.labels, hidden=True)
    mixed = torch.stack([(z / tau).softmax(-1) for z in step.teacher_logits]).mean(0)
    ce, far = F.cross_entropy(step.logits, step.labels, reduction="none"), kl(mixed, step.logits, tau)
    want = torch.where(known, (1 - alpha) * ce + alpha * far, far).mean()
    made = objective("avg_mkd", hidden_labels=True, temperature=tau, alpha=alpha)
    torch.testing.assert_close(made(hidden).loss, want)
    ours = objective(
        "amtml_no_adapter", hidden_labels=True, temperature=tau, alpha=alpha, angle_weight=0.0, hint_weight=0.0
    )
    want = torch.where(known, (1 - alpha) * ce, 0).mean() + alpha * far.mean()
    torch.testing.assert_close(ours(hidden).loss, want)


def test_with_hidden_labels_the_loss_is_the_same_where_none_is_hidden() -> None:
    for name in ("avg_mkd", "gated_kd", "ca_mkd", "eb_kd", "aekd", "amtml_kd", "amtml_label_weights", "fitnet"):
        step = seen(METHODS[name])
        plain, could = (objective(name, hidden_labels=hidden) for hidden in (False, True))
        want, got = plain(step), could(step._replace(hidden=True, truth=step.labels))
        torch.testing.assert_close(got.loss, want.loss, msg=name)
        assert set(got.terms) == set(want.terms)
        for term, value in want.terms.items():
            torch.testing.assert_close(got.terms[term], value, msg=f"{name}: {term}")


def test_aekd_with_equal_or_single_teachers() -> None:
    for bound in (1.0, 0.6, 0.2):  # below 1 / T it is 1 / T
        weights = min_norm_weights(torch.ones(3, 3), bound)
        torch.testing.assert_close(weights, torch.full((3,), 1 / 3), rtol=0, atol=1e-5)
        torch.testing.assert_close(min_norm_weights(torch.zeros(2, 2), bound), torch.full((2,), 0.5))
        torch.testing.assert_close(min_norm_weights(torch.tensor([[4.0]]), bound), torch.ones(1))
    # One gradient far shorter than the others and in their direction: it alone is the min-norm point.
    gram = torch.tensor([[1.0, 5.0], [5.0, 30.0]])
    torch.testing.assert_close(min_norm_weights(gram), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(min_norm_weights(gram, 0.6), torch.tensor([0.6, 0.4]))


def log_p(z: Tensor) -> Tensor:
    return z.log_softmax(-1).clamp_min(-10)


def of_two(right: int) -> Step:
    """Teacher `right` says every label and the other one a wrong class; the student has learned the labels."""
    step = make_step(teachers=2)
    said = [5 * F.one_hot(step.labels if t == right else (step.labels + 1) % C, C).float() for t in range(2)]
    return step._replace(logits=(3 * F.one_hot(step.labels, C).float()).requires_grad_(), teacher_logits=said)


def train(made: torch.nn.Module, step: Step, lr: float = 0.1) -> Tensor:
    """The teachers' mean weights [T] after 30 steps of the objective's own parameters."""
    optimizer = torch.optim.SGD(made.parameters(), lr=lr)
    for _ in range(30):
        optimizer.zero_grad()
        made(step).loss.backward()
        optimizer.step()
    return made(step).weights.mean(0)


@pytest.mark.parametrize("hidden", [False, True])
def test_mtkd_rl_weighs_by_the_agent_the_label_and_the_gap(hidden: bool) -> None:
    step, tau, alpha = make_step(), 3.0, 0.6
    made = objective("mtkd_rl", hidden_labels=hidden, temperature=tau, alpha=alpha)
    with torch.no_grad():
        made.shares.copy_(torch.tensor([0.5, -0.2, 0.3]))
    known = torch.arange(N) % 3 == 0 if hidden else torch.ones(N, dtype=torch.bool)
    step = step._replace(labels=step.labels.where(known, -100), truth=step.labels, hidden=hidden)
    gaps = torch.stack([kl((z / tau).softmax(-1), step.logits, tau) for z in step.teacher_logits], 1)
    state = [*map(log_p, step.teacher_logits), gaps.detach()]
    ce = torch.stack([F.cross_entropy(z, step.truth, reduction="none") for z in step.teacher_logits], 1)
    if not hidden:  # the agent sees what it will always have
        state.append(ce.clamp_max(10))
    first, last = made.agent[0], made.agent[2]
    own = ((torch.cat(state, 1) @ first.weight.T).relu() @ last.weight.T + last.bias).softmax(1)
    confident = ((1 - ce.softmax(1)) / (T - 1)).where(known[:, None], 1 / T)
    c = made.shares.softmax(0)
    weights = c[0] * own + c[1] * confident + c[2] * gaps.detach().softmax(1)
    out = made(step)
    torch.testing.assert_close(out.weights, weights.detach())
    kd = (weights.detach() * gaps).sum(1)
    rows = torch.where(known, (1 - alpha) * F.cross_entropy(step.logits, step.truth, reduction="none") + alpha * kd, kd)
    torch.testing.assert_close(out.terms["kd"], rows.mean())
    mean, span = gaps.mean(1, keepdim=True), gaps.amax(1, keepdim=True) - gaps.amin(1, keepdim=True)
    reward = (weights * (mean - gaps) / span).detach()[known].sum(1).mean()
    torch.testing.assert_close(out.terms["reward"], reward)
    torch.testing.assert_close(out.loss, rows.mean() - 0.1 * reward)


def test_the_reward_of_mtkd_rl_is_what_the_student_loses() -> None:
    """Its gradient is that of -(CE + sum_t w_t KL_t), where it is in units of the range of -KL_t."""
    step, made = make_step(), objective("mtkd_rl", temperature=3.0)
    gaps = torch.stack([kl((z / 3).softmax(-1), step.logits.detach(), 3.0) for z in step.teacher_logits], 1)
    weights = made.weights(step, gaps)
    ce, span = F.cross_entropy(step.logits.detach(), step.labels, reduction="none"), gaps.amax(1) - gaps.amin(1)
    reward = (-(ce + (weights * gaps).sum(1)) / span).mean()
    want = torch.autograd.grad(-0.1 * reward, list(made.parameters()))
    for mine, theirs in zip(torch.autograd.grad(made(step).loss, list(made.parameters())), want):
        torch.testing.assert_close(mine, theirs)
    (student,) = torch.autograd.grad(made(step).loss, step.logits)  # gets none of it
    torch.testing.assert_close(student, torch.autograd.grad(made.kd(step, made(step).weights), step.logits)[0])
    equal = torch.rand(100, 1, generator=torch.Generator().manual_seed(0)).expand(-1, T)
    assert (mtkd_rl.relative(equal) == 0).all()  # and not what rounding makes of nothing


@pytest.mark.parametrize("name", ["mtkd_rl", "mmkd"])
@pytest.mark.parametrize("right", [0, 1])
def test_learned_weights_find_the_teacher_that_is_right(name: str, right: int) -> None:
    step = of_two(right)
    made = objective(name, teachers=2)
    before = made(step).weights.mean(0)
    after = train(made, step, lr=0.1 / (mtkd_rl if name == "mtkd_rl" else mmkd).SLOWER)
    assert after[right] > before[right] + 0.05 and after[right] > 0.6, (before, after)


def test_the_update_of_mtkd_rls_code_makes_weights_equal() -> None:
    """One reward for all teachers of an example, whoever of them is right."""
    step, tau = make_step(), 3.0
    known = torch.arange(N) % 3 > 0
    step = step._replace(labels=step.labels.where(known, -100), truth=step.labels, hidden=True)
    made = objective("mtkd_rl_code", hidden_labels=True, temperature=tau)
    gaps = torch.stack([kl((z / tau).softmax(-1), step.logits.detach(), tau) for z in step.teacher_logits], 1)
    weights, ce = made.weights(step, gaps), F.cross_entropy(step.logits.detach(), step.truth, reduction="none")
    lost = (ce + (weights.detach() * gaps).sum(1))[known]
    rewards = ((lost.mean() - lost) / lost.std(correction=0)).clamp(0, 1)
    # as the cross-entropy between each weight and 1
    ones = torch.ones(int(known.sum()), T)
    want = F.binary_cross_entropy(weights[known], ones, weight=rewards[:, None].expand(-1, T))
    out = made(step)
    torch.testing.assert_close(out.terms["reward"], -want.detach())
    torch.testing.assert_close(out.loss, out.terms["kd"] + 0.1 * want)
    torch.testing.assert_close(out.weights, weights.detach())
    train(made, step, lr=1.0)
    assert made(step).weights.std(1).mean() < 0.95 * out.weights.std(1).mean()


@pytest.mark.parametrize("name", ["mtkd_rl", "mtkd_rl_code", "mmkd"])
def test_what_learns_the_weights_learns_from_labels_alone(name: str) -> None:
    step = of_two(0)
    known = torch.arange(N) < 4
    own = [step.labels.where(known, -100), torch.full((N,), -100)]
    some, none = (step._replace(labels=labels, truth=step.labels, hidden=True) for labels in own)
    others = [z.where(known[:, None], z.flip(1)) for z in step.teacher_logits]  # of images without a label

    def gradients(step: Step) -> list[Tensor]:
        made = objective(name, teachers=2, hidden_labels=True)
        return list(torch.autograd.grad(made(step).loss, list(made.parameters())))

    wanted = gradients(some)
    assert any(x.abs().max() > 1e-6 for x in wanted)
    assert all(torch.equal(x, y) for x, y in zip(wanted, gradients(some._replace(teacher_logits=others))))
    assert all((x == 0).all() for x in gradients(none))
    assert objective(name, teachers=2, hidden_labels=True)(none).weights.isfinite().all()


def test_mmkd_weighs_by_what_all_say() -> None:
    step, tau, alpha = make_step(), 3.0, 0.6
    made = objective("mmkd", temperature=tau, alpha=alpha)
    first, last = made.network[0], made.network[2]
    seen_by_it = torch.cat([log_p(z) for z in (*step.teacher_logits, step.logits)], 1)
    weights = ((seen_by_it @ first.weight.T + first.bias).relu() @ last.weight.T + last.bias).softmax(1).detach()
    gaps = torch.stack([kl((z / tau).softmax(-1), step.logits, tau) for z in step.teacher_logits], 1)
    want = (1 - alpha) * F.cross_entropy(step.logits, step.labels) + alpha * (weights * gaps).sum(1).mean()
    out = made(step)
    torch.testing.assert_close(out.weights, weights)
    torch.testing.assert_close(out.terms["kd"], want)
    with pytest.raises(ValueError, match=r"step\.student must be the network that made the logits, got none"):
        made(step._replace(student=None))


def test_mmkd_values_a_weight_by_a_copy_of_the_student() -> None:
    """The derivative by differences, of a copy that torch's own optimizer trains."""
    step, tau = make_step(), 3.0
    student, images = step.student.double(), step.images.double()
    student.linear.weight.data *= 3
    said = [z.double() for z in step.teacher_logits]
    start, logits = mmkd.copy_of(student, images)
    weights = torch.rand(N, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(1)

    def loss(weights: Tensor) -> float:
        copied = copy.deepcopy(student)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.05)
        for part in ("kl", "kl", "ce"):
            gaps = torch.stack([kl((z / tau).softmax(-1), copied(images), tau) for z in said], 1)
            value = (weights * gaps).sum(1).mean() if part == "kl" else F.cross_entropy(copied(images), step.labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return F.cross_entropy(copied(images), step.labels).item()

    falls = torch.zeros(N, T, dtype=torch.float64)
    for i in range(N):
        for t in range(T):
            nudge = torch.zeros_like(weights)
            nudge[i, t] = 1e-4
            falls[i, t] = (loss(weights - nudge) - loss(weights + nudge)) / 2e-4
    falls -= falls.mean(1, keepdim=True)
    value = mmkd.worth(start, logits, step.labels, said, weights.float(), tau)
    torch.testing.assert_close(value.double(), falls / falls.square().mean().sqrt(), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(p, start[name]) for name, p in student.named_parameters())  # the student stays as it is


def test_mmkd_keeps_the_first_images_with_a_label_and_then_the_hard_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmkd, "KEPT", 6)
    made, step = objective("mmkd", hidden_labels=True), make_step()
    known = torch.arange(N) % 3 == 0  # four of them
    assert made(step._replace(labels=torch.full_like(step.labels, -100), hidden=True)).terms["meta"] == 0
    step = step._replace(labels=step.labels.where(known, -100), hidden=True)
    made(step)
    assert made.count == 4
    for mine, rows in ((made.images, step.images), (made.labels, step.labels)):
        assert torch.equal(mine[:4], rows[known])
    assert torch.equal(made.said[:4], torch.stack(step.teacher_logits, 1)[known])
    more = make_step(seed=1)
    more = more._replace(labels=more.labels.where(known, -100), hidden=True)
    made(more)
    assert made.count == 6 and torch.equal(made.images[4:6], more.images[known][:2])  # there is no room for all
    before = made.images.clone()
    right = more._replace(logits=5 * F.one_hot(more.labels.clamp_min(0), C).float())
    made(right)
    assert torch.equal(made.images, before)  # what the student knows is not kept any more
    hard = make_step(seed=2)
    labels = (hard.logits.argmax(1) + 1) % C
    made(hard._replace(labels=labels.where(known, -100), hidden=True))
    new = (made.images[:6, None] == hard.images[known]).flatten(2).all(-1)
    assert new.sum() == 4 and (new.sum(1) <= 1).all()  # all four, in places that were drawn
    assert (made.images[6] == 0).all()


def test_dml_learns_with_its_peers() -> None:
    step, made = make_step(), objective("dml", teachers=2)
    every = [step.logits, *(peer(step.images) for peer in made.peers)]
    want = torch.zeros(())
    for k, z in enumerate(every):
        want = want + F.cross_entropy(z, step.labels)
        others = [other.detach().softmax(-1) for j, other in enumerate(every) if j != k]
        want = want + torch.stack([kl(p, z, 1.0).mean() for p in others]).mean()
    out = made(step)
    torch.testing.assert_close(out.loss, want)
    theirs = torch.autograd.grad(want, step.logits)[0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, step.logits)[0], theirs)


def test_fitnet_at_and_rkd() -> None:
    step = seen(METHODS["fitnet"])
    ce, v, u = (
        F.cross_entropy(step.logits, step.labels),
        step.features,
        F.adaptive_avg_pool2d(step.teacher_maps[0], 2),
    )
    made = objective("fitnet", fitnet_weight=3.0)
    (weight,) = made.parameters()
    want = ce + 3 * (u - F.conv2d(v, weight[:, :, None, None])).square().mean()
    torch.testing.assert_close(made(step).loss, want)

    def attention(x: Tensor) -> Tensor:
        a = F.adaptive_avg_pool2d(x.square().mean(1, keepdim=True), 2).flatten(1)
        return a / a.norm(dim=1, keepdim=True)

    want = ce + 7 * (attention(v) - attention(step.teacher_maps[0])).square().mean()
    torch.testing.assert_close(objective("at", at_weight=7.0)(step).loss, want)

    student, teacher = v.mean((2, 3)), step.teacher_maps[0].mean((2, 3))
    want = ce + 25 * reference.rkd_distance_loss(student, teacher) + 50 * reference.angle_loss(student, teacher)
    torch.testing.assert_close(objective("rkd")(step).loss, want)


# --- AMTML-KD and its options -----------------------------------------------------------------------------------------


def test_ablations_take_away_what_they_say() -> None:
    step = make_step()
    whole = objective("amtml_kd")(step)
    assert "weights" not in whole.terms and whole.weights.std(0).max() > 0
    no_angle = objective("amtml_no_angle")(step)
    torch.testing.assert_close(whole.loss - whole.terms["angle"], no_angle.loss)
    no_hint = objective("amtml_no_hint")(step)
    torch.testing.assert_close(whole.loss - whole.terms["hint"], no_hint.loss)
    uniform = objective("amtml_no_adapter", angle_weight=0.0, hint_weight=0.0)
    assert uniform(step).weights is None and not list(uniform.parameters())
    torch.testing.assert_close(uniform(step).loss, objective("avg_mkd")(step).loss)
    mappings = {name: objective(name).amtml.hints.mapping for name in ("amtml_kd", "amtml_best_low")}
    assert mappings == {"amtml_kd": {0: "low", 1: "high", 2: "mid"}, "amtml_best_low": {0: "high", 1: "low", 2: "mid"}}


def test_the_angle_trains_the_weights_only_where_asked() -> None:
    step = make_step()

    def gradient(name: str) -> Tensor:
        made = objective(name, hint_weight=0.0, regularizer_weight=0.0, angle_weight=100.0)
        return torch.autograd.grad(made(step).loss, made.adapter.v)[0]

    plain = objective("amtml_no_angle", hint_weight=0.0, regularizer_weight=0.0)
    alone = torch.autograd.grad(plain(step).loss, plain.adapter.v)[0]
    torch.testing.assert_close(gradient("amtml_kd"), alone)
    assert (gradient("amtml_angle_trains_weights") - alone).abs().max() > 1e-4


def test_the_angle_on_logits_trains_the_weights_too_where_asked() -> None:
    step, options = make_step(), {"angle_on": "logits", "angle_weight": 100.0, "hint_weight": 0.0}
    plain, asked = objective("amtml_kd", **options), objective("amtml_angle_trains_weights", **options)
    torch.testing.assert_close(plain(step).loss, asked(step).loss)
    first, second = (torch.autograd.grad(made(step).loss, made.adapter.v)[0] for made in (plain, asked))
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_a_student_that_diverged_shows_in_the_loss(name: str) -> None:
    """And raises nothing: the trainer stops that run, and the others go on."""
    made, step = objective(name), seen(METHODS[name])
    out = made(step._replace(logits=step.logits * float("nan")))
    assert not out.loss.isfinite()


def test_labels_train_the_weights_toward_the_teacher_that_is_right() -> None:
    step, made = make_step(), objective("amtml_label_weights", temperature=2.0)
    plain = objective("amtml_kd", temperature=2.0)
    weights = made(step).weights
    p = mixed_targets(step.teacher_logits, weights, 2.0)[torch.arange(N), step.labels]
    torch.testing.assert_close(made(step).loss, plain(step).loss - p.log().mean())
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        made.label_loss(step).backward()
        optimizer.step()
    after = mixed_targets(step.teacher_logits, made(step).weights, 2.0)[torch.arange(N), step.labels]
    assert after.mean() > p.mean() + 0.02


def test_without_the_kl_only_the_labels_train_the_weights() -> None:
    step, options = make_step(), {"hint_weight": 0.0, "regularizer_weight": 0.0}
    made = objective("amtml_kd", kl_trains_weights=False, adapter_label_weight=2.0, **options)
    plain = objective("amtml_kd", adapter_label_weight=2.0, **options)
    torch.testing.assert_close(made(step).loss, plain(step).loss)
    (gradient,) = torch.autograd.grad(made(step).loss, made.adapter.v)
    (surprise,) = torch.autograd.grad(2 * made.label_loss(step), made.adapter.v)
    torch.testing.assert_close(gradient, surprise)
    (both,) = torch.autograd.grad(plain(step).loss, plain.adapter.v)
    assert (both - gradient).abs().max() > 1e-3
    options["regularizer_weight"] = 0.5
    regular = objective("amtml_kd", kl_trains_weights=False, adapter_label_weight=2.0, **options)
    (more,) = torch.autograd.grad(regular(step).loss, regular.adapter.v)
    torch.testing.assert_close(more, gradient + regular.adapter.v)


def test_the_adapters_own_seed_fixes_it_and_nothing_else() -> None:
    first, second = (objective("amtml_kd", seed=seed, adapter_seed=1) for seed in (3, 4))
    assert torch.equal(first.adapter.theta, second.adapter.theta)
    assert not torch.equal(first.amtml.hints.transforms["0"], second.amtml.hints.transforms["0"])
    other = objective("amtml_kd", seed=3)
    assert not torch.equal(first.adapter.theta, other.adapter.theta)
    # Without a seed of its own the adapter takes its draws from the common stream, and the hints those after them.
    assert not torch.equal(first.amtml.hints.transforms["0"], other.amtml.hints.transforms["0"])


def test_paper_code_is_the_authors_loss() -> None:
    """Every term written out as their notebooks have it; `docs/method.md` lists them."""
    step, made = make_step(), objective("amtml_paper_code")
    loss = reading.changed(make_config(), METHODS["amtml_paper_code"].settings(make_config()), "a test").loss
    assert (loss.temperature, loss.alpha, loss.mapping) == (5.0, 0.7, {"t0": "low", "t1": "mid"})
    tau, adapter = 5.0, made.adapter
    b = step.features.mean((2, 3))
    w = ((b[:, None] * adapter.theta) @ adapter.v).softmax(1)
    p = (w[..., None] * torch.stack([(z / tau).softmax(-1) for z in step.teacher_logits], 1)).sum(1)
    q = (step.logits / tau).log_softmax(-1)
    want = (p * (p.log() - q)).sum() / (N * C) * 2 * 0.7 * tau**2 + 0.3 * F.cross_entropy(step.logits, step.labels)
    want = want + 0.1 * (adapter.v.square().sum() + adapter.theta.square().sum())
    target = p.detach()
    want = want + reference.angle_loss(step.logits, target) + reference.rkd_distance_loss(step.logits, target)
    for t, group in ((0, "low"), (1, "mid")):
        theirs = FitNet(CHANNELS[group], TEACHER_CHANNELS[t])
        transform = made.amtml.hints.transforms[str(t)]
        assert not transform.requires_grad and 0.004 < transform.abs().max() <= 0.005
        theirs.transform.weight.data = transform[:, :, None, None]
        want = want + theirs(step.maps[group], step.teacher_maps[t].mean((2, 3), keepdim=True))
    out = made(step)
    torch.testing.assert_close(out.loss, want)
    assert {"angle", "distance", "hint", "regularizer"} <= set(out.terms)


def test_an_adapter_is_in_the_state_dict_once() -> None:
    """Checkpoints and objective.safetensors keep their names."""
    for adapter, inside in (
        ({}, "amtml.adapter."),
        ({"kl_trains_weights": False, "adapter_label_weight": 1.0}, "amtml.adapter.adapter."),
    ):
        made = objective("amtml_kd", **adapter)
        assert isinstance(made.adapter, TeacherAdapter)
        assert [key for key in made.state_dict() if "adapter" in key] == [f"{inside}theta", f"{inside}v"]


NEW_KEY = """
import dataclasses
from amtml_fast.train.config import schema

new = [("another_weight", float, 1.0)]
schema.LossConfig = dataclasses.make_dataclass("LossConfig", new, bases=(schema.LossConfig,))
from amtml_fast.train.methods.registry import METHODS

config = schema.Config(loss=schema.LossConfig())
assert config.loss.another_weight == 1.0
print([name for name, method in METHODS.items() if "another_weight" in method.loss(config)])
"""


def test_a_new_key_is_in_no_recipe_before_its_method_declares_it() -> None:
    done = subprocess.run([sys.executable, "-c", NEW_KEY], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_the_method_that_contributing_shows_works() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    module = types.ModuleType("amtml_fast.train.methods.shown")
    module.__package__ = "amtml_fast.train.methods"
    exec(text.split("```python\n")[1].split("```")[0], module.__dict__)
    step = make_step()
    out = objective(module.METHOD)(step)
    right = torch.stack([z.argmax(1) == step.labels for z in step.teacher_logits], 1)
    assert out.weights is not None and (out.weights[right.any(1)] > 0).eq(right[right.any(1)]).all()
    assert right.any(1).any() and not right.any(1).all()


# --- names ------------------------------------------------------------------------------------------------------------


def test_okd_stands_for_every_teacher() -> None:
    names = [method.name for method in chosen(make_config(), ["student", "okd", "okd-t1"])]
    assert names == ["student", "okd-t0", "okd-t1", "okd-t2"]
    assert [method.teacher for method in chosen(make_config(), ["okd"])] == ["t0", "t1", "t2"]


def test_a_variant_is_another_method_with_other_values() -> None:
    mine = VariantConfig("amtml_no_angle", "Mine", {"hint_weight": 0.25}, {"adapter_epochs": 2})
    whole = replace(make_config(), variants={"mine": mine})
    method = known(whole)["mine"]
    made = reading.changed(whole, method.settings(whole), "a test")
    assert (method.label, made.loss.angle_weight, made.loss.hint_weight) == ("Mine", 0.0, 0.25)
    assert made.stages.adapter_epochs == 2 and whole.loss.hint_weight == 1.0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("compare: {methods: [amtml]}", r"one of okd, student.*, got 'amtml'; did you mean 'amtml_"),
        (
            "variants: {mine: {method: avg}}\ncompare: {methods: [mine]}",
            r"variants.mine.method must be .*got 'avg'; did you",
        ),
        (
            "variants: {mine: {loss: {hint_weigth: 1}}}\ncompare: {methods: [mine]}",
            r"loss.hint_weigth: no such key; did you mean 'loss.hint_weight'\? \(in the method mine\)",
        ),
        (
            "variants: {mine: {loss: {mode: max}}}\ncompare: {methods: [mine]}",
            r"loss.mode must be one of mixture, sum, got 'max'",
        ),
        ("variants: {student: {method: avg_mkd}}", r"variants must have names of their own, got 'student', which is a"),
        ("variants: {okd-x: {method: avg_mkd}}", r"variants must have names of their own, got 'okd-x'"),
        (
            "variants: {mine: {method: avg_mkd, loss: {hint_weight: 0.1}}}\ncompare: {methods: [mine]}",
            r"variants.mine must set keys that avg_mkd reads, got loss.hint_weight",
        ),
        (
            "variants: {mine: {method: eb_kd, stages: {adapter_epochs: 1}}}\ncompare: {methods: [mine]}",
            r"variants.mine must set keys that eb_kd reads, got stages",
        ),
        ("loss: {kl_scale: 0}", r"loss.kl_scale must be in \[1e-18, 1e\+18\], got 0.0"),
        ("loss: {delta: 0}", r"loss.delta must be in \[1e-18, 1e\+18\], got 0.0"),
        ("loss: {aekd_gradients: row}", r"loss.aekd_gradients must be one of mean, rows, got 'row'"),
        ("loss: {aekd_bound: 0}", r"loss.aekd_bound must be in \(0, 1\], got 0.0"),
        ("loss: {distance_weight: -1}", r"loss.distance_weight must be in \[0, 1e\+18\], got -1.0"),
        ("loss: {kl_trains_weights: false}", r"loss.adapter_label_weight must be above 0 with kl_trains_weights"),
        (
            "loss: {kl_trains_weights: false, adapter_label_weight: 1, angle_trains_weights: true}",
            r"loss.angle_trains_weights must be false with kl_trains_weights=false",
        ),
        ("compare: {teachers: [2]}", r"compare.teachers must be in 1 to 0 \(the teachers\), got 2"),
        ("compare: {students: [{name: student}]}", r"compare.students.name must be unique names"),
        ("compare: {workers: 0}", r"compare.workers must be 1 or more, got 0"),
        ("base: nowhere", r"'nowhere' is neither a YAML file"),
        ("base: bad.yaml", r"base must not lead back to itself, got .*bad.yaml -> .*bad.yaml"),
    ],
)
def test_what_a_comparison_cannot_mean(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(lines + "\n")
    with pytest.raises(ConfigError, match=message):
        checked(reading.load(path))


def test_a_methods_own_mapping_replaces_the_configurations() -> None:
    whole = make_config(mapping={"t2": "high"})
    settings = METHODS["amtml_paper_code"].settings(whole)
    assert reading.changed(whole, settings, "a test").loss.mapping == {"t0": "low", "t1": "mid"}
    assert reading.changed(whole, METHODS["amtml_no_angle"].settings(whole), "a test").loss.mapping == {"t2": "high"}


def test_a_file_goes_on_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("name: first\ndistill: {epochs: 3, lr: 0.5}\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\nname: second\ndistill: {epochs: 4}\n")
    made = reading.load(tmp_path / "second.yaml")
    assert (made.name, made.distill.epochs, made.distill.lr) == ("second", 4, 0.5)


def test_paper_code_scales_its_stages() -> None:
    made = reading.changed(make_config(), paper_code(replace(make_config(), distill=TrainConfig(epochs=28))), "a test")
    assert (made.stages.adapter_epochs, made.stages.adapter_milestones) == (8, [4, 5])
    assert made.distill.milestones == [18, 23] and math.isclose(made.distill.weight_decay, 5e-4)
