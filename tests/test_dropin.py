"""amtml_fast.dropin against the plain formulas it replaces, each written out here once, in the dtype of its inputs."""

import math
import pathlib
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, DEVICE, run_on

import amtml_fast as af
from amtml_fast import dropin
from amtml_fast.testing import convert, relative_error

# --- the formulas, as the libraries have them


def gram_distances(e, squared=False, eps=1e-12):
    norms = e.pow(2).sum(1)
    d = (norms[:, None] + norms[None, :] - 2 * e @ e.t()).clamp(min=eps)
    d = d if squared else d.sqrt()
    return d * (1 - torch.eye(len(e), dtype=e.dtype))


def plain_distance(student, teacher, squared=False):
    d, t = gram_distances(student, squared), gram_distances(teacher, squared)
    return F.smooth_l1_loss(d / d[d > 0].mean(), t / t[t > 0].mean())


def angles(x):
    e = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(e, e.transpose(1, 2))


def plain_angle(student, teacher):
    return F.smooth_l1_loss(angles(student), angles(teacher))


def plain_kl(student, teacher, T):
    log_q, p = F.log_softmax(student / T, 1), F.softmax(teacher / T, 1)
    return F.kl_div(log_q, p, reduction="none").sum(1) * T**2


def plain_fitnet(student, teacher, weight):
    if student.dim() == 2:
        student, teacher = student[..., None, None], teacher[..., None, None]
    return (F.conv2d(F.normalize(student), weight) - F.normalize(teacher)).pow(2).mean()


def standardized(z):
    return (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True))


def draw(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


S, T = draw(12, 9).requires_grad_(), draw(13, 9)[:12] * 2
MAP_S, MAP_T = draw(12, 3, 4, 5).requires_grad_(), draw(13, 3, 4, 5)[:12]
KINDS = {
    "RKdAngle": (dropin.RKdAngle(), plain_angle, (S, T)),
    "RkdDistance": (dropin.RkdDistance(), plain_distance, (S, T)),
    "DistillKL": (dropin.DistillKL(4), lambda s, t: plain_kl(s, t, 4).mean(), (S, T)),
    "DistillKL-rows": (lambda s, t: dropin.DistillKL(3)(s, t, is_ca=True), lambda s, t: plain_kl(s, t, 3), (S, T)),
    "RKDLoss": (dropin.RKDLoss(), lambda s, t: 25 * plain_distance(s, t) + 50 * plain_angle(s, t), (S, T)),
    "RKDLoss-maps": (
        dropin.RKDLoss(w_d=2, w_a=3),
        lambda s, t: 2 * plain_distance(s.flatten(1), t.flatten(1)) + 3 * plain_angle(s.flatten(1), t.flatten(1)),
        (MAP_S, MAP_T),
    ),
    "HintLoss": (dropin.HintLoss(), F.mse_loss, (MAP_S, MAP_T)),
    "HintLoss-rows": (dropin.HintLoss(), F.mse_loss, (S, T)),
    "kd_loss": (lambda s, t: dropin.kd_loss(s, t, 4), lambda s, t: plain_kl(s, t, 4).mean(), (S, T)),
    "kd_loss-standardized": (
        lambda s, t: dropin.kd_loss(s, t, 2, True),
        lambda s, t: plain_kl(standardized(s), standardized(t), 2).mean(),
        (S, T),
    ),
    "rkd_loss": (dropin.rkd_loss, lambda s, t: 25 * plain_distance(s, t) + 50 * plain_angle(s, t), (S, T)),
    "rkd_loss-squared": (
        lambda s, t: dropin.rkd_loss(s, t, squared=True, angle_weight=5),
        lambda s, t: 25 * plain_distance(s, t, squared=True) + 5 * plain_angle(s, t),
        (S, T),
    ),
    "AngleWiseRKD": (
        dropin.AngleWiseRKD(),
        lambda s, t: 50 * plain_angle(F.normalize(s), F.normalize(t)),
        (S, T.clone().requires_grad_()),
    ),
    "AngleWiseRKD-raw": (
        dropin.AngleWiseRKD(2.0, with_l2_norm=False),
        lambda s, t: 2 * plain_angle(s, t),
        (S, T.clone().requires_grad_()),
    ),
    "DistanceWiseRKD": (
        dropin.DistanceWiseRKD(),
        lambda s, t: 25 * plain_distance(F.normalize(s), F.normalize(t)),
        (S, T.clone().requires_grad_()),
    ),
    "MatchLogits": (
        dropin.MatchLogits(SimpleNamespace(kd_T=4)),
        lambda s, ts, w: (w * torch.stack([plain_kl(s, t, 4) for t in ts], 1)).sum(1).mean(),
        (S, [T, T.flip(0)], draw(12, 2).softmax(1).requires_grad_()),
    ),
}


def gradients(function, args):
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    out = function(*args)
    return out.detach(), torch.autograd.grad(out.sum(), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_those_of_the_formula(name, backend):
    ours, plain, args = KINDS[name]

    def exact(a):
        if isinstance(a, list):
            return [x.double() for x in a]
        return a.detach().double().requires_grad_(a.requires_grad)

    want, want_grads = gradients(plain, [exact(a) for a in args])
    with run_on(backend):
        got, grads = gradients(ours, convert(args, device=torch.device(DEVICE)))
    assert got.dtype == torch.float32 and want > 0 if want.dim() == 0 else (want > 0).all()
    assert relative_error(got, want) < 1e-6
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert want_grad.norm() > 0 and relative_error(grad, want_grad) < 1e-5


@pytest.mark.parametrize("teacher_size", [(4, 5), (1, 1), None], ids=["map", "pixel", "rows"])
def test_fitnet(teacher_size):
    net = dropin.FitNet(3, 7)
    assert net.transform.weight.abs().max() <= 0.005 and net.transform.bias is None
    assert list(net.state_dict()) == ["transform.weight"]
    student = (MAP_S if teacher_size else S[:, :3]).detach().requires_grad_()
    teacher = draw(12, 7, *(teacher_size or ()))
    got = net(student, teacher)
    want = plain_fitnet(student.double(), teacher.double(), net.transform.weight.double())
    leaves = student, net.transform.weight
    torch.testing.assert_close(got, want.float())
    for grad, want_grad in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)):
        assert relative_error(grad, want_grad) < 1e-5


def test_fitnet_refuses_maps_that_do_not_fit():
    with pytest.raises(ValueError, match=r"FitNet: teacher must have the height and width of student"):
        dropin.FitNet(3, 7)(MAP_S, draw(12, 7, 2, 2))


def test_hint_loss_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match=r"HintLoss: f_t must be \[12, 9\] like f_s, got \[12, 1\]"):
        dropin.HintLoss()(S, T[:, :1])


def test_adapter_is_the_authors():
    teachers, labels = [None] * 3, torch.arange(12) % 9
    adapter = dropin.Adapter(teachers, MAP_S.shape)
    assert adapter.theta.shape == (3, 3) and adapter.W.shape == (3, 1)
    weights = adapter(MAP_S, None)
    beta = MAP_S.amax((2, 3)).double()
    scores = torch.stack([(beta * t) @ adapter.W.double() for t in adapter.theta.double()]).squeeze(2).t()
    assert relative_error(weights, scores.softmax(1)) < 1e-6
    soft = torch.stack([(z / 10).softmax(1) for z in (T, T.flip(0), T.flip(1))], 1)
    mixed = (weights.unsqueeze(2) * soft).sum(1)
    decay = 0.1 * (adapter.W.square().sum() + adapter.theta.square().sum())
    kl = F.kl_div(F.log_softmax(S / 10, 1), mixed, reduction="sum") / mixed.numel()
    plain = kl * 10 * 10 * 2 * 0.7 + 0.3 * F.cross_entropy(S, labels)
    torch.testing.assert_close(adapter.loss(S, labels, mixed), plain + decay)
    torch.testing.assert_close(adapter.eval().loss(S, labels, mixed), plain)
    assert adapter.train().val is False
    (plain + decay).backward()
    assert adapter.theta.grad.norm() > 0 and adapter.W.grad.norm() > 0


def test_equal_rows_have_finite_gradients_where_the_plain_formulas_blow_up():
    student = torch.cat([S.detach()[:6]] * 2).requires_grad_()
    for loss in (dropin.RKdAngle(), dropin.RkdDistance(), dropin.rkd_loss):
        (grad,) = torch.autograd.grad(loss(student, T), student)
        assert grad.isfinite().all() and 0 < grad.abs().max() < 100


def test_a_class_without_mass_counts_nothing():
    masked = T.clone()
    masked[:, 4] = -math.inf
    (grad,) = torch.autograd.grad(dropin.DistillKL(4)(S, masked), S)
    assert grad.isfinite().all()


def test_teachers_that_require_grad_are_refused_or_constant():
    teacher = T.clone().requires_grad_()
    for loss in (dropin.DistillKL(4), lambda s, t: dropin.kd_loss(s, t, 4)):
        with pytest.raises(ValueError, match="requires grad, but teachers are frozen"):
            loss(S, teacher)
    for loss in (dropin.RKdAngle(), dropin.RkdDistance(), dropin.RKDLoss()):
        assert torch.autograd.grad(loss(S, teacher), [S, teacher], allow_unused=True)[1] is None


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
        return plain_kl(y_s, y_t, self.T).mean()


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


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_the_worked_number_of_the_docs():
    """docs/dropin.md: every row's formula gives the value that stands beside it."""
    text = (pathlib.Path(__file__).parents[1] / "docs" / "dropin.md").read_text()
    z, t = (torch.tensor(eval(re.search(rf"^    {name} = (.+)$", text, re.M)[1])).double() for name in "zt")
    scope = {"z": z, "t": t, "T": 2.0, "F": F, "torch": torch, **vars(dropin), **vars(af)}
    rows = re.findall(r"^\| .+ \| `(.+)` \| .+ \| .+ \| ([0-9.]+) \|$", text, re.M)
    assert len(rows) >= 7
    for formula, value in rows:
        assert f"{float(eval(formula, scope)):.4f}" == value, formula
