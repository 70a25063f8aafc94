"""Models, results and a small scripted server that the evaluation's tests share."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qtoolkit.evals.results import EvalResult

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 40  # 2880 one-byte tokens


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Models this small run fastest on one thread, and on a busy machine by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(random_llama: Path) -> PreTrainedModel:
    """The random Llama in float32, so that slow formulations can be compared closely."""
    return AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer(random_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(random_llama)


@pytest.fixture(scope="session")
def text() -> str:
    return TEXT


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "foxes.txt"
    path.write_text(TEXT, "utf-8")
    return path


class Server:
    """Answers completions from a model in this process, in the form that vLLM's server has."""

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        self.model, self.context, self.requests = model, context, 0
        self.key: str | None = None

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": "served", "max_model_len": self.context}]}

    @torch.inference_mode()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.requests += 1
        prompt = body["prompt"]
        logp = self.model(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        rows = [None, *({str(t): {"logprob": logp[i, t].item()}} for i, t in enumerate(prompt[1:]))]
        top = {f"token_id:{t}": logp[-1, t].item() for t in body["logprob_token_ids"]}
        return {"choices": [{"prompt_logprobs": rows, "logprobs": {"top_logprobs": [top]}}]}


@pytest.fixture
def server(model: PreTrainedModel) -> Iterator[tuple[str, Server]]:
    """The address of a running scripted server, and the server."""
    state = Server(model, context=256)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Stay silent."""

        def _answer(self, data: dict[str, Any], code: int = 200) -> None:
            if state.key and self.headers.get("Authorization") != f"Bearer {state.key}":
                data, code = {"error": "wrong key"}, 401
            payload = json.dumps(data).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def do_GET(self) -> None:
            self._answer(state.models())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if len(body["prompt"]) >= state.context:
                self._answer({"error": f"longer than {state.context}"}, 400)
            else:
                self._answer(state.complete(body))

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", state
    http.shutdown()
    http.server_close()


def figures(token: float, nll: list[float]) -> dict[str, Any]:
    return {
        "token": token,
        "word": token**2,
        "bits_per_byte": 1.5,
        "stderr": 0.1,
        "tokens": 510,
        "window": 256,
        "window_nll": nll,
    }


def task(acc: float, each: list[float]) -> dict[str, Any]:
    return {
        "metrics": {"acc": acc, "acc_norm": acc},
        "stderr": {"acc": 0.02},
        "primary": "acc",
        "higher_is_better": True,
        "documents": 4,
        "available": 100,
        "chance": 0.5,
        "each": each,
    }


@pytest.fixture
def result() -> EvalResult:
    """A full result, as if a checkpoint had been compared with its float model and its server."""
    layers = [
        {"name": f"model.layers.{i}.mlp.{kind}", "scheme": "W4A8-g128", "shape": (256, 128), "error": 0.01 * (i + 1)}
        for i in range(3)
        for kind in ("up_proj", "down_proj")
    ]
    manifest = {
        "source": "org/<small>",
        "source_digest": "0123456789ab",
        "recipe": {"name": "w4a8", "steps": {"smooth": {}, "gptq": {}}},
        "digest": "abcdef",
        "scheme": {"group_size": 128},
        "seed": 7,
        "calibration_tokens": 4096,
        "versions": {"qtoolkit": "0.1.0"},
        "layers": layers,
        "unquantized": [{"name": "lm_head", "reason": "kept by the recipe"}],
        "bytes_before": 4_000_000,
        "bytes_after": 1_000_000,
        "files": {"model.safetensors": 1_000_000},
    }
    divergence = {"text": "sample", "kl": 0.02, "stderr": 0.001, "p99": 0.3, "top1": 0.9, "tokens": 512}
    floor = {**divergence, "kl": 0.001, "p99": 0.01, "top1": 0.99}
    scores = {"scheme": None, "dtype": "bfloat16", "weight_bytes": 4_000_000}
    return EvalResult.model_validate(
        {
            **scores,
            "name": "out/small-w4a8",
            "scheme": "W4A8-g128",
            "perplexity": {"sample": figures(11.0, [2.4, 2.3958])},
            "tasks": {"piqa": task(0.5, [1, 0, 1, 0])},
            "kl": 0.02,
            "divergence": {**divergence, "floor": floor, "floor_dtype": "float32"},
            "reference": {
                **scores,
                "name": "org/<small>",
                "perplexity": {"sample": figures(10.0, [2.3, 2.30517])},
                "tasks": {"piqa": task(0.75, [1, 1, 1, 0])},
            },
            "ppl_change": {"sample": {"value": 0.1, "stderr": 0.002}},
            "task_change": {"piqa": {"value": -0.25, "stderr": 0.25}},
            "served": {
                "url": "http://127.0.0.1:8000",
                "model": "small",
                "perplexity": {"sample": figures(11.011, [2.4, 2.398])},
                "gap": {"sample": 0.001},
            },
            "limit": 4,
            "seconds": 12.5,
            "date": "2026-01-02T03:04:05+00:00",
            "versions": {"qtoolkit": "0.1.0", "lm-eval": "0.4.13"},
            "machine": {"processor": "a CPU", "cores": 2, "device": "cpu"},
            "manifest": manifest,
        }
    )
