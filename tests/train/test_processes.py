"""Two processes against one: the loss in a loop of one's own, under DDP and FSDP2, with batches split unevenly."""

import pytest
import torch
import torch.distributed as dist
from parallel import in_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import amtml_fast as af
from amtml_fast.train.run.processes import same_buffers, shard

ROWS, CLASSES, TEACHERS, STEPS = 12, 7, 3, 3
# How many of each step's rows the first process has; the last batch is a smaller one.
SPLITS = {"even": (6, 6, 6), "uneven": (5, 8, 2)}
SIZES = {"even": (12, 12, 12), "uneven": (12, 12, 7)}


class Net(nn.Module):
    """A student without BatchNorm together with its loss, in one module, as DDP and FSDP want it."""

    def __init__(self, gather: bool | str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh())
        self.head = nn.Linear(8, CLASSES)
        hints = af.MultiGroupHintLoss({"low": 2, "high": 8}, [4, 4, 4], mapping={0: "high", 2: "high"})
        self.loss = af.AMTMLLoss(af.TeacherAdapter(8, TEACHERS), hints, angle_weight=5.0, gather_angle=gather)

    def forward(self, images: Tensor, labels: Tensor, taught: list[Tensor], maps: list[Tensor], items: Tensor | None):
        features = self.body(images)
        return self.loss(
            self.head(features.mean((2, 3))), taught, labels, features, {"low": images, "high": features}, maps, items
        )


def batch(step: int, rows: slice, size: int) -> tuple:
    g = torch.Generator().manual_seed(step)
    images = torch.randn(size, 2, 6, 6, generator=g)
    labels = torch.randint(0, CLASSES, (size,), generator=g)
    labels[1] = -100  # of the first process alone
    taught = [3 * torch.randn(size, CLASSES, generator=g) for _ in range(TEACHERS)]
    maps = [torch.randn(size, 4, 6, 6, generator=g) for _ in range(TEACHERS)]
    return images[rows], labels[rows], [t[rows] for t in taught], [m[rows] for m in maps]


def train(model: nn.Module, bare: Net, split: str, rank: int | None) -> dict[str, Tensor]:
    """Three steps on this process's rows (all of them without a rank): losses, gradients of the first step, weights."""
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.05, momentum=0.9)
    seen: dict[str, Tensor] = {}
    for step, size in enumerate(SIZES[split]):
        cut = SPLITS[split][step]
        rows = slice(None) if rank is None else (slice(0, cut), slice(cut, None))[rank]
        mine = batch(step, rows, size)
        items = (batch(step, slice(None), size)[1] != -100).sum()
        share = 1 if rank is None else len(mine[0]) * 2 / size  # the hint loss is a mean over this process's rows
        bare.loss.hint_weight = share
        # Gradients are averaged over the processes, so each one's sums are divided by its share of the items.
        out = model(*mine, items if rank is None else items / 2)
        out.loss.backward()
        loss = torch.stack([out.loss.detach(), out.angle])
        if rank is not None:
            dist.all_reduce(loss)
            loss /= 2
        seen[f"loss {step}"] = loss
        if step == 0:
            seen |= {f"gradient {name}": full(p.grad) for name, p in bare.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return seen | {f"weight {name}": full(p.detach()) for name, p in bare.named_parameters()}


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def start(gather: bool | str) -> Net:
    torch.manual_seed(0)
    return Net(gather)


def outcomes(rank: int) -> dict:
    found = {}
    for split in SPLITS:
        for gather in (True, "even") if split == "even" else (True,):
            bare = start(gather)
            found[split, "ddp", gather] = train(DistributedDataParallel(bare), bare, split, rank)
            bare = start(gather)
            found[split, "fsdp2", gather] = train(shard(bare, torch.device("cpu")), bare, split, rank)
    refused = ""
    try:
        loss, classes = af.AMTMLLoss(af.TeacherAdapter(8, 1), gather_angle=True), (4, 5)[rank]
        loss(torch.randn(3, classes), [torch.randn(3, classes)], torch.zeros(3).long(), torch.randn(3, 8))
    except ValueError as error:
        refused = str(error)
    norm = nn.BatchNorm1d(2)
    norm(torch.full((4, 2), float(rank)))
    same_buffers(norm)
    return {"found": found, "refused": refused, "buffers": norm.state_dict(), "compiled": compiled(rank)}


def compiled(rank: int) -> Tensor:
    """How far the compiled loss is from its own value in eager code. Inductor's gather has a dtype of its own for a mask."""
    torch.manual_seed(rank)
    loss = af.AMTMLLoss(af.TeacherAdapter(8, 1), gather_angle="even")
    inputs = torch.randn(4, 5), [torch.randn(4, 5)], torch.tensor([0, -100, 3, rank]), torch.randn(4, 8)
    with torch.no_grad():
        return (torch.compile(loss)(*inputs).loss - loss(*inputs).loss).abs()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return in_processes(2, outcomes, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(
    ("split", "gather"), [("even", True), ("even", "even"), ("uneven", True)], ids=["even", "unasked", "uneven"]
)
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_are_one(two: list[dict], how: str, split: str, gather: bool | str) -> None:
    bare = start(False)
    want = train(bare, bare, split, None)
    for process in two:
        got = process["found"][split, how, gather]
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert (got[name] - value).norm() <= 1e-5 * value.norm() + 1e-9, name


def test_the_angle_is_that_of_all_rows(two: list[dict]) -> None:
    """And the comparison above would notice one over each process's own rows."""
    bare = start(False)
    want = train(bare, bare, "even", None)["loss 0"][1]
    halves = []
    for rows in (slice(0, 6), slice(6, None)):
        images, labels, taught, maps = batch(0, rows, ROWS)
        halves.append(start(False)(images, labels, taught, maps, None).angle)
    assert abs(sum(halves) / 2 - want) > 1e-2 * want


def test_processes_with_other_classes_all_say_so(two: list[dict]) -> None:
    for process in two:
        assert "on all processes, got 3 x 4, with labels; 3 x 5, with labels" in process["refused"]


def test_the_running_statistics_are_those_of_the_first_process(two: list[dict]) -> None:
    first, second = (process["buffers"] for process in two)
    assert not first["running_mean"].any() and first["num_batches_tracked"] == 1
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_compiled_loss_gathers_its_mask(two: list[dict]) -> None:
    for process in two:
        assert process["compiled"] < 1e-5
