"""A training step written the way published code for this method is: one teacher after another, stacked soft targets, RKD's
angle with its [N, N, N] cosines, metrics read with .item() at every step, images prepared one at a time in the main process."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Images(Dataset):
    """uint8 images [N, C, H, W], normalized and flipped one by one."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images, self.labels = images, labels
        self.mean, self.std = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = (self.images[i].float() / 255 - self.mean) / self.std
        return image.flip(-1) if torch.rand(()) < 0.5 else image, self.labels[i]


def batches(images: Images, size: int) -> Iterator[list[Tensor]]:
    while True:
        yield from DataLoader(images, size, shuffle=True, drop_last=True)


def angles(x: Tensor) -> Tensor:
    """Cosines [N * N * N] between all pairs of differences."""
    difference = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2)
    return torch.bmm(difference, difference.transpose(1, 2)).view(-1)


class PaperLoss(nn.Module):
    """Eq 3 with its parameters: theta [T, d], v [d], and a 1x1 convolution for each hint."""

    def __init__(self, width: int, teachers: int, hints: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.theta, self.v = nn.Parameter(torch.randn(teachers, width)), nn.Parameter(torch.randn(width))
        self.match = nn.ModuleList(nn.Conv2d(a, b, 1, bias=False) for a, b in hints)

    def forward(
        self, logits: Tensor, features: Tensor, groups: list[Tensor], labels: Tensor, taught: list[Tensor], maps: list[Tensor],
        temperature: float = 4.0, alpha: float = 0.7,
    ) -> Tensor:  # fmt: skip
        pooled = F.max_pool2d(features, features.shape[2:]).flatten(1)
        scores = torch.stack([(pooled * theta * self.v).sum(1) for theta in self.theta], 1)
        weights = F.softmax(scores, dim=1)
        soft = torch.stack([F.softmax(x / temperature, dim=1) for x in taught], 1)
        target = (weights.unsqueeze(2) * soft).sum(1)
        log_q = F.log_softmax(logits / temperature, dim=1)
        kl = F.kl_div(log_q, target, reduction="batchmean") * temperature**2
        angle = F.smooth_l1_loss(angles(log_q.exp()), angles(target.detach()))
        pooled_maps = [F.adaptive_avg_pool2d(m, (g.shape[2], g.shape[3])) for g, m in zip(groups, maps)]
        hint = torch.stack([F.mse_loss(match(g), m) for match, g, m in zip(self.match, groups, pooled_maps)])
        return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * kl + angle + hint.sum()
