"""int4 in the layout of GPTQ files: eight inputs of a column a word, low nibble first, +8; scales group by group.

Sources: AutoGPTQ and GPTQModel (``checkpoint_format: gptq``); vLLM's and transformers' loaders read the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtoolkit.errors import CheckpointError, RequestError
from qtoolkit.packing.int4 import pack_int4, unpack_int4
from qtoolkit.scheme import CHANNEL, Scheme
from qtoolkit.stages import QuantizedWeight

WORD = 8  # codes an int32
ZEROS = 0x77777777  # eight zero points of 8, each stored minus 1


class GPTQPacker:
    """``qweight`` int32 [k/8, n], ``qzeros`` int32 [groups, n/8], ``scales`` [groups, n], ``g_idx`` int32 [k]."""

    name = "gptq"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def refuse(self, n: int, k: int, scheme: Scheme) -> str | None:
        """Return why a layer cannot be stored, or None."""
        if scheme.weight_bits != 4:
            return f"{scheme.name} has {scheme.weight_bits}-bit weights, and this layout holds four bits"
        if n % WORD or k % WORD:
            return f"{n} outputs and {k} inputs are not multiples of {WORD}"
        if scheme.group_size != CHANNEL and k % scheme.group_size:
            return f"{k} inputs are not a multiple of the group size {scheme.group_size}"
        return None

    def shapes(self, n: int, k: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of a layer."""
        groups = scheme.groups(k)
        return {"qweight": (k // WORD, n), "qzeros": (groups, n // WORD), "scales": (groups, n), "g_idx": (k,)}

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the tensors of the layout; the groups are in the order of the inputs."""
        (n, k), groups = weight.codes.shape, weight.scales.shape[1]
        return {
            "qweight": pack_int4(weight.codes).t().contiguous(),
            "qzeros": torch.full((groups, n // WORD), ZEROS, dtype=torch.int32),
            "scales": weight.scales.t().contiguous(),
            "g_idx": torch.arange(k, dtype=torch.int32) // (k // groups),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return codes and scales; ``g_idx`` may be missing, and may name a group for each run of inputs.

        Raises:
            CheckpointError: shapes or dtypes do not belong together.
            RequestError: zero points that are not 8, or inputs whose groups do not lie side by side.
        """
        qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
        k, n = qweight.shape[0] * WORD, qweight.shape[-1]
        order = tensors.get("g_idx")
        fits = qweight.dim() == scales.dim() == 2 and scales.shape[1] == n and scales.shape[0] > 0
        fits = fits and qweight.dtype == qzeros.dtype == torch.int32 and scales.is_floating_point()
        fits = fits and k % scales.shape[0] == 0 and qzeros.shape == (scales.shape[0], n // WORD)
        if not fits or (order is not None and order.shape != (k,)):
            found = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise CheckpointError(
                f"The tensors of a GPTQ layer do not belong together: {found}.",
                "The checkpoint is damaged or has another number of bits.",
            )
        if not bool((qzeros == ZEROS).all()):
            raise RequestError(
                "A GPTQ layer has zero points, and W4A8 weights are symmetric.", "Quantize with sym=True."
            )
        if order is not None:
            scales = scales[_group_of_each_run(order, scales.shape[0])]
        return QuantizedWeight(unpack_int4(qweight.t(), k), scales.t().contiguous())


def _group_of_each_run(order: Tensor, groups: int) -> Tensor:
    """Return which group each run of k / groups inputs belongs to, int64 [groups]."""
    runs = order.long().view(groups, -1)
    if bool((runs != runs[:, :1]).any()) or int(runs.min()) < 0 or int(runs.max()) >= groups:
        raise RequestError(
            "A GPTQ layer has its inputs in the order of their activations (desc_act), so that those of a group do not "
            "lie side by side.",
            "Quantize with desc_act=False, or with static groups.",
        )
    return runs[:, 0]


PACKER = GPTQPacker()
