"""A trained digits classifier, made once: what the vision tests compress."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from qtoolkit.vision import data, models


@pytest.fixture(scope="session")
def digits_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the digits network after 15 epochs of plain training, which gives about 97 %."""
    torch.manual_seed(0)
    model = models.resolve("digits")
    images = data.load("digits-train", model.architecture)
    network = model.network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(15):
        for views, y in images.epoch(64, model.architecture, generator):
            optimizer.zero_grad()
            F.cross_entropy(network(views[0]), y).backward()
            optimizer.step()
    file = tmp_path_factory.mktemp("digits") / "digits.safetensors"
    save_file({k: v for k, v in network.state_dict().items() if not k.endswith("tracked")}, file)
    return file
