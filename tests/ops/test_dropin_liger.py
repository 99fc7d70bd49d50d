"""The drop-ins for Liger's losses from hidden states: its formulas, in float64."""

import pytest
import torch
import torch.nn.functional as F
from backends import cpu_only

from amtml_fast import dropin

pytestmark = cpu_only


def example(dtype=torch.float64):
    """Student's hidden states, weight and bias; the teacher's; labels, of which each fifth counts not."""
    g = torch.Generator().manual_seed(0)
    n, c = 11, 13
    shapes = {"h": (n, 4), "w": (c, 4), "b": (c,), "teacher_h": (n, 6), "teacher_w": (c, 6), "teacher_b": (c,)}
    x = {name: torch.randn(shape, generator=g, dtype=dtype, device="cpu") for name, shape in shapes.items()}
    labels = torch.randint(0, c, (n,), generator=g, device="cpu")
    labels[::5] = -100
    for name in "hwb":
        x[name].requires_grad_()
    return x, labels


def right(x, labels, beta, temperature):
    """Cross-entropy and divergence, over the tokens that count."""
    z, t = x["h"] @ x["w"].T + x["b"], x["teacher_h"] @ x["teacher_w"].T + x["teacher_b"]
    keep = labels != -100
    q, p = (F.softmax(logits[keep] / temperature, -1) for logits in (z, t))
    m = beta * p + (1 - beta) * q

    def kl(a, b):
        return (a * (a / b).log()).sum(-1).mean()

    soft = kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)
    return F.cross_entropy(z, labels), soft


def assert_same(got, want, x, names="hwb"):
    torch.testing.assert_close(got, want)
    inputs = [x[name] for name in names]
    for grad, wanted in zip(*(torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (got, want))):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.4, 2), (0, 3), (1.5, 0), (0, 0)])
def test_the_chunked_loss_is_theirs(beta, weights):
    x, labels = example()
    hard, soft = right(x, labels, beta, 2.0)
    want = weights[0] * hard + weights[1] * soft
    given = x["h"], x["w"], x["teacher_h"], x["teacher_w"], labels, x["b"], x["teacher_b"]
    loss = dropin.LigerFusedLinearJSDLoss(*weights, beta, temperature=2.0, chunk_size=4)
    assert_same(loss(*given), want, x)
    loss.return_soft_hard_loss = True
    for got, of in zip(loss(*given), (want, soft, hard)):
        assert_same(got, of, x)


@pytest.mark.parametrize("parts", [False, True])
def test_an_infinite_part_without_weight_counts_nothing(parts):
    x, labels = example()
    with torch.no_grad():
        x["b"][labels[1]] = x["teacher_b"][labels[1]] = -torch.inf  # a label that neither side has
    given = x["h"], x["w"], x["teacher_h"], x["teacher_w"], labels, x["b"], x["teacher_b"]
    want = dropin.LigerFusedLinearJSDLoss(0, 1)(*given)
    assert want.isfinite()
    for weights, wanted in (((0, 1), want), ((0, 0), 0 * want)):
        loss = dropin.LigerFusedLinearJSDLoss(*weights, return_soft_hard_loss=parts)(*given)
        if parts:
            loss, soft, hard = loss
            assert soft == want and hard == torch.inf
        assert_same(loss, wanted, x)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_the_other_loss_is_theirs(beta):
    x, labels = example()
    x["b"], x["teacher_b"] = torch.zeros(()), torch.zeros(())
    loss = dropin.LigerFusedLinearJSD(beta, temperature=2.0)
    given = x["h"], x["w"], x["teacher_h"], x["teacher_w"]
    assert_same(loss(*given, labels), right(x, labels, beta, 2.0)[1], x, "hw")
    assert_same(loss(*given), right(x, labels.clamp(min=0), beta, 2.0)[1], x, "hw")
    of_more_classes = torch.where(labels == -100, labels, labels + 1000)  # they say which tokens count, no more
    assert loss(*given, of_more_classes) == loss(*given, labels)
    assert loss(*given, torch.full_like(labels, -100)) == 0


def test_another_label_may_be_the_ignored_one():
    x, labels = example()
    given = x["h"], x["w"], x["teacher_h"], x["teacher_w"]
    others = torch.where(labels == 3, -100, labels).clamp(min=-100)
    others[labels == -100] = 5
    labels = torch.where(labels == -100, 5, labels)
    labels[0] = 3
    others[0] = -100
    for kind in (dropin.LigerFusedLinearJSDLoss, dropin.LigerFusedLinearJSD):
        assert kind(ignore_index=3)(*given, labels) == kind()(*given, others) != kind()(*given, labels)


def test_the_chunk_size_is_passed_on():
    x, labels = example()
    with pytest.raises(ValueError, match="chunk_size must be an int >= 1 or None, got 0"):
        dropin.LigerFusedLinearJSDLoss(chunk_size=0)(x["h"], x["w"], x["teacher_h"], x["teacher_w"], labels)


def test_a_teacher_that_requires_grad_gets_none_as_with_liger():
    x, labels = example(torch.float32)
    frozen = [x[name].requires_grad_() for name in ("teacher_h", "teacher_w", "teacher_b")]
    loss = dropin.LigerFusedLinearJSDLoss()(x["h"], x["w"], *frozen[:2], labels, x["b"], frozen[2])
    (loss + dropin.LigerFusedLinearJSD()(x["h"], x["w"], *frozen[:2], labels)).backward()
    assert x["h"].grad.norm() > 0
    assert [t.grad for t in frozen] == [None, None, None]


@pytest.mark.parametrize(
    "make, wanted",
    [
        (
            lambda: dropin.LigerFusedLinearJSDLoss(-1.0),
            "LigerFusedLinearJSDLoss: weight_hard_loss must be .*, got -1.0",
        ),
        (lambda: dropin.LigerFusedLinearJSDLoss(weight_soft_loss=-1.0), "weight_soft_loss must be .*, got -1.0"),
        (lambda: dropin.LigerFusedLinearJSDLoss(beta=1.5), "beta must be .*, got 1.5"),
        (lambda: dropin.LigerFusedLinearJSDLoss(temperature=0.0), "temperature must be .*, got 0.0"),
        (lambda: dropin.LigerFusedLinearJSD(1.5), "LigerFusedLinearJSD: jsd_beta must be .*, got 1.5"),
        (lambda: dropin.LigerFusedLinearJSD(temperature=0.0), "temperature must be .*, got 0.0"),
    ],
)
def test_settings_that_do_not_fit_are_named(make, wanted):
    with pytest.raises(ValueError, match=wanted):
        make()


@pytest.mark.parametrize("attribute", ["weight_hard_loss", "weight_soft_loss"])
def test_weights_changed_later_are_checked_too(attribute):
    x, labels = example()
    loss = dropin.LigerFusedLinearJSDLoss(1.0, 1.0)
    setattr(loss, attribute, -1.0)  # the two add up to 0, which stood for no loss at all
    with pytest.raises(ValueError, match=f"LigerFusedLinearJSDLoss: {attribute} must be .*, got -1.0"):
        loss(x["h"], x["w"], x["teacher_h"], x["teacher_w"], labels)


def test_inputs_that_do_not_fit_are_named():
    x, labels = example()
    given = x["h"], x["w"], x["teacher_h"], x["teacher_w"]
    with pytest.raises(ValueError, match=r"shift_labels must be \[11\], got \[10\]"):
        dropin.LigerFusedLinearJSD()(*given, labels[1:])
    with pytest.raises(ValueError, match=r"teachers\[0\].weight must be \[12, 6\] with the classes of student_weight"):
        dropin.LigerFusedLinearJSDLoss()(x["h"], x["w"][1:], *given[2:], labels)
    with pytest.raises(TypeError, match=r"teachers\[0\].hidden must be a tensor, got NoneType"):
        dropin.LigerFusedLinearJSDLoss()(x["h"], x["w"], None, x["teacher_w"], labels)
    with pytest.raises(TypeError, match="LigerFusedLinearJSDLoss: true_labels must be a tensor, got NoneType"):
        dropin.LigerFusedLinearJSDLoss()(*given, None)
