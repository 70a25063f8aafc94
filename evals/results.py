"""What an evaluation found, as documented types: the JSON that ``qtoolkit eval`` prints and the report reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qtoolkit.checkpoint import Manifest
from qtoolkit.errors import DataError
from qtoolkit.evals.divergence import Divergence
from qtoolkit.evals.latency import Latency
from qtoolkit.evals.perplexity import Perplexity

SCHEMA_VERSION = 1


class Data(BaseModel):
    """Base of the result types: unknown keys are an error."""

    model_config = ConfigDict(extra="forbid")


class TaskScore(Data):
    """How a model did on one lm-eval task.

    Attributes:
        metrics: metric name -> value, such as ``acc`` -> 0.61.
        stderr: metric name -> standard error over the documents, where lm-eval gives one.
        primary: the metric a gate and the plots look at.
        higher_is_better: of the primary metric.
        documents: how many documents were scored.
        available: how many the task has.
        chance: what guessing scores in the primary metric, where known.
        each: the primary metric document by document; not written out.
    """

    metrics: dict[str, float]
    stderr: dict[str, float]
    primary: str
    higher_is_better: bool
    documents: int
    available: int
    chance: float | None = None
    each: list[float] = Field(default=[], exclude=True, repr=False)

    @property
    def value(self) -> float:
        """Return the primary metric."""
        return self.metrics[self.primary]


class Change(Data):
    """A difference between two models on the same items, with the standard error of the paired difference."""

    value: float
    stderr: float | None


class Scores(Data):
    """What one model scored.

    Attributes:
        name: the model as it was named.
        scheme: such as ``W4A8-g128``; None for a float model.
        dtype: of activations and float weights.
        weight_bytes: size of its weight files.
        perplexity: text name -> figures.
        tasks: task name -> figures.
        latency: of one small generation, if asked for.
    """

    name: str
    scheme: str | None
    dtype: str
    weight_bytes: int
    perplexity: dict[str, Perplexity] = {}
    tasks: dict[str, TaskScore] = {}
    latency: Latency | None = None


class Served(Data):
    """The same model behind a running server.

    Attributes:
        url: the server's address.
        model: the name it serves the model by.
        perplexity: text name -> figures, from the server's own log probabilities.
        gap: text name -> served token perplexity over our runtime's, minus 1.
    """

    url: str
    model: str
    perplexity: dict[str, Perplexity]
    gap: dict[str, float]


class Machine(Data):
    """Where it was measured."""

    processor: str
    cores: int
    device: str


class EvalResult(Scores):
    """Everything one evaluation found: the model's own scores, the reference's, and the differences.

    Attributes:
        ok: the evaluation ran to its end; gates are not part of it.
        kl: mean KL(reference || model) in nats per token on the first text; None without a reference.
        divergence: ``kl`` in detail, with its noise floor.
        reference: the reference's scores.
        reference_is_source: the reference is the model that the checkpoint was made from, by their digests.
        ppl_change: text name -> relative change of token perplexity, model over reference minus 1.
        task_change: task name -> model minus reference in the primary metric.
        served: the same model behind a server, if one was given.
        limit: documents per task that were asked for; None for all.
        backend: what ran the tasks: hf, vllm or endpoint.
        manifest: the checkpoint's qtoolkit.json; None for a float model.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["llm"] = "llm"
    ok: bool = True
    kl: float | None = None
    divergence: Divergence | None = None
    reference: Scores | None = None
    reference_is_source: bool | None = None
    ppl_change: dict[str, Change] = {}
    task_change: dict[str, Change] = {}
    served: Served | None = None
    limit: int | None = None
    backend: str = "hf"
    seconds: float
    date: str
    versions: dict[str, str]
    machine: Machine
    manifest: Manifest | None = None


def read_result(path: str | Path) -> EvalResult:
    """Read a report's JSON back.

    Raises:
        DataError: the file is not such a JSON, or of another schema.
    """
    try:
        return EvalResult.model_validate_json(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise DataError(
            f"{path} is not a report of this qtoolkit: {reason}.", "`qtoolkit eval -o` writes one."
        ) from None
