"""Asks a running endpoint one completion and one streamed chat: python scripts/ask.py URL MODEL."""

from __future__ import annotations

import sys

from openai import OpenAI


def main(url: str, model: str) -> None:
    """Print what the model answers, through the real OpenAI client."""
    client = OpenAI(base_url=f"{url.removesuffix('/v1')}/v1", api_key="none")
    prompt = "The history of the city begins"
    done = client.completions.create(model=model, prompt=prompt, max_tokens=40, temperature=0.7, seed=1)
    print(f"completion   {prompt}{done.choices[0].text}")
    question = "Tell me about the river."
    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=60,
        temperature=0.7,
        seed=1,
        stream=True,
    )
    print(f"chat         {question}\nanswer       ", end="", flush=True)
    for part in chat:
        print(part.choices[0].delta.content or "" if part.choices else "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:3])
