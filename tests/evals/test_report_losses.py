"""The report's section on the parts of the error."""

from __future__ import annotations

from qtoolkit.evals.report import losses
from qtoolkit.evals.results import EvalResult


def test_the_parts_of_the_error_have_their_section(result: EvalResult) -> None:
    assert result.manifest is not None
    assert losses.section(result) is None  # not measured
    figures = {"weight_error": 0.02, "activation_error": 0.001, "both_error": 0.021, "inherited_error": 0.005}
    layers = tuple(
        layer.model_copy(update={"figures": {name: value * (i + 1) for name, value in figures.items()}})
        for i, layer in enumerate(result.manifest.layers)
    )
    measured = result.model_copy(update={"manifest": result.manifest.model_copy(update={"layers": layers})})
    section = losses.section(measured)
    assert section is not None
    assert section.tables[0].rows[0] == ("up_proj", "6.000%", "0.300%", "6.300%", "1.500%")  # mean of 1, 3 and 5 times
    assert len(section.tables[1].rows) == 6
    drawing = section.figures[0].draw()
    assert "down_proj" in drawing
    assert "var(--packed)" in drawing
