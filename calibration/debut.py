"""Deformable butterflies: every target becomes a product of sparse factors, fitted to its weight without any data."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from qtoolkit.calibration import als, chains
from qtoolkit.calibration.options import Options
from qtoolkit.errors import RequestError
from qtoolkit.stages import Block, Stream
from qtoolkit.vision import butterfly
from qtoolkit.vision.butterfly import Chain
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.layers import Butterfly
from qtoolkit.vision.matrix import Geometry, Layer, to_matrix


class DebutOptions(Options):
    """Options of the step ``debut``."""

    chains: Literal["published", "search"] = Field("published", description="published: where there is one")
    compression: float = Field(0.8, gt=0, lt=1, description="least part of its numbers that a searched chain saves")
    factors: int = Field(6, ge=1, le=10, description="of a searched chain, at most")
    sweeps: int = Field(5, ge=0, description="of alternating least squares; 0 starts from random factors")


class Debut:
    """The transform: replaces every target for which there is a chain by a ``Butterfly`` layer."""

    Options = DebutOptions

    def __init__(self, options: DebutOptions) -> None:
        self.options = options

    @torch.no_grad()
    def apply(self, block: Block, stream: Stream, context: VisionContext) -> dict[str, dict[str, float]]:
        """Replace in place; return each target's compression and relative error |F - product| / |F|.

        Raises:
            RequestError: no target has a chain.
        """
        report = {}
        for name in block.targets:
            if name in block.refused:
                continue
            like: Layer = block.layer(name)  # type: ignore[assignment]
            geometry = Geometry.of(like)
            chain = self._chain(geometry.n, geometry.k)
            if chain is None:
                block.refused[name] = f"no chain of {geometry.n} x {geometry.k} saves {self.options.compression:.0%}"
                continue
            matrix, generator = to_matrix(like.weight.detach()), context.generator()
            if self.options.sweeps:
                flat = als.fit(matrix, chain, self.options.sweeps, generator)
            else:
                flat = torch.randn(butterfly.nonzeros(chain), generator=generator) * butterfly.initial_scale(chain)
            flat = balanced(flat, chain)
            report[name] = {
                "compression": butterfly.layer_compression(chain),
                "error": als.relative_error(matrix, chain, flat),
                "nonzeros": float(butterfly.nonzeros(chain)),
            }
            block.module.set_submodule(name, Butterfly(chain, flat, like))
            context.say(f"{name}: {butterfly.text(chain)}, {report[name]['compression']:.2%} saved")
        if not report:
            raise RequestError("No layer of this network has a butterfly chain.", "Lower debut.compression.")
        return report

    def _chain(self, n: int, k: int) -> Chain | None:
        found = chains.published(n, k) if self.options.chains == "published" else None
        return found or chains.search(n, k, self.options.compression, self.options.factors)


def balanced(flat: torch.Tensor, chain: Chain) -> torch.Tensor:
    """Return the same product with factors of equal norm per number: training with one rate suits all of them."""
    values = butterfly.split(flat, chain)
    norms = torch.stack([value.norm() / value.numel() ** 0.5 for value in values]).clamp_min(1e-12)
    middle = norms.log().mean().exp()
    return torch.cat([(value * (middle / norm)).flatten() for value, norm in zip(values, norms, strict=True)])
