"""Gates: which metrics there are, which way they point, and what failing says."""

from __future__ import annotations

import pytest

from qtoolkit.errors import GateError, RequestError
from qtoolkit.evals import gates
from qtoolkit.evals.results import EvalResult


def test_metrics_are_those_that_were_announced(result: EvalResult) -> None:
    announced = gates.names(["sample"], ["piqa"], reference=True, endpoint=True)
    assert set(gates.metrics(result)) == announced


def test_fewer_parts_mean_fewer_metrics(result: EvalResult) -> None:
    alone = result.model_copy(
        update={"reference": None, "divergence": None, "ppl_change": {}, "task_change": {}, "served": None}
    )
    assert set(gates.metrics(alone)) == gates.names(["sample"], ["piqa"], reference=False, endpoint=False)
    assert gates.names([], [], reference=True, endpoint=True) == set()


def test_higher_is_worse_for_every_metric(result: EvalResult) -> None:
    found = gates.metrics(result)
    assert found["piqa.drop"] == 0.25  # accuracy fell from 0.75 to 0.5
    assert found["piqa.loss"] == 0.5
    assert found["ppl_change"] == found["ppl_change.sample"] == 0.1
    assert found["top1_change"] == pytest.approx(0.1)


def test_gap_to_the_server_counts_both_ways(result: EvalResult) -> None:
    assert result.served is not None
    result.served.gap["sample"] = -0.02
    assert gates.metrics(result)["served_gap"] == 0.02


def test_bounds_that_hold_pass(result: EvalResult) -> None:
    gates.check(result, gates.parse(["kl=0.02", "ppl=11", "served_gap=0.005"]))  # equal is not above


def test_failing_names_every_figure_and_its_bound(result: EvalResult) -> None:
    with pytest.raises(GateError) as raised:
        gates.check(result, gates.parse(["kl=0.01", "ppl=100", "piqa.drop=0.1"]))
    assert raised.value.message == "kl is 0.02, above 0.01; piqa.drop is 0.25, above 0.1."
    assert raised.value.exit_code == 3


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(RequestError) as raised:
        gates.check_names({"ppl_chnage": 1.0}, gates.names(["sample"], [], reference=True, endpoint=False))
    assert "ppl_change" in raised.value.hint
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("gate", ["kl", "kl=", "kl=much", "=3", "kl=nan"])
def test_malformed_gate_is_refused(gate: str) -> None:
    with pytest.raises(RequestError, match="metric=value"):
        gates.parse([gate])
