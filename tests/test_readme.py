"""The README's loop runs as written, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 64, 3, padding=1), nn.Linear(64, 10)

    def forward(self, x):
        features = self.conv(x).relu()
        return self.fc(features.mean((2, 3))), features


def snippets():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_the_lines_for_language_models():
    *_, code = snippets()
    names = {
        "student_hidden": torch.randn(5, 4, requires_grad=True),
        "teacher_hidden": torch.randn(5, 6),
        "student_head": nn.Linear(4, 9, bias=False),
        "teacher_head": nn.Linear(6, 9),
        "indices": torch.randint(0, 9, (5, 3)),
        "log_probs": torch.rand(5, 3).log(),
        "labels": torch.randint(0, 9, (5,)),
    }
    exec(code, names)
    assert names["student_head"].weight.grad.abs().sum() > 0 and names["student_hidden"].grad is not None


def test_the_lines_with_a_gate():
    _, code, _ = snippets()
    names = {
        "known_logits": [torch.randn(20, 10) for _ in range(3)],
        "known_labels": torch.randint(0, 10, (20,)),
        "logits": torch.randn(8, 10, requires_grad=True),
        "teacher_logits": [torch.randn(8, 10) for _ in range(3)],
        "labels": torch.randint(0, 10, (8,)),
    }
    exec(code, names)
    names["loss"].backward()
    assert names["logits"].grad.abs().sum() > 0


def test_the_ten_lines_train_a_student():
    code, *_ = snippets()
    teachers = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval() for _ in range(3)]
    batch = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    names = {"student": Student(), "teachers": teachers, "loader": [batch] * 10}
    losses = []
    exec(
        code.replace("    optimizer.step()", "    optimizer.step()\n    losses.append(out.loss.item())"),
        names | {"losses": losses},
    )
    assert len(losses) == 10 and losses[-1] < losses[0]


@pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="a source distribution has no results")
@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/method.md",
        "docs/contract.md",
        "docs/cache.md",
        "docs/language_models.md",
        "kernels/README.md",
    ],
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
