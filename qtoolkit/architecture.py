"""What qtoolkit knows of a family of models: one YAML file each, and the empty module tree built from a config."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from torch.overrides import TorchFunctionMode

from qtoolkit.device import CPU
from qtoolkit.errors import ModelError
from qtoolkit.experts import ExpertLayers, unfuse
from qtoolkit.lightly import load_transformers
from qtoolkit.recipe import explain
from qtoolkit.registry import suggest
from qtoolkit.source import Source
from qtoolkit.stages import Block, ChannelGroup

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DRAWN = frozenset(
    {"normal_", "exponential_", "erfinv_", "clamp_"}
)  # what initial weights are drawn with, less uniform_


class Residual(BaseModel):
    """Who touches the hidden stream that runs through all blocks, and nothing else does.

    Attributes:
        embedding: module of the language model that starts it, one row a token.
        norm: module of the language model through which the head reads it.
        head: module of the language model that turns it into logits.
        norms: in a block, the norms that read it; the consumers of a group that one of them produces see it through
            them. Only norms that keep an orthogonal turn (root mean square, gain, no bias) may stand here.
        writers: in a block, the linear layers whose outputs are added to it, each in its norm's place.
        weighted: in a block, those whose outputs are weighted first, token by token, such as experts'.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    embedding: str
    norm: str
    head: str
    norms: tuple[str, ...]
    writers: tuple[str, ...]
    weighted: tuple[str, ...] = ()


class Architecture(BaseModel):
    """One file of ``architectures/``: names relative to the language model (model, blocks) or to a block (the rest).

    A ``*`` stands for every number, and what a block does not have does not count there: blocks may differ. A group
    with a ``*`` in its name is one group for each number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_types: tuple[str, ...]
    model: str
    blocks: str
    targets: tuple[str, ...]
    residual: Residual
    groups: tuple[ChannelGroup, ...]
    experts: ExpertLayers | None = None
    renamed: Mapping[str, str] = {}  # part of a module's name to what stands in its place in stored names

    def stored(self, name: str) -> str:
        """Return what the tensor or module ``name`` of the model is called in its files."""
        for module, stored in self.renamed.items():
            name = name.replace(module, stored)
        return name

    def loaded(self, name: str) -> str:
        """Return what a tensor or module is called in the model whose files call it ``name``."""
        for module, stored in self.renamed.items():
            name = name.replace(stored, module)
        return name

    def within(self, block: nn.Module) -> Layout:
        """Return what ``block`` has of the names that the file lists."""
        has = dict(block.named_modules())

        def found(patterns: tuple[str, ...], number: str = "*") -> tuple[str, ...]:
            names = (_matching(pattern.replace("*", number), has) for pattern in patterns)
            return tuple(name for some in names for name in some)

        groups = []
        for group in self.groups:
            for number in _numbers(group.consumers[0], has) if "*" in group.name else ["*"]:
                producers, consumers = found(group.producers, number), found(group.consumers, number)
                if producers and consumers:
                    name, floats = group.name.replace("*", number), found(group.floats, number)
                    groups.append(replace(group, name=name, producers=producers, consumers=consumers, floats=floats))
        writers = zip(self.residual.writers, self.residual.norms, strict=False)  # behind a norm all may be weighted
        return Layout(
            targets=found(self.targets),
            groups=tuple(groups),
            residual={writer: norm for writer, norm in writers if writer in has},
            experts=self.experts.module if self.experts and self.experts.module in has else "",
        )


@dataclass(frozen=True)
class Layout:
    """What one block has: see ``Block`` for the attributes."""

    targets: tuple[str, ...]
    groups: tuple[ChannelGroup, ...]
    residual: dict[str, str]
    experts: str

    @property
    def floats(self) -> tuple[str, ...]:
        """Return the layers that are never quantized, such as routers."""
        return tuple(dict.fromkeys(name for group in self.groups for name in group.floats))


def _matching(pattern: str, names: Collection[str]) -> list[str]:
    if "*" not in pattern:
        return [pattern] if pattern in names else []
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in names if wanted.fullmatch(name)]


def _numbers(pattern: str, names: Collection[str]) -> list[str]:
    """Return what the ``*`` of ``pattern`` stands for among ``names``."""
    before, _, after = pattern.partition("*")
    return [name.removeprefix(before).removesuffix(after) for name in _matching(pattern, names)]


@cache
def table() -> dict[str, Architecture]:
    """Return the architecture of every known ``model_type``."""
    found: dict[str, Architecture] = {}
    for entry in (files("qtoolkit") / "architectures").iterdir():
        if entry.name.endswith(".yaml"):
            try:
                row = Architecture.model_validate(yaml.safe_load(entry.read_text("utf-8")))
            except ValidationError as error:
                raise explain(error, Architecture, f"architecture file {entry.name}") from None
            found |= dict.fromkeys(row.model_types, row)
    return found


def of(model_type: str) -> Architecture:
    """Return the architecture of a ``model_type``.

    Raises:
        ModelError: nobody has described it yet.
    """
    if model_type not in table():
        raise ModelError(f"The architecture {model_type!r} is not supported.", suggest(model_type, table()))
    return table()[model_type]


@dataclass(frozen=True)
class Skeleton:
    """A language model without weights (on torch's meta device), with its architecture; weights come block by block."""

    model: PreTrainedModel
    config: PreTrainedConfig
    architecture: Architecture
    device: torch.device = CPU  # where blocks are loaded to

    @property
    def decoder(self) -> Any:
        """Return the decoder inside the language model: embeddings, blocks, final norm."""
        return self.model.get_submodule(self.architecture.model)

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the list of blocks."""
        return self.model.get_submodule(self.architecture.blocks)  # type: ignore[return-value]

    @property
    def head_dim(self) -> int:
        """Return the channels of an attention head; they need not be hidden_size / heads."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def longest(self) -> int | None:
        """Return the tokens of the longest text that all blocks attend to alike; None: the config does not say.

        It is the model's context, or a shorter window to which some blocks attend and others do not: calibration gives
        every block what the first one is given.
        """
        context = getattr(self.config, "max_position_embeddings", None)
        window = getattr(self.config, "sliding_window", None)
        mixed = len({*(getattr(self.config, "layer_types", None) or ())}) > 1
        return min(filter(None, (context, window if mixed else None)), default=None)

    @property
    def tied(self) -> bool:
        """Tell whether the head and the embedding are one tensor."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def block(self, index: int, source: Source) -> Block:
        """Load block ``index`` in float32 from ``source``; the skeleton's own block stays empty.

        Raises:
            ModelError: a tensor is missing.
            NumericError: a weight holds NaN or Inf.
        """
        name = f"{self.architecture.blocks}.{index}"
        empty = self.blocks[index]
        module = copy.deepcopy(empty)
        stored = self.architecture.stored
        state = {local: source.read_finite(stored(f"{name}.{local}")) for local in empty.state_dict()}
        module.load_state_dict(state, strict=True, assign=True)
        module.to(self.device, torch.float32).eval().requires_grad_(False)
        return self.described(index, module)

    def described(self, index: int, module: nn.Module | None = None) -> Block:
        """Return block ``index`` with a ``module`` that has weights, or without any."""
        module = self.blocks[index] if module is None else module
        heads, kv_heads = self.config.num_attention_heads, getattr(self.config, "num_key_value_heads", None)
        layout = self.architecture.within(module)
        return Block(
            name=f"{self.architecture.blocks}.{index}",
            module=module,
            targets=layout.targets,
            groups=layout.groups,
            residual=layout.residual,
            kv_repeats=heads // (kv_heads or heads),
            head_dim=self.head_dim,
            experts=layout.experts,
        )


def skeleton(source: Source) -> Skeleton:
    """Build the empty model that ``source`` describes and compare every stored shape with it.

    Raises:
        ModelError: unsupported architecture, a config that does not build, missing or mismatching tensors.
    """
    load_transformers()
    from transformers import AutoConfig

    model_type = str(source.config.get("model_type", ""))
    architecture = of(model_type)
    if "quantization_config" in source.config:
        method = source.config["quantization_config"].get("quant_method", "unknown")
        hint = "Give the float model; `qtoolkit convert` takes this one."
        raise ModelError(f"{source.name} is already quantized ({method}).", hint)
    try:
        config = AutoConfig.from_pretrained(source.path)
        model = build(config, architecture, dtype=torch.float32, attn_implementation="sdpa")
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise ModelError(f"{source.name}: config.json does not describe a model: {_one_line(error)}.") from None
    _check_shapes(model, source, architecture)
    found = Skeleton(model, config, architecture)
    for layer in _unknown(found):
        raise ModelError(f"{source.name} has a linear layer {layer} that its architecture file does not name.")
    return found


def build(config: PreTrainedConfig, architecture: Architecture, **options: Any) -> PreTrainedModel:
    """Return the model of ``config``, parameters on the meta device, experts as layers; ``options``: transformers'."""
    load_transformers()
    from transformers import AutoModelForCausalLM

    with _Weightless():
        model = AutoModelForCausalLM.from_config(config, **options)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):  # gains of norms, which are made of ones
            if not parameter.is_meta:
                module.register_parameter(name, nn.Parameter(parameter.to("meta")))
    if architecture.experts is not None:
        unfuse(model.get_submodule(architecture.blocks), architecture.experts)
    return model


def load(source: Source, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the whole model of ``source`` in ``dtype``, for one who needs all of it at once.

    Raises:
        ModelError: as from ``skeleton``.
        NumericError: a weight holds NaN or Inf.
    """
    found = skeleton(source)
    model = found.model
    if found.architecture.experts is not None:  # as transformers runs them, many at once
        from transformers import AutoModelForCausalLM

        for name in source.files:
            source.read_finite(name)
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype)
    else:
        stored = {name: found.architecture.stored(name) for name in model.state_dict()}
        state = {name: source.read_finite(of).to(dtype) for name, of in stored.items() if of in source.files}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
    return model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]  # transformers wraps nn.Module.to


class _Weightless(TorchFunctionMode):
    """Inside, empty tensors are on the meta device, and nothing draws numbers there; what is computed is computed.

    So rotary tables are there, and PyTorch does not load its compiler to compute without numbers. Of this thread alone.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty:
            return function(*args, **{**kwargs, "device": "meta"})
        tensor = args[0] if args else kwargs.get("tensor")
        if getattr(function, "__name__", "") in DRAWN and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return function(*args, **kwargs)


def _unknown(skeleton: Skeleton) -> Iterator[str]:
    """Yield the linear layers of blocks that would stay in float without anybody's decision."""
    for index, block in enumerate(skeleton.blocks):
        layout = skeleton.architecture.within(block)
        known = {*layout.targets, *layout.floats}
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and name not in known:
                yield f"{skeleton.architecture.blocks}.{index}.{name}"


def stored_dtype(source: Source) -> torch.dtype:
    """Return the dtype in which a checkpoint of this model keeps its floats: the config's, or bfloat16."""
    text: Any = source.config.get("dtype") or source.config.get("torch_dtype") or "bfloat16"
    dtype = getattr(torch, str(text), None)
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.bfloat16


def _check_shapes(model: PreTrainedModel, source: Source, architecture: Architecture) -> None:
    stored = source.shapes()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for module, parameter in model.named_parameters(remove_duplicate=False):
        name = architecture.stored(module)
        if name not in stored:
            if module in tied and model.config.tie_word_embeddings:
                continue
            raise ModelError(f"{source.name} has no tensor {name}.", "The model folder is incomplete.")
        if stored[name] != tuple(parameter.shape):
            raise ModelError(
                f"{source.name}: tensor {name} has shape {list(stored[name])}, config.json asks for "
                f"{list(parameter.shape)}.",
                "Weights and config.json do not belong together.",
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
