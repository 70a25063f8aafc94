"""A network for 8x8 digits without shortcuts: binary layers, norms and signs follow each other with nothing between."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PlainDigitsNet(nn.Module):
    """Four convolutions of which the inner ones can be binarized and, but for the last, folded into thresholds."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv4 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [images, classes] of x [images, 1, 8, 8]."""
        x = F.hardtanh(self.bn1(self.conv1(x)))
        x = F.hardtanh(self.bn2(self.conv2(x)))
        x = F.hardtanh(self.bn3(self.conv3(x)))
        x = F.hardtanh(self.bn4(self.conv4(x)))
        return self.linear(x.mean(dim=(2, 3)))
