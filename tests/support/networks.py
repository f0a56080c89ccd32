"""Tiny networks."""

import torch
from torch import nn


class TinyNet(nn.Module):
    """8×8 images; BatchNorm and dropout before a frozen layer, dropout before the head."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.early = nn.Dropout(0.5)
        self.block = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.late = nn.Dropout(0.25)
        self.fc = nn.Linear(8, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.block(self.early(torch.relu(self.bn(self.conv(images)))))  # [B, 8, 3, 3]
        return self.fc(self.late(features.mean((2, 3))))
