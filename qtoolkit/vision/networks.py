"""The small networks that ship as definitions: CIFAR ResNets, the LeNet of the DeBut paper, a net for 8x8 digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut that has no parameters: subsampling and zero channels (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return [images, outputs, height / stride, width / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.added:
            half = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images (He et al. 2015, section 4.2): three stages of 16, 32 and 64 channels.

    Parameter names are those of github.com/akamaster/pytorch_resnet_cifar10, whose weights it loads.
    """

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [images, classes] of x [images, 3, height, width]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


class LeNet(nn.Module):
    """LeNet for 28x28 digits as in the DeBut paper (Lin et al. 2021): 61,482 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.fc = nn.Linear(400, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [images, classes] of x [images, 1, 28, 28]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc(x.flatten(1)))
        return self.fc3(self.fc2(x))


class DigitsNet(nn.Module):
    """A net for scikit-learn's 8x8 digits whose activations are all bounded, so that it can be binarized.

    Every convolution but the first has its own shortcut, as binary networks need (Bi-Real net, Liu et al. 2018).
    """

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv4 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [images, classes] of x [images, 1, 8, 8]."""
        x = F.hardtanh(self.bn1(self.conv1(x)))
        x = F.hardtanh(self.bn2(self.conv2(x)) + x)
        x = F.avg_pool2d(x, 2)
        x = F.hardtanh(self.bn3(self.conv3(x)) + x)
        x = F.hardtanh(self.bn4(self.conv4(x)) + x)
        return self.linear(x.mean(dim=(2, 3)))


class BiRealBlock(ResidualBlock):
    """Two convolutions, each with a shortcut of its own: average pooling and zero channels where the shape changes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [images, outputs, height / stride, width / stride]."""
        shortcut = x if self.stride == 1 else F.avg_pool2d(x, 2)
        half = self.added // 2
        shortcut = F.pad(shortcut, (0, 0, 0, 0, half, self.added - half))
        y = F.hardtanh(self.bn1(self.conv1(x)) + shortcut)
        return F.hardtanh(self.bn2(self.conv2(y)) + y)


class BiRealNet(CifarResNet):
    """CIFAR ResNet for binary weights and activations: Hardtanh, a shortcut around every convolution."""

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__(depth, classes)
        blocks = (depth - 2) // 6
        for name, inputs, outputs, stride in (("layer1", 16, 16, 1), ("layer2", 16, 32, 2), ("layer3", 32, 64, 2)):
            setattr(self, name, _stage(inputs, outputs, blocks, stride, BiRealBlock))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [images, classes] of x [images, 3, height, width]."""
        x = F.hardtanh(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(
    inputs: int, outputs: int, blocks: int, stride: int, kind: type[ResidualBlock] = ResidualBlock
) -> nn.Sequential:
    first = kind(inputs, outputs, stride)
    return nn.Sequential(first, *(kind(outputs, outputs, 1) for _ in range(blocks - 1)))


def seeded(seed: int, build: type[nn.Module], **arguments: int) -> nn.Module:
    """Build a network whose random initial weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(**arguments)
