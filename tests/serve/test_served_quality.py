"""The bundled model served as users serve it scores what our own runtime says it scores, and close to float."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving_support import KEY, Start
from transformers import AutoTokenizer

import qtoolkit
from qtoolkit.evals import endpoint, perplexity
from qtoolkit.evals.texts import load
from qtoolkit.evals.windows import cut

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("group_size", [128, "channel"])
def test_tiny_through_vllm_has_the_runtimes_perplexity(
    group_size: int | str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"calibration.samples": 32, "calibration.length": 256, "scheme.group_size": group_size}
    folder = tmp_path / "tiny-w4a8"
    qtoolkit.quantize("tiny", "w4a8", folder, changes=changes)
    windows = cut("sample", load("sample").text, AutoTokenizer.from_pretrained(folder), 1024)
    ours = perplexity.of_model(qtoolkit.load(folder), windows).token
    with start(folder) as served:  # compiled, bfloat16: what `qtoolkit serve DIR` gives
        monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY)
        kernels = served.ready["kernels"]
        assert sum(count for name, count in kernels.items() if name.startswith("w4a8-")) == 24  # 4 in each block
        through_vllm = endpoint.connect(served.ready["url"]).perplexity(windows).token
    assert through_vllm == pytest.approx(ours, rel=0.005)  # bfloat16 sums in another order
    plain = perplexity.of_model(qtoolkit.load("tiny"), windows).token
    assert through_vllm == pytest.approx(plain, rel=0.02)  # W4A8 costs about 1 % of perplexity here
