"""What a compressed vision layer looks like, as validated data: which weights are zero, binary or a product."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, field_validator

NM = re.compile(r"(\d+):(\d+)")
BLOCK = re.compile(r"1x(\d+)")
NAMED = ("filter", "binary", "debut")


class Pattern(BaseModel):
    """The counterpart of an LLM's integer scheme.

    ``2:4`` and the like: that many nonzeros in every block of consecutive inputs. ``1x16`` and the like: whole
    columns of that many outputs are kept or zero. ``filter``: whole output channels are zero. ``binary``: +-1 times
    a scale. ``debut``: a product of sparse factors (deformable butterfly).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str
    rate: float = Field(0.0, ge=0, lt=1, description="part of the filters or 1xN blocks that is removed")

    @field_validator("pattern")
    @classmethod
    def _check(cls, value: str) -> str:
        nm, block = NM.fullmatch(value), BLOCK.fullmatch(value)
        if nm and 0 < int(nm[1]) < int(nm[2]) <= 256:
            return value
        if (block and 1 < int(block[1]) <= 64) or value in NAMED:
            return value
        raise ValueError(f"a pattern is N:M with N < M <= 256, 1xN with 2 <= N <= 64, or {', '.join(NAMED)}")

    @property
    def kind(self) -> str:
        """Return the packer's name: nm, block, filter, binary or debut."""
        return "nm" if ":" in self.pattern else "block" if self.pattern.startswith("1x") else self.pattern

    @property
    def nm(self) -> tuple[int, int]:
        """Return N and M of an N:M pattern."""
        kept, size = self.pattern.split(":")
        return int(kept), int(size)

    @property
    def rows(self) -> int:
        """Return N of a 1xN pattern."""
        return int(self.pattern[2:])

    @property
    def name(self) -> str:
        """Return the name in reports, such as ``2:4`` or ``filter-30%``."""
        return f"{self.pattern}-{self.rate:.0%}" if self.rate else self.pattern
