"""Keeps graphs that vLLM compiled with our operators apart from those without, and from other versions' graphs.

vLLM names a compiled graph on disk by its own settings and the model's; what the plugin puts into a graph is not among
them, so a graph with our operators would serve a run without the plugin's kernels, too.
"""

from __future__ import annotations

from functools import wraps

from vllm.compilation import caching
from vllm.config import VllmConfig

from qtoolkit import __version__
from qtoolkit.serve.intent import mode


def name_graphs() -> None:
    """Add our version and mode to what names a graph, once, where vLLM has such names."""
    factors = getattr(caching, "aot_compile_hash_factors", None)
    if factors is None or getattr(factors, "names_qtoolkit", False):
        return

    @wraps(factors)
    def with_ours(vllm_config: VllmConfig) -> list[str]:
        return [*factors(vllm_config), f"qtoolkit {__version__} {mode().value}"]

    with_ours.names_qtoolkit = True  # type: ignore[attr-defined]
    caching.aot_compile_hash_factors = with_ours
