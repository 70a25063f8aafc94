"""What was lost and what was won: perplexity, divergence, tasks, latency, and the report."""
