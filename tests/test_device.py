"""Which device a word means, and what each part that takes the word refuses."""

from pathlib import Path

import pytest
import torch

from qtoolkit import device
from qtoolkit.errors import RequestError
from qtoolkit.serve import vision_server, vllm_server
from qtoolkit.serve.launcher import Order


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose("auto") == device.choose(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose("auto") == torch.device("cuda")
    assert device.choose("cpu") == torch.device("cpu")


@pytest.mark.parametrize("word", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_refused(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: word != "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RequestError, match=f"There is no {word}"):
        device.choose(word)


@pytest.mark.parametrize("word", ["gpu", "meta", "xpu", "cuda:x"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(RequestError, match="is not a device"):
        device.choose(word)


def test_servers_refuse_what_they_cannot_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server.machine, "vllm_is_for_cpu", lambda: True)
    vllm_server.refuse_device("auto")
    vllm_server.refuse_device("cpu")
    with pytest.raises(RequestError, match="serves on cpu, not on cuda"):
        vllm_server.refuse_device("cuda")
    with pytest.raises(RequestError, match="classifiers are served on the CPU"):
        vision_server.serve_vision(Order(Path("model"), "model", device="cuda"), lambda ready: None, print)


def test_an_evaluation_refuses_a_device_that_is_not_there() -> None:
    from qtoolkit.evals.run import evaluate

    with pytest.raises(RequestError, match="There is no cuda:99"):
        evaluate("tiny", device="cuda:99")
