"""TeacherGate: fitted weights against what they are the maximum of, and what it makes of teachers that know different things."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import cpu_only
from torch import Tensor

from amtml_fast import TeacherGate
from amtml_fast.gate import FLOOR, log_probabilities

N, T, C = 400, 3, 6


def specialists(seed: int = 0, sure: float = 6.0) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits of teachers that know the classes {0, 1}, {2, 3} and {4, 5}, labels, and who is right. Of a class that it does not
    know a teacher says the first of its own, as surely, but by another habit: its second one is not far behind."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (N,), generator=g)
    logits = []
    for t in range(T):
        z = torch.randn(N, C, generator=g)
        own = labels // 2 == t
        said = torch.where(own, labels, 2 * t)
        z[torch.arange(N), said] += sure
        z[:, 2 * t + 1] += torch.where(own, 0.0, sure - 3)
        z[:, [c for c in range(C) if c // 2 != t]] -= 8.0
        logits.append(z)
    return logits, labels, labels // 2


def mixture_accuracy(weights: Tensor, logits: list[Tensor], labels: Tensor) -> float:
    mixed = (weights[..., None] * torch.stack(logits, 1).softmax(-1)).sum(1)
    return (mixed.argmax(1) == labels).float().mean().item()


def test_without_a_label_every_teacher_weighs_the_same() -> None:
    logits, labels, _ = specialists()
    gate = TeacherGate(T, C)
    torch.testing.assert_close(gate(logits), torch.full((N, T), 1 / 3))
    gate.fit(logits, torch.full_like(labels, -100))
    torch.testing.assert_close(gate(logits), torch.full((N, T), 1 / 3))
    gate.fit([z[:0] for z in logits], labels[:0])
    torch.testing.assert_close(gate(logits), torch.full((N, T), 1 / 3))


def test_a_few_labels_find_the_teacher_that_knows() -> None:
    logits, labels, _ = specialists(sure=1.5)
    few = torch.full_like(labels, -100)
    few[:40] = labels[:40]
    gate = TeacherGate(T, C).fit(logits, few)
    fresh, their_labels, their_right = specialists(seed=1, sure=1.5)
    weights = gate(fresh)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    torch.testing.assert_close(weights.sum(1), torch.ones(N))
    assert (weights.argmax(1) == their_right).float().mean() > 0.6  # of three
    equal = torch.full((N, T), 1 / 3)
    assert mixture_accuracy(weights, fresh, their_labels) > mixture_accuracy(equal, fresh, their_labels) + 0.3


def test_the_fit_is_the_most_probable_one() -> None:
    """The gradient of the log-posterior, written out again, is zero there, and any step away from it is less probable."""
    logits, labels, _ = specialists(sure=1.5)
    gate = TeacherGate(T, C).fit(logits, labels)
    log_p = torch.stack([z.double().log_softmax(-1) for z in logits], 1).clamp_min(-10)
    u = log_p.flatten(1)
    x = (u - u.mean(0)) / u.std(0, correction=0)
    right = log_p[torch.arange(N), :, labels]

    def posterior(weight: Tensor, bias: Tensor) -> Tensor:
        likelihood = ((x @ weight.T + bias).log_softmax(-1) + right).logsumexp(-1).sum()
        return likelihood - (weight.square().sum() + bias.square().sum()) / 2

    weight, bias = gate.weight.double().requires_grad_(), gate.bias.double().requires_grad_()
    best = posterior(weight, bias)
    best.backward()
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad.abs().max() < 1e-3 * N and bias.grad.abs().max() < 1e-3 * N
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        away = 0.1 * torch.randn(weight.shape, generator=g, dtype=torch.float64)
        assert posterior(weight.detach() + away, bias.detach()) < best
    torch.testing.assert_close(gate(logits).double(), (x @ weight.T + bias).softmax(-1), rtol=1e-4, atol=1e-5)


def test_it_is_saved_moved_and_fitted_again() -> None:
    logits, labels, _ = specialists()
    gate = TeacherGate(T, C).fit(logits, labels)
    again = TeacherGate(T, C)
    again.load_state_dict(gate.state_dict())
    assert torch.equal(again(logits), gate(logits))
    assert not list(gate.parameters())
    torch.testing.assert_close(gate(torch.stack(logits)), gate(logits))
    assert torch.equal(gate.fit(logits, labels)(logits), again(logits))  # nothing is left of the fit before
    fresh = TeacherGate(T, C)
    with torch.inference_mode():  # where teachers' logits are made
        assert torch.equal(fresh.fit([z + 0 for z in logits], labels)(logits), again(logits))
        made_there = TeacherGate(T, C).fit(logits, labels)
    assert torch.equal(made_there.fit(logits, labels)(logits), again(logits))
    half = [z.half() for z in logits]
    torch.testing.assert_close(gate(half), gate([z.float() for z in half]))


@pytest.mark.parametrize("wide", range(T))
def test_one_teacher_in_float64_makes_the_weights_so(wide: int) -> None:
    """Whichever it is: the order of the teachers decides nothing."""
    logits, labels, _ = specialists()
    gate = TeacherGate(T, C).fit(logits, labels)
    doubles = [z.double() for z in logits]
    mixed = [doubles[t] if t == wide else logits[t] for t in range(T)]
    torch.testing.assert_close(gate(mixed), gate(doubles), rtol=1e-12, atol=1e-12)


def test_autocast_and_float64_change_no_weight() -> None:
    logits, labels, _ = specialists(sure=1.5)
    gate = TeacherGate(T, C).fit(logits, labels)
    want = gate(logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(logits), want)
    double = gate([z.double() for z in logits])
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), want)


@pytest.mark.parametrize("narrow", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)])
def test_a_model_that_is_made_narrow_leaves_the_gate_its_digits(narrow: Callable) -> None:
    """Of teachers whose logits hardly differ, scale is large: in 16 bits weights were off by tenths."""
    logits, labels, _ = specialists(sure=1.5)
    close = [0.03 * z for z in logits]
    gate = TeacherGate(T, C).fit(close, labels)
    want = gate(close)
    model = narrow(torch.nn.Sequential(torch.nn.Linear(2, 2), gate))
    assert model[0].weight.dtype != torch.float32 and torch.equal(gate(close), want)
    assert {b.dtype for b in gate.double().buffers()} == {torch.float64}
    assert {b.device.type for b in gate.half().to("meta").buffers()} == {"meta"}


def test_classes_that_are_out_and_teachers_of_one_kind() -> None:
    logits, labels, _ = specialists()
    masked = [z.clone() for z in logits]
    for z in masked:
        z[:, 5] = -torch.inf
    assert log_probabilities(masked).min() == FLOOR
    assert TeacherGate(T, C).fit(masked, labels)(masked).isfinite().all()
    same = [logits[0]] * T
    torch.testing.assert_close(TeacherGate(T, C).fit(same, labels)(same), torch.full((N, T), 1 / 3))
    assert torch.equal(TeacherGate(1, C).fit(logits[:1], labels)(logits[:1]), torch.ones(N, 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda z, y: (z[:2], y), r"fit: teacher_logits must be 3 of \[N, 6\], got \[\[400, 6\], \[400, 6\]\]"),
        (lambda z, y: ([*z[:2], z[2][:, :5]], y), r"teacher_logits must be 3 of \[N, 6\]"),
        (lambda z, y: ([], y), r"teacher_logits must be 3 of \[N, 6\], got \[\]"),
        (lambda z, y: (z, y[:9]), r"labels must be \[400\] like the logits, got \[9\]"),
        (lambda z, y: (z, y.float()), "labels must be"),
        (lambda z, y: (z, y + 1), r"labels\[\d+\] must be in \[0, 6\) or ignore_index -100, got 6"),
        (lambda z, y: (z, y - 1), r"labels\[\d+\] must be in \[0, 6\) or ignore_index -100, got -1"),
        (
            lambda z, y: ([z[0] * torch.nan, *z[1:]], y),
            r"teacher_logits\[0\] must give probabilities, got NaN for row 0",
        ),
        (
            lambda z, y: ([z[0], z[1] + torch.inf, z[2]], y),
            r"teacher_logits\[1\] must give probabilities, got NaN for row 0",
        ),
        (lambda z, y: (None, y), "teacher_logits must be a list of tensors or one .* tensor, got NoneType"),
        (lambda z, y: ([1.0, 2.0, 3.0], y), r"teacher_logits\[0\] must be a tensor, got float"),
        (lambda z, y: ([x.long() for x in z], y), r"teacher_logits\[0\] must be float32, .* got torch.int64"),
        (lambda z, y: (torch.zeros(()), y), r"got \[\]"),
        (lambda z, y: ([torch.zeros(())] * 3, y), r"teacher_logits must be 3 of \[N, 6\], got \[\[\], \[\], \[\]\]"),
        (lambda z, y: ([x[0] for x in z], y), r"teacher_logits must be 3 of \[N, 6\], got \[\[6\], \[6\], \[6\]\]"),
    ],
)
def test_what_cannot_be_fitted_is_refused_and_changes_nothing(change, said) -> None:
    logits, labels, _ = specialists()
    gate = TeacherGate(T, C).fit(logits, labels)
    before = gate(logits)
    with pytest.raises((ValueError, TypeError), match=said):
        gate.fit(*change(logits, labels))
    assert torch.equal(gate(logits), before)


def test_what_is_nearly_the_same_for_all_examples_is_not_blown_up() -> None:
    """Else weights would turn on the last digits of a logit."""
    logits, labels, _ = specialists()
    logits[0] = logits[0][:1] + 1e-6 * torch.randn(N, C)
    gate = TeacherGate(T, C).fit(logits, labels)
    assert gate.scale.max() == 1000
    moved = [logits[0] + 1e-5 * torch.randn(N, C), *logits[1:]]
    assert (gate(moved) - gate(logits)).abs().max() < 0.1


@cpu_only
def test_logits_of_another_device_are_named() -> None:
    logits, labels, _ = specialists()
    with pytest.raises(ValueError, match=r"TeacherGate: teacher_logits\[1\] must be on cpu like the gate, got meta"):
        TeacherGate(T, C).fit(logits, labels)([logits[0], logits[1].to("meta"), logits[2]])


@pytest.mark.parametrize(("teachers", "classes"), [(0, 3), (2, 0), (True, 3), (2, 1.5)])
def test_sizes_are_whole_numbers(teachers, classes) -> None:
    with pytest.raises(ValueError, match="must be an int >= 1"):
        TeacherGate(teachers, classes)
