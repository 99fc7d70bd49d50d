"""BatchNorm of frozen networks in the convolutions before it: the same outputs to rounding, in fewer passes."""

import pytest
import torch
from torch import nn

from amtml_fast.train.models.features import FeatureExtractor
from amtml_fast.train.models.folding import fold
from amtml_fast.train.models.networks import resnet, small_cnn


def trained(net: nn.Module) -> nn.Module:
    """In eval mode, with statistics and weights that are no identity."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(values)
            module.running_var.uniform_(0.2, 3)
    return net.eval().requires_grad_(False)


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


class Shared(nn.Module):
    """Its convolution runs twice, and what the second reads is read by others, too."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.read = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.a, self.b, self.c = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        x = self.b(self.twice(self.a(self.twice(x))))
        seen = self.read(x)
        return self.c(seen) + seen


class Decides(nn.Module):
    """Control flow that depends on values, which torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else x


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("make", [lambda: resnet(10, depth=8), lambda: small_cnn(10, in_channels=3)])
def test_every_norm_behind_a_convolution_is_folded(make, last) -> None:
    net, x = trained(make()), torch.randn(4, 3, 16, 16)
    if last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before, count = net(x), norms(net)
        assert count > 2 and fold(net) == count and norms(net) == 0
        torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in net.parameters())


def test_maps_are_caught_as_before() -> None:
    net, x = trained(resnet(10, depth=8)), torch.randn(4, 3, 8, 8)
    paths = {"stage": "stage2", "conv": "stage1.0.conv1", "norm": "stage3.0.bn2"}
    extractor = FeatureExtractor(net, paths).eval()
    extractor.probe(x)
    with torch.no_grad():
        before = extractor(x)
        count = norms(net)
        assert fold(net) == count - 2  # not those on both sides of a map that is caught
        assert not extractor._caught  # of the tracer: compiled code would be made again when it is gone
        logits, maps = extractor(x)
    torch.testing.assert_close(logits, before[0], rtol=1e-4, atol=1e-4)
    for name, value in before[1].items():
        torch.testing.assert_close(maps[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [Shared, Decides])
def test_what_cannot_be_folded_is_left_as_it_is(make) -> None:
    net, x = trained(make()), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        before, count = net(x), norms(net)
        assert fold(net) == 0 and norms(net) == count and torch.equal(net(x), before)
