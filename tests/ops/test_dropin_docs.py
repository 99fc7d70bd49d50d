"""docs/dropin.md: every number in its tables is what the code beside it gives."""

import ast
import itertools
import pathlib
import re

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
SCOPE = {**vars(af), **vars(dropin), **EXAMPLE, "T": 2.0, "F": F, "torch": torch, "kd": af.multi_teacher_kd_loss}


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
            for tail in ("renormalize", "ignore", "uniform")
        ),
        kl(*with_rest),
        kl(log_p.log_softmax(1), log_q_top.log_softmax(1)),
        af.multi_teacher_kd_loss(z, [t], None, temperature=1.0),
    ]
    formulas = [kl(log_p.log_softmax(1), log_q_top), kl(log_p, log_q_top)]
    values = [row[-1] for row in table(3, "| the classes beyond the k |")]
    assert [f"{x:.4f}" for x in got] == values and [f"{x:.4f}" for x in formulas] == values[:2]
