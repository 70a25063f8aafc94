"""How a transform reads its part of the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qtoolkit.recipe import explain

O = TypeVar("O", bound="Options")  # noqa: E741


class Options(BaseModel):
    """A step's options: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read(model: type[O], step: str, values: Mapping[str, Any]) -> O:
    """Return the validated options of ``step``.

    Raises:
        RequestError: an unknown key or a wrong value, with the nearest known key.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise explain(error, model, f"option of step {step!r}:") from None
