"""What a checkpoint's ``quantization_config`` asks for, and what the user asks on top: which int4 layers run W4A8."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from qtoolkit.bridges.compressed import is_token_int8
from qtoolkit.errors import RequestError
from qtoolkit.scheme import Head

MODE = "QTOOLKIT_W4A8"  # environment variable: it must reach every worker process of an engine
HEAD = "QTOOLKIT_LM_HEAD"  # likewise
ATTENTION = "QTOOLKIT_ATTENTION"  # likewise
STEPS = "QTOOLKIT_STEPS"  # likewise


Word = TypeVar("Word", bound=Enum)


class Mode(str, Enum):
    """When int4 layers get int8 activations."""

    DECLARED = "declared"  # the checkpoint says so; the default
    ALWAYS = "always"  # every symmetric int4 layer, whatever the checkpoint says
    OFF = "off"  # never: the engine's own kernels run


class Attention(str, Enum):
    """Whose attention runs, where both can."""

    OWN = "own"  # the default
    VLLM = "vllm"


class Steps(str, Enum):
    """How steps of single tokens run on CPUs."""

    REPEATED = "repeated"  # recorded calls, where they can be recorded; the default
    VLLM = "vllm"  # torch's generated Python, each time


class Output(str, Enum):
    """What runs as the output layer."""

    FLOAT = "float"  # as the checkpoint has it, on our product where that runs; the default
    INT8 = "int8"
    INT4 = "int4"
    VLLM = "vllm"  # as the checkpoint has it, on vLLM's own product


class Declared(str, Enum):
    """How many of a checkpoint's int4 groups of layers declare int8 activations."""

    ALL = "all"
    SOME = "some"  # each layer must then be asked for itself
    NONE = "none"


def mode() -> Mode:
    """Return the user's choice from the environment.

    Raises:
        RequestError: the variable holds an unknown word.
    """
    return _choice(MODE, Mode, Mode.DECLARED)


def head() -> Head | None:
    """Return from the environment what the output layer runs as; None leaves it to vLLM.

    Raises:
        RequestError: the variable holds an unknown word.
    """
    wanted = _choice(HEAD, Output, Output.FLOAT)
    return None if wanted is Output.VLLM else Head(wanted.value)


def attention() -> Attention:
    """Return from the environment whose attention runs.

    Raises:
        RequestError: the variable holds an unknown word.
    """
    return _choice(ATTENTION, Attention, Attention.OWN)


def steps() -> Steps:
    """Return from the environment how steps of single tokens run.

    Raises:
        RequestError: the variable holds an unknown word.
    """
    return _choice(STEPS, Steps, Steps.REPEATED)


def _choice(variable: str, words: type[Word], otherwise: Word) -> Word:
    value = os.environ.get(variable, "") or otherwise.value
    try:
        return words(value.lower())
    except ValueError:
        known = ", ".join(word.value for word in words)
        raise RequestError(f"{variable}={value} is not known.", f"Use one of: {known}.") from None


def _is_int4(weights: Mapping[str, Any] | None) -> bool:
    return weights is not None and weights.get("num_bits") == 4 and weights.get("type", "int") == "int"


def _of_experts(group: Mapping[str, Any]) -> bool:
    """Say whether a config group is that of experts: all its targets are patterns with a part ``experts``."""
    targets = group.get("targets") or [""]
    return all(target.startswith("re:") and ".experts" in target for target in targets)


def declared(quantization_config: Mapping[str, Any] | None) -> Declared:
    """Read from a ``quantization_config`` whether its int4 layers are meant to run with int8 activations.

    Only compressed-tensors can say so; GPTQ files have no word for activations. Groups whose weights are not int4
    do not count, nor those of a mixture's experts, which engines do not run as linear layers.
    """
    groups = ((quantization_config or {}).get("config_groups") or {}).values()
    linear = [group for group in groups if not _of_experts(group) and _is_int4(group.get("weights"))]
    answers = {is_token_int8(group.get("input_activations")) for group in linear}
    if answers == {True}:
        return Declared.ALL
    return Declared.SOME if True in answers else Declared.NONE
