"""A vision run on paper: its recipe before, its manifest after; both differ from an LLM's in the scheme alone."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from qtoolkit.checkpoint import Manifest
from qtoolkit.recipe import Budget, Outliers, Recipe
from qtoolkit.stages import ChannelGroup
from qtoolkit.vision.pattern import Pattern


class ImageCalibration(BaseModel):
    """Which images are used, and how many of them for statistics; training uses all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field("digits-train", description=".npz file, folder with one subfolder a class, hub data set, digits")
    samples: int = Field(512, ge=1, description="calibration images")
    select: str = Field("first", description="which of the data they are: first, random, kcore")
    seed: int = Field(0, ge=0, lt=2**32)


class VisionRecipe(Recipe):
    """A recipe whose layers get a ``Pattern`` and whose calibration data are images."""

    kind: Literal["vision"]
    scheme: Pattern  # type: ignore[assignment]
    calibration: ImageCalibration = ImageCalibration()  # type: ignore[assignment]
    packer: Literal["pattern"] = Field("pattern", description="the pattern has just one packer")
    keep: tuple[str, ...] = Field((), description="layers that stay in float, besides the architecture's own")

    @field_validator("outliers", "budget")
    @classmethod
    def _leave_out(cls, value: Outliers | Budget) -> Outliers | Budget:
        if value != type(value)():
            raise ValueError("it is for language models")
        return value


class VisionManifest(Manifest):
    """The manifest of a compressed image classifier.

    ``figures`` holds, before and after: ``accuracy`` on the test images, ``parameters`` and ``multiply_adds`` of one
    image; how many ``test_images`` there were; and ``packing_error``, the largest difference of logits between the
    network that was packed and the one built from the packed tensors, as a part of the largest logit.
    """

    kind: Literal["vision"]
    scheme: Pattern  # type: ignore[assignment]
    architecture: str
    calibration_tokens: int = Field(description="here: images")
    figures: dict[str, float] = Field(default_factory=dict)
    dropped: tuple[str, ...] = Field((), description="blocks that were left out")
    channel_groups: tuple[ChannelGroup, ...] = Field((), description="traced groups, by which channels were removed")
