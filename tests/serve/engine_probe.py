"""A vLLM engine inside one process, which starts far quicker than a server: prompts in, log-probabilities out.

Called by test_vllm_engines.py as a script: one JSON object on stdin, one as the last line of stdout.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Read {"model", "prompts", "length", "options"} and print {"logprobs", "texts", "recorded"}, see below.

    "length" is how many tokens each answer has, or a list of it.
    """
    order: dict[str, Any] = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    engine = LLM(order["model"], max_model_len=512, **order["options"])
    lengths = order["length"] if isinstance(order["length"], list) else [order["length"]] * len(order["prompts"])
    asked = [SamplingParams(temperature=0, max_tokens=n, prompt_logprobs=0, ignore_eos=True) for n in lengths]
    answers = engine.generate([{"prompt_token_ids": ids} for ids in order["prompts"]], asked, use_tqdm=False)
    logprobs = [
        [seen[token].logprob for seen, token in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)]
        for answer, ids in zip(answers, order["prompts"], strict=True)
    ]
    texts = [list(answer.outputs[0].token_ids) for answer in answers]
    print(json.dumps({"logprobs": logprobs, "texts": texts, "recorded": recorded()}))


def recorded() -> int:
    """Return how many numbers of tokens have calls that the plugin repeats."""
    from torch._inductor.output_code import CompiledFxGraph

    graphs = getattr(CompiledFxGraph.__call__, "repeats_steps", None)
    return sum(len(graph.steps) for graph in graphs.graphs.values()) if graphs else 0


if __name__ == "__main__":
    main()
