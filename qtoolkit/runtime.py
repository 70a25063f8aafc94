"""Running a packed checkpoint in transformers: the W4A8 linear layer, and ``load``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qtoolkit import checkpoint
from qtoolkit.errors import CheckpointError, RequestError
from qtoolkit.int8 import W8A8Linear
from qtoolkit.kernels import chained, ops, selection
from qtoolkit.lightly import load_transformers
from qtoolkit.packing.int4 import pack_int4
from qtoolkit.scheme import CHANNEL, Head, Scheme
from qtoolkit.source import Source, resolve
from qtoolkit.stages import QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class W4A8Linear(nn.Module):
    """A linear layer with int4 weights that quantizes its input to int8 per token: ``qtoolkit::w4a8_linear``.

    The weight is brought into the layout of the chosen backend when the layer is made.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        k: int,
        scheme: Scheme,
        dtype: torch.dtype,
        grid: selection.Grid = selection.Grid.PLAIN,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = k, packed.shape[0], scheme.group_size
        problem = selection.Problem(k, self.out_features, scheme.group_size, dtype, packed.device.type, grid)
        prepared = selection.prepare(packed, scales, problem)
        self.layout, self.backend = prepared.layout, prepared.backend
        self.register_buffer("weight", prepared.weight)
        self.register_buffer("scales", prepared.scales)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., n] in the dtype of x [..., k]."""
        return ops.w4a8_linear(x, self.weight, self.scales, self.bias, self.out_features, self.group_size, self.layout)

    def extra_repr(self) -> str:
        """Return what a printed model shows."""
        group = "channel" if self.group_size == CHANNEL else self.group_size
        return f"in={self.in_features}, out={self.out_features}, group={group}, backend={self.backend}"


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    activations: bool = True,
    lm_head: Head | str = Head.FLOAT,
) -> PreTrainedModel:
    """Load a packed checkpoint, or a float model, as a transformers model that is ready to generate.

    Args:
        path: checkpoint folder; or a float model's folder, hub name, or ``tiny``.
        device: torch device.
        dtype: of activations and float weights; the checkpoint's own when None.
        activations: False gives the float simulation of the weights: dequantized, activations stay in float.
        lm_head: what the output layer runs as: "float" as stored, "int8", or "int4".

    Raises:
        RequestError: no such folder or model, or the output layer cannot run so here.
        CheckpointError: the checkpoint is damaged or of a newer schema.
        ModelError: a float model that cannot be read.
    """
    if lm_head not in list(Head):
        raise RequestError(
            f"lm_head={lm_head!r} is not known.", f"Use one of: {', '.join(word.value for word in Head)}."
        )
    source = resolve(path)
    if not (source.path / checkpoint.MANIFEST).is_file():
        model = _load_float(source, device, dtype)
    else:
        model = _load_packed(source, device, dtype, activations)
    quantize_head(model, Head(lm_head))
    return model


@torch.inference_mode()
def quantize_head(model: PreTrainedModel, kind: Head) -> None:
    """Let the output layer of ``model`` run with integer weights; tied embeddings keep theirs.

    Raises:
        RequestError: no kernel runs that layer so here.
    """
    from qtoolkit import head

    if kind is Head.FLOAT:
        return
    layer: Any = model.get_output_embeddings()
    weight = layer.weight.detach()
    n, k = weight.shape
    reason = head.refuse(n, k, kind, weight.dtype, weight.device.type)
    if reason is not None:
        raise RequestError(f"The output layer cannot run in {kind.value}: {reason}.", "Leave it in float.")
    made: Any = head.HeadLayer(head.quantize(weight, kind, weight.dtype), layer.bias)
    model.set_output_embeddings(made)


def _load_float(source: Source, device: str, dtype: torch.dtype | None) -> PreTrainedModel:
    from qtoolkit import architecture

    architecture.skeleton(source)  # says in one sentence what is wrong, before transformers says it in fifty lines
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype or architecture.stored_dtype(source))
    return model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps nn.Module.to in a decorator


@torch.inference_mode()
def _load_packed(source: Source, device: str, dtype: torch.dtype | None, activations: bool) -> PreTrainedModel:
    load_transformers()
    from transformers import AutoConfig

    from qtoolkit import architecture

    manifest = checkpoint.verify(source.path)
    if manifest.kind != "llm":
        raise CheckpointError(f"{source.name} holds a {manifest.kind} model, not a language model.")
    config = AutoConfig.from_pretrained(source.path)
    del config.quantization_config  # transformers must build plain linear layers; ours replace them below
    dtype = dtype or architecture.stored_dtype(source)
    known = architecture.of(config.model_type)
    model = architecture.build(config, known, dtype=dtype)
    quantized = {layer.name for layer in manifest.layers}
    for record in manifest.layers:
        layer = manifest.packed(record)
        name, scheme, tensors = layer.name, layer.scheme, layer.tensors(source)
        weight = layer.unpack(tensors)
        bias = source.read(f"{name}.bias").to(dtype) if f"{name}.bias" in source.files else None
        made = _packed_layer(tensors, weight, bias, scheme, dtype, device) if activations else None
        model.set_submodule(known.loaded(name), made or _float_layer(weight, bias, dtype, device))
    floats = {known.loaded(name): name for name in source.files if name.rpartition(".")[0] not in quantized}
    _fill(model, source, dtype, device, floats)
    return model.eval().requires_grad_(False)


def _packed_layer(
    tensors: Mapping[str, Tensor],
    weight: QuantizedWeight,
    bias: Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
    device: str,
) -> nn.Module:
    bias = bias.to(device) if bias is not None else None
    if scheme.weight_bits == 8:
        integers, scales = weight.codes.to(device), weight.scales.to(device)
        return _chained_layer(integers, scales, bias, dtype) or W8A8Linear(integers, scales, bias)
    packed = tensors["weight_packed"] if "weight_packed" in tensors else pack_int4(weight.codes)
    scales = weight.scales.to(device)
    return W4A8Linear(packed.to(device), scales, bias, weight.codes.shape[1], scheme, dtype)


def _chained_layer(integers: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module | None:
    """Return what runs int8 weights of the chained grid from four bits, or None: other weights, or no kernel here."""
    n, k = integers.shape
    problem = selection.Problem(k, n, CHANNEL, dtype, integers.device.type, selection.Grid.CHAINED)
    if selection.choose(problem).backend.name == "reference":
        return None
    codes = chained.codes_of(integers)
    if codes is None:
        return None
    steps = scales.float() * chained.STEP
    return W4A8Linear(pack_int4(codes), steps, bias, k, Scheme(group_size=CHANNEL), dtype, selection.Grid.CHAINED)


def _float_layer(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, device: str) -> nn.Module:
    n, k = weight.codes.shape
    layer = nn.Linear(k, n, bias=bias is not None, device="meta", dtype=dtype)
    state: dict[str, Any] = {"weight": weight.dequantize().to(device, dtype)}
    if bias is not None:
        state["bias"] = bias.to(device)
    layer.load_state_dict(state, assign=True)
    return layer


def _fill(model: PreTrainedModel, source: Source, dtype: torch.dtype, device: str, floats: Mapping[str, str]) -> None:
    """Load what is not packed, ``floats`` by the model's names to the stored; what nobody stores is computed."""
    state = {name: source.read(stored).to(device, dtype) for name, stored in floats.items()}
    missing = {name for name, parameter in model.named_parameters() if parameter.is_meta} - state.keys()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if model.config.tie_word_embeddings else set()
    if missing - tied:
        raise CheckpointError(f"{source.name} has no tensor {sorted(missing - tied)[0]}.", "Quantize again.")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.to(device)  # type: ignore[arg-type]  # the buffers; transformers wraps nn.Module.to in a decorator
