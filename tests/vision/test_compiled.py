"""Compiled trainings: the same network as without, and one sentence where nothing can be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtoolkit.calibration.recover import Recover, RecoverOptions
from qtoolkit.kernels import build
from qtoolkit.stages import Stream
from qtoolkit.vision import data, models
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.pattern import Pattern


@pytest.mark.skipif(build.compiler() is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_ends_where_the_plain_one_does(digits_weights: Path) -> None:
    def trained(*, compiled: bool) -> dict[str, torch.Tensor]:
        model = models.resolve("digits", digits_weights)
        images = data.load("digits-train", model.architecture).first(192)
        context = VisionContext(Pattern(pattern="2:4"), model.architecture, images, 0, lambda text: None, None)
        taught = replace(context, original=lambda: models.resolve("digits", digits_weights).network)
        options = RecoverOptions(epochs=2, batch=64, masks="forward", settle=0.5, distill=0.5, compile=compiled)
        block = model.block()
        Recover(options).apply(block, Stream([], []), taught)
        return dict(block.module.state_dict())

    before = models.resolve("digits", digits_weights).network.state_dict()
    plain, compiled = trained(compiled=False), trained(compiled=True)
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4)
    moved = [name for name, tensor in plain.items() if (tensor - before[name]).abs().max() > 1e-2]
    assert moved  # by far more than the two trainings differ


def test_without_a_compiler_a_compiled_training_is_refused_in_one_sentence(tmp_path: Path) -> None:
    code = """
import torch
from qtoolkit.calibration.compiled import answering_pass
from qtoolkit.errors import RequestError
try:
    with torch.no_grad():
        answering_pass(torch.nn.Linear(4, 3), compiled=True)(torch.randn(2, 4))
except RequestError as error:
    print(error)
"""
    environment = {**os.environ, "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("torch.compile fails on this machine: ")
    assert ran.stdout.strip().endswith("Leave recover.compile out.")
