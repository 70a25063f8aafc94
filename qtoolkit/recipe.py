"""A recipe says everything that decides a result: YAML to validated data, unknown keys refused, a naming digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qtoolkit.errors import RequestError, said
from qtoolkit.registry import suggest
from qtoolkit.scheme import Scheme

Scalar = str | int | float | bool | None
ALTERNATIVES = {"str", "int", "float", "bool", "none"}  # pydantic adds to a place which of them it tried


class Calibration(BaseModel):
    """Where the calibration text comes from and how much of it is used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field("self", description="text file, .jsonl, hub data set, or 'self': text the model itself writes")
    samples: int = Field(128, ge=1, description="windows of `length` tokens")
    length: int = Field(2048, ge=8, description="tokens a window; cut to the model's context")
    random: float = Field(0.125, ge=0, lt=1, description="share of the windows that are random tokens, not text")
    seed: int = Field(0, ge=0, lt=2**32)


METHODS: dict[str, tuple[str, ...]] = {
    "none": (),
    "smooth": ("smooth",),
    "rotate": ("rotate",),
    "both": ("rotate", "smooth"),
}


class Outliers(BaseModel):
    """What is done about activation outliers: rotation, smoothing, both, neither, or what held-out text says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["none", "smooth", "rotate", "both", "auto"] | None = Field(
        None, description="auto: measured; not given: the steps as written"
    )
    blocks: int | None = Field(
        None, ge=1, description="on which auto tries every method; not given: 2 from 16 on, else 1"
    )


class Budget(BaseModel):
    """How many bits a weight may take on average: what is left over int4 goes where it helps most."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="bits a quantizable weight, codes and scales; 4.25 or '4.25bpw'"
    )

    @field_validator("bits", mode="before")
    @classmethod
    def _read_bits(cls, value: object) -> object:
        return value.removesuffix("bpw") if isinstance(value, str) else value


class Recipe(BaseModel):
    """One way to compress a model: scheme, calibration, transforms in order with their options, packer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: str = ""
    scheme: Scheme = Scheme()
    calibration: Calibration = Calibration()
    steps: dict[str, dict[str, Scalar]] = Field(description="transforms in order, each with its options")
    outliers: Outliers = Outliers()
    budget: Budget = Budget()
    packer: str = "int4"
    keep: tuple[str, ...] = Field(("lm_head",), description="modules that stay in float")

    @property
    def digest(self) -> str:
        """Return 12 hex digits that change with anything that changes the result."""
        return hashlib.sha256(json.dumps(self.deciding(), separators=(",", ":")).encode()).hexdigest()[:12]

    def deciding(self) -> dict[str, Any]:
        """Return what changes the result, as plain data: all but the names."""
        return self.model_dump(mode="json", exclude={"name", "about"})

    def under(self, method: str | None) -> dict[str, dict[str, Scalar]]:
        """Return the steps that run when outliers are treated by ``method``; None leaves the steps as written."""
        if method is None:
            return self.steps
        chosen = {step: self.steps.get(step) or {} for step in METHODS[method]}
        return {**chosen, **{step: options for step, options in self.steps.items() if step not in METHODS["both"]}}

    def to_yaml(self) -> str:
        """Return the recipe as a file that ``load`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=False), sort_keys=False)


R = TypeVar("R", bound=Recipe)


def presets(kind: str = "llm") -> dict[str, str]:
    """Return the shipped recipes for models of ``kind``, llm or vision: name to one line about it."""
    folder = files("qtoolkit.calibration") / "recipes"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            data = yaml.safe_load(entry.read_text("utf-8"))
            if data.get("kind", "llm") == kind:
                found[entry.name.removesuffix(".yaml")] = str(data.get("about", ""))
    return found


def load(
    name_or_path: str | Path,
    changes: Mapping[str, Any] | None = None,
    model: type[R] = Recipe,  # type: ignore[assignment]  # the default is the bound
) -> R:
    """Read a preset or a recipe file and apply ``changes`` on dotted keys, such as ``{"gptq.damping": 0.02}``.

    A change's first word is a part of the recipe (``scheme``, ``calibration``) or a step. ``model`` is the recipe
    class of the model's kind.

    Raises:
        RequestError: no such preset or file, a file that is not YAML, an unknown key or a wrong value.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise RequestError(f"There is no recipe file {path}.", "`qtoolkit list recipes` shows the shipped ones.")
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"The recipe {path} cannot be read: {said(error)}.") from None
    else:
        known = {**presets(), **presets("vision")}
        if str(name_or_path) not in known:
            raise RequestError(f"There is no recipe named {str(name_or_path)!r}.", suggest(str(name_or_path), known))
        text = (files("qtoolkit.calibration") / "recipes" / f"{name_or_path}.yaml").read_text("utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"The recipe {name_or_path} is not valid YAML: {said(error)}.") from None
    if not isinstance(data, dict):
        raise RequestError(f"The recipe {name_or_path} holds no mapping of keys to values.")
    found, wanted = data.get("kind", "llm"), "vision" if "kind" in model.model_fields else "llm"
    if found != wanted:
        takers = {"vision": "`qtoolkit compress` takes it.", "llm": "`qtoolkit quantize` takes it."}
        hint = takers.get(str(found), "Kinds are llm and vision.")
        raise RequestError(f"The recipe {name_or_path} is for {found} models, not for {wanted} models.", hint)
    for key, value in (changes or {}).items():
        _change(data, key, value)
    return validate(data, model)


def validate(data: Mapping[str, Any], model: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """Return the recipe that ``data`` describes.

    Raises:
        RequestError: an unknown key (with the nearest known one) or a wrong value, named by its dotted place.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error, model, "recipe") from None


def explain(error: ValidationError, model: type[BaseModel], what: str) -> RequestError:
    """Turn one of pydantic's complaints, an unknown key before all, into a sentence with place, value and hint."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    place = [part for part in map(str, first["loc"]) if part not in ALTERNATIVES and not part.startswith("literal[")]
    if first["type"] == "missing":
        return RequestError(f"The {what} has no {'.'.join(place)!r}.")
    if first["type"] == "extra_forbidden":
        return RequestError(f"Unknown {what} key {'.'.join(place)!r}.", suggest(place[-1], _fields(model, place[:-1])))
    message = first["msg"].removeprefix("Value error, ")
    return RequestError(f"Wrong {what} value at {'.'.join(place)}: {first.get('input')!r} ({message}).")


def parse_set(settings: Sequence[str]) -> dict[str, Any]:
    """Read ``step.key=value`` words; values are YAML scalars.

    Raises:
        RequestError: a word without ``=`` or without a dot before it.
    """
    changes = {}
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals or "." not in key:
            raise RequestError(f"--set {word} is not of the form step.key=value.", "Example: --set gptq.damping=0.02")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RequestError(f"--set {word}: {value!r} is no value.", "Example: --set gptq.damping=0.02") from None
    return changes


def _change(data: dict[str, Any], key: str, value: Any) -> None:
    first, _, rest = key.partition(".")
    parts = {name for name, info in Recipe.model_fields.items() if _is_model(info.annotation)}
    if first in parts:
        data[first] = _with(data.get(first), rest, value, first)
        return
    steps = data.setdefault("steps", {})
    if not isinstance(steps, dict) or first not in steps:
        raise RequestError(f"The recipe has no step {first!r} to set {rest!r} in.", suggest(first, {*parts, *steps}))
    steps[first] = _with(steps[first], rest, value, f"steps.{first}")


def _with(part: Any, key: str, value: Any, place: str) -> dict[str, Any]:
    if part is not None and not isinstance(part, dict):
        raise RequestError(f"Wrong recipe value at {place}: {part!r} is no mapping of keys to values.")
    return {**(part or {}), key: value}


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _fields(model: type[BaseModel], place: Sequence[str]) -> set[str]:
    for part in place:
        info = model.model_fields.get(part)
        inner = [a for a in (info.annotation, *get_args(info.annotation)) if _is_model(a)] if info else []
        if not inner:
            break
        model = inner[0]
    return set(model.model_fields)
