"""Attention over vLLM's paged cache, in bfloat16 on CPUs that multiply it."""
