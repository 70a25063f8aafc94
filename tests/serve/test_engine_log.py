"""The one line that says why an engine failed, out of the many it prints."""

from __future__ import annotations

import pytest

from qtoolkit.serve.engine_log import EngineLog, last_error, plain

NESTED = """\
(EngineCore pid=9290) ERROR 11-21 03:18:16 [core.py:1510] EngineCore failed to start.
(EngineCore pid=9290) ERROR 11-21 03:18:16 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=9290) ERROR 11-21 03:18:16 [core.py:1510]     assert False
(EngineCore pid=9290) ERROR 11-21 03:18:16 [core.py:1510] AssertionError: Not enough allowed NUMA nodes.
(EngineCore pid=9290) Process EngineCore:
(APIServer pid=9261) Traceback (most recent call last):
(APIServer pid=9261)     raise RuntimeError(
(APIServer pid=9261) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
 - leaked function "create_atomic_cas"
See https://nanobind.readthedocs.io/en/latest/refleaks.html
"""
VALIDATION = """\
(APIServer pid=1) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=1)   Value error, The model type `nope` is not known. [type=value_error, input_value=ArgsKwargs((), {...
(APIServer pid=1)     For further information visit https://errors.pydantic.dev/2.12/v/value_error
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (NESTED, "Not enough allowed NUMA nodes."),
        (VALIDATION, "The model type `nope` is not known."),
        ("safetensors_rust.SafetensorError: incomplete metadata\n", "incomplete metadata"),
        ("loading\nKilled\n", "Killed"),
        ("", "it said nothing"),
    ],
    ids=["nested", "validation", "plain", "no exception", "silent"],
)
def test_the_cause_is_found(log: str, expected: str) -> None:
    assert last_error(log.splitlines()) == expected


def test_a_line_loses_colours_names_and_times_only() -> None:
    coloured = "\x1b[0;36m(Worker_TP0 pid=5)\x1b[0;0m INFO 11-21 03:16:32 [vllm_report.py:41] qtoolkit: of 9 (nine)"
    assert plain(coloured) == "qtoolkit: of 9 (nine)"


def test_wrong_arguments_are_told_apart() -> None:
    passed_on: list[str] = []
    log = EngineLog(
        ["usage: api_server.py [-h]\n", "api_server.py: error: unrecognized arguments: --x\n"], passed_on.append
    )
    assert log.misused() == "unrecognized arguments: --x"
    assert passed_on[-1].endswith("--x")
