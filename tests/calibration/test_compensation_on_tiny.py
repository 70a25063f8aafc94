"""Compensation on a real trained model: the bundled one, judged on text that it was not calibrated on."""

from __future__ import annotations

import pytest
import torch

from qtoolkit import architecture, data
from qtoolkit.calibration import capture
from qtoolkit.calibration.compensation import Compensate, CompensateOptions
from qtoolkit.evals import texts
from qtoolkit.scheme import Scheme
from qtoolkit.source import resolve
from qtoolkit.stages import Context, Stream

PLAIN = {"aim": False, "sequential": False, "couple": False, "refine": 0}


@pytest.mark.parametrize("group_size", [128, -1])
def test_two_blocks_are_nearer_to_the_float_network_than_with_plain_compensation(group_size: int) -> None:
    source = resolve("tiny")
    skeleton = architecture.skeleton(source)
    tokens = data.windows([texts.load("sample").text], data.load_tokenizer(source), 24, 128, seed=0)
    context = Context(Scheme(group_size=group_size), torch.bfloat16, print)
    lost = {}
    for name, options in (("plain", PLAIN), ("default", {})):
        transform = Compensate(CompensateOptions.model_validate(options))
        fit, held = (capture.embed(skeleton, source, part) for part in (tokens[:20], tokens[20:]))
        truth, floats = held, Stream(fit.batches, fit.kwargs)
        for index in range(2):
            block = skeleton.block(index, source)
            fit.floats = floats.batches
            floats, truth = capture.advance(block, floats), capture.advance(block, truth)
            report = transform.apply(block, fit, context)
            with capture.quantized_activations(block, 8):
                fit, held = capture.advance(block, fit), capture.advance(block, held)
            for figures in report.values():
                assert 0 < figures["weight_error"] < 0.1
                assert figures["activation_error"] < figures["weight_error"]  # int8 against int4
        lost[name] = float((held.batches[0] - truth.batches[0]).square().sum())
    assert lost["default"] < 0.97 * lost["plain"]
