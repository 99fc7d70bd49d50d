"""The methods against what their authors published, written out here, and the figures of docs/method.md's table."""

from __future__ import annotations

import pytest
import torch
from method_step import T, kl, make_step, objective, seen
from sklearn.svm import OneClassSVM
from small_run import ROOT
from torch import Tensor
from torch.nn import functional as F

from amtml_fast.train.methods.aekd import min_norm_weights
from amtml_fast.train.methods.base import Step
from amtml_fast.train.methods.registry import METHODS


def theirs_ca_mkd(step: Step, tau: float = 4.0) -> Tensor:
    """The KL of CA-MKD's authors: divided by the number of teachers once more, though the weights sum to 1."""
    ce = torch.stack([F.cross_entropy(z, step.labels, reduction="none") for z in step.teacher_logits])
    weights = (1 - ce.softmax(0)) / (T - 1)
    each = torch.stack([kl((z / tau).softmax(-1), step.logits, tau) for z in step.teacher_logits])
    return (weights * each).sum() / (len(step.labels) * T)


def theirs_eb_kd(step: Step, tau: float = 4.0) -> Tensor:
    """EB-KD in the code of CA-MKD's authors: the weights sum to T - 1 and are divided by T."""
    entropies = torch.stack([-(z.softmax(1) * z.log_softmax(1)).sum(1) for z in step.teacher_logits])
    each = torch.stack([kl((z / tau).softmax(-1), step.logits, tau) for z in step.teacher_logits])
    return ((1 - entropies / entropies.sum(0)) * each).sum() / (len(step.labels) * T)


def theirs_at(student: Tensor, teacher: Tensor) -> Tensor:
    """RepDistiller's AT: the larger map is pooled before it is squared. (AT's authors have maps of one size.)"""

    def attention(x: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(x, side).square().mean(1).flatten(1))

    side = min(student.shape[2], teacher.shape[2])
    return (attention(student) - attention(teacher)).square().mean()


def theirs_rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD's distance loss: distances over the mean of those that are not 0, of which one example has none."""
    first, second = (torch.cdist(x, x) for x in (student, teacher))
    return F.smooth_l1_loss(first / first[first > 0].mean(), second / second[second > 0].mean())


def aekd_gradients(step: Step, tau: float = 4.0) -> Tensor:
    """Of every teacher's KL to the student's logits, by autograd: [T, N, C]."""
    gradients = []
    for z in step.teacher_logits:
        logits = step.logits.detach().requires_grad_()
        gradients.append(torch.autograd.grad(kl((z / tau).softmax(-1), logits, tau).mean(), logits)[0])
    return torch.stack(gradients)


def theirs_aekd(step: Step) -> Tensor:
    """The authors' weights for three teachers, on a grid: gradients averaged over the batch, no weight above 0.6."""
    rows = aekd_gradients(step).mean(1)
    ticks = torch.linspace(0, 1, 1001)
    first, second = torch.meshgrid(ticks, ticks, indexing="ij")
    grid = torch.stack([first, second, 1 - first - second], -1).flatten(0, 1)
    grid = grid[((grid >= -1e-6) & (grid <= 0.6 + 1e-6)).all(1)]
    return grid[(grid @ rows).square().sum(1).argmin()]


def theirs_aekd_solver(step: Step) -> Tensor:
    """The one-class SVM by which AEKD's authors find the weights, with their tolerance."""
    rows = aekd_gradients(step).mean(1)
    share = 1 / (0.6 * T)
    svm = OneClassSVM(kernel="precomputed", nu=share, tol=1e-6).fit((rows @ rows.T).numpy())
    weights = torch.zeros(T)
    weights[torch.from_numpy(svm.support_).long()] = torch.from_numpy(svm.dual_coef_[0]).float() / (T * share)
    return weights


def cut(step: Step, count: int) -> Step:
    """Its first examples."""
    logits, maps, labels, teacher_logits, teacher_maps, images, features, *_ = step
    return Step(
        logits[:count],
        {name: x[:count] for name, x in maps.items()},
        labels[:count],
        [z[:count] for z in teacher_logits],
        [u[:count] for u in teacher_maps],
        images[:count],
        features[:count],
    )


def larger(step: Step, times: int = 40) -> Step:
    """A batch `times` as large, of the same examples: the same mean gradients, which theirs divides by the batch size."""
    return step._replace(
        logits=step.logits.repeat(times, 1),
        labels=step.labels.repeat(times),
        teacher_logits=[z.repeat(times, 1) for z in step.teacher_logits],
    )


def differences() -> dict[str, tuple[Tensor, Tensor]]:
    """Theirs and ours, for every row of docs/method.md's table that has figures."""
    step, many = make_step(), larger(make_step())
    rows = objective("aekd", aekd_gradients="rows", aekd_bound=1.0)
    v, u = step.features, step.teacher_maps[0]  # of 2 x 2 and 4 x 4 pixels
    one, none = cut(step, 1), cut(step, 0)
    pooled = [x.mean((2, 3)) for x in (one.features, one.teacher_maps[0])]
    nothing = kl((none.teacher_logits[0] / 4).softmax(-1), none.logits, 4.0).mean()
    return {
        "CA-MKD": (theirs_ca_mkd(step), objective("ca_mkd", alpha=1.0, hint_weight=0.0)(step).loss),
        "EB-KD": (theirs_eb_kd(step), objective("eb_kd", alpha=1.0, mode="sum")(step).loss),
        "AEKD": (theirs_aekd(step), objective("aekd")(step).weights[0]),
        "AEKD, `aekd_gradients: rows`, `aekd_bound: 1`": (theirs_aekd(step), rows(step).weights[0]),
        "AEKD, the same batch 40 times": (theirs_aekd_solver(many), objective("aekd")(many).weights[0]),
        "AT": (theirs_at(v, u), objective("at")(step).terms["attention"]),
        "RKD, one example": (theirs_rkd_distance(*pooled), objective("rkd")(one).terms["distance"]),
        "KL, no example": (nothing, objective("okd-t0", alpha=1.0)(none).loss),
    }


def figure(value: Tensor) -> str:
    if value.ndim:
        return f"[{', '.join(f'{x:.3f}' for x in value.tolist())}]"
    return "NaN" if value.isnan() else f"{value.item():.4f}"


def test_the_table_of_differences_has_the_figures() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    table = text.split("## Where we differ from the originals")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    written = {row[0]: row[-2:] for row in cells[2:] if row[-1]}
    assert written == {name: [figure(x) for x in pair] for name, pair in differences().items()}


def test_ca_mkd_and_eb_kd_are_their_authors_losses_times_a_number() -> None:
    step = make_step()
    for name, theirs, times in (("ca_mkd", theirs_ca_mkd, T), ("eb_kd", theirs_eb_kd, T / (T - 1))):
        ours = objective(name, alpha=1.0, hint_weight=0.0)(step).loss
        first, second = (torch.autograd.grad(loss, step.logits)[0] for loss in (ours, theirs(step)))
        torch.testing.assert_close(first, times * second)


def test_half_an_alpha_has_half_of_the_authors_cross_entropy_and_kl() -> None:
    step = make_step()
    ce = F.cross_entropy(step.logits, step.labels)
    for name, theirs, times in (("ca_mkd", theirs_ca_mkd, T), ("eb_kd", theirs_eb_kd, T / (T - 1))):
        ours = objective(name, alpha=0.5, hint_weight=0.0, mode="sum")(step).loss
        torch.testing.assert_close(2 * ours, ce + times * theirs(step))


def test_at_with_maps_of_one_size_is_the_authors_loss() -> None:
    step = seen(METHODS["at"])
    step = step._replace(teacher_maps=[step.teacher_maps[0][:, :, :2, :2]])
    ours = objective("at")(step).terms["attention"]
    torch.testing.assert_close(ours, theirs_at(step.features, step.teacher_maps[0]).detach())


@pytest.mark.parametrize("seed", range(4))
def test_aekd_weighs_the_mean_gradients_of_the_batch_as_its_authors_do(seed: int) -> None:
    step = make_step(seed)
    out = objective("aekd")(step)
    torch.testing.assert_close(out.weights[0], theirs_aekd(step), rtol=0, atol=2e-3)
    each = torch.stack([kl((z / 4).softmax(-1), step.logits, 4.0).mean() for z in step.teacher_logits])
    want = 0.3 * F.cross_entropy(step.logits, step.labels) + 0.7 * out.weights[0] @ each
    torch.testing.assert_close(out.loss, want)


def test_aekd_weighs_the_gradients_of_every_row_where_asked() -> None:
    step = make_step()
    rows = aekd_gradients(step).flatten(1)
    made = objective("aekd", aekd_gradients="rows", aekd_bound=1.0)
    torch.testing.assert_close(made(step).weights[0], min_norm_weights(rows @ rows.T))
    assert (made(step).weights[0] - objective("aekd")(step).weights[0]).abs().max() > 0.05
