"""Everything that answers requests: the vLLM plugin and the launchers."""
