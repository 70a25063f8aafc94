"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in each of its processes before it loads a model."""

from __future__ import annotations

from qtoolkit.serve.intent import Mode, Steps, attention, head, mode, steps


def register() -> None:
    """Put our kernel ahead of vLLM's for W4A8 layers, bring ``quant_method: qqq`` back, offer an integer
    output layer and our attention, and report after loading.

    Light and safe to call twice: it adds rows to vLLM's tables and touches no device.

    Raises:
        RequestError: the environment asks for something unknown.
    """
    head()
    attention()
    steps()
    from vllm.platforms import current_platform

    from qtoolkit.serve.process import die_with_engine
    from qtoolkit.serve.vllm_attention import register_attention
    from qtoolkit.serve.vllm_experts import register_experts
    from qtoolkit.serve.vllm_gate import register_gate
    from qtoolkit.serve.vllm_graphs import name_graphs
    from qtoolkit.serve.vllm_head import register_head
    from qtoolkit.serve.vllm_int8 import register_int8
    from qtoolkit.serve.vllm_kernel import place_first
    from qtoolkit.serve.vllm_qqq import register_qqq
    from qtoolkit.serve.vllm_report import report_after_loading

    die_with_engine()
    place_first()
    register_qqq()
    if mode() is not Mode.OFF:  # then nothing but vLLM's own code runs
        name_graphs()
        register_head()
        register_gate()
        register_experts()
        register_int8()
        register_attention()
        if steps() is Steps.REPEATED and current_platform.is_cpu():
            from qtoolkit.serve.vllm_repeat import repeat_steps  # names much of torch and vLLM: only where it is wanted

            repeat_steps()
    report_after_loading()
