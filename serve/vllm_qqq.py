"""``quant_method: qqq`` for vLLM again: original QQQ files load, fused and tensor parallel, and run on our operator.

The weight served is ``code * s_group * s_channel``. The original kernel rounded ``code * s_group`` to int8 first; that
second rounding is left out here, so grouped files come out a little closer to what their quantizer meant.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from qtoolkit.kernels import ops, selection
from qtoolkit.packing import qqq
from qtoolkit.packing.int4 import pack_int4

CODES_PER_WORD = 8


def register_qqq() -> None:
    """Teach vLLM the method name; doing it twice changes nothing."""
    register_quantization_config("qqq")(QQQConfig)


class QQQConfig(QuantizationConfig):
    """``{"quant_method": "qqq", "wbits": 4, "group_size": -1 | 128}``, or GPTQModel's ``bits`` for ``wbits``."""

    def __init__(self, bits: int, group_size: int) -> None:
        super().__init__()
        if bits != 4 or group_size not in (-1, qqq.GROUP):
            raise ValueError(f"QQQ files have 4 bits and group_size -1 or {qqq.GROUP}, not {bits} and {group_size}.")
        self.group_size = group_size
        self.quantized: list[str] | None = None  # names of layers with codes; None: all of them

    def get_name(self) -> str:
        """Return the method's name."""
        return "qqq"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the activation dtypes of our operator; the original kernel knew float16 only."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: backends refuse devices themselves."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return side files that hold the method's settings in early checkpoints."""
        return ["quant_config.json", "quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QQQConfig:
        """Read the settings; group-wise activation order cannot be expressed in the layout and is refused."""
        group_size = cls.get_from_keys(config, ["group_size", "q_group_size"])
        if config.get("desc_act") and group_size != -1 and not config.get("static_groups"):
            raise ValueError("This QQQ file says desc_act with groups, which permutes groups its layout cannot hold.")
        return cls(cls.get_from_keys(config, ["wbits", "bits"]), group_size)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Note which layers have codes: the file has no list of those left in float."""
        names = get_safetensors_params_metadata(model_name, revision=revision)
        self.quantized = [name.removesuffix(".B") for name in names if name.endswith(".B")] or None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow vLLM's renaming of modules."""
        if self.quantized is not None:
            self.quantized = hf_to_vllm_mapper.apply_list(self.quantized)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return our method for linear layers with codes, vLLM's float method for others, None for the rest."""
        if not isinstance(layer, LinearBase):
            return None
        parent, _, name = prefix.rpartition(".")
        shards = [f"{parent}.{shard}" for shard in self.packed_modules_mapping.get(name, [name])]
        if self.quantized is None or all(shard in self.quantized for shard in shards):
            return QQQLinearMethod(self.group_size)
        if any(shard in self.quantized for shard in shards):
            raise ValueError(f"{prefix} fuses layers of which only some are quantized: {', '.join(shards)}.")
        return UnquantizedLinearMethod()


@register_weight_loader_v2_supported_method
class QQQLinearMethod(LinearMethodBase):
    """Loads ``B``, ``s_channel`` and ``s_group``, converts them once, and runs our operator."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self.prepared: selection.Prepared | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters of this rank: B [k/16, 2n], s_channel [1, n], s_group [k/128, n].

        Raises:
            ValueError: a slice of this rank would cut a tile.
        """
        k, n = input_size_per_partition, sum(output_partition_sizes)
        step = qqq.GROUP if self.group_size != -1 else qqq.TILE_K
        if k % step or any(part % qqq.TILE_N for part in output_partition_sizes):
            raise ValueError(
                f"A QQQ layer splits along {step} inputs and {qqq.TILE_N} outputs; this rank would hold {k} inputs and "
                f"{output_partition_sizes} outputs. Use a smaller --tensor-parallel-size."
            )
        self.k, self.n, self.dtype = k, n, params_dtype
        loader = extra_weight_attrs["weight_loader"]
        codes = torch.empty(k // qqq.TILE_K, n * qqq.TILE_K // CODES_PER_WORD, dtype=torch.int32)
        layer.register_parameter(
            "B",
            PackedvLLMParameter(
                data=codes,
                input_dim=0,
                output_dim=1,
                packed_dim=1,
                packed_factor=CODES_PER_WORD,
                marlin_tile_size=qqq.TILE_K,
                weight_loader=loader,
            ),
        )
        s_channel = torch.empty(1, n, dtype=torch.float32)
        layer.register_parameter(
            "s_channel", ChannelQuantScaleParameter(data=s_channel, output_dim=1, weight_loader=loader)
        )
        if self.group_size != -1:
            s_group = torch.empty(k // self.group_size, n, dtype=torch.float16)
            layer.register_parameter(
                "s_group", GroupQuantScaleParameter(data=s_group, input_dim=0, output_dim=1, weight_loader=loader)
            )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Convert to the neutral layout, codes exact, and permute for the chosen backend."""
        tensors = {name: getattr(layer, name).data for name in ("B", "s_channel", "s_group") if hasattr(layer, name)}
        weight = qqq.PACKER.unpack(tensors)
        problem = selection.Problem(self.k, self.n, self.group_size, self.dtype, current_platform.device_type)
        self.prepared = selection.prepare(pack_int4(weight.codes), weight.scales, problem)
        replace_parameter(layer, "B", self.prepared.weight)
        replace_parameter(layer, "s_channel", self.prepared.scales)
        layer.register_parameter("s_group", None)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ w.T + bias``, the activations quantized per token on the way; one opaque operator."""
        assert self.prepared is not None
        weight, scales = cast(Tensor, layer.B), cast(Tensor, layer.s_channel)  # prepared, under their old names
        return ops.w4a8_linear(x, weight, scales, bias, self.n, self.group_size, self.prepared.layout)
