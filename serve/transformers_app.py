"""The web application: transformers' handlers and routes around one model that is already loaded."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMOVED = ("/load_model", "/reset", "/v1/audio/transcriptions")  # a client loads no models here, and none hears


class OneModel(ModelManager):
    """Knows one model, loaded by us: transformers' own loader would run the checkpoint in float."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(device=str(model.device), model_timeout=-1)
        self.force_model = name
        self.loaded_models[name] = TimedModel(model, timeout_seconds=-1, processor=tokenizer)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Return the name as it is; transformers would add a revision."""
        return model_id

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the one model; transformers would list the hub cache."""
        return [{"id": self.force_model, "object": "model", "owned_by": "qtoolkit", "created": int(time.time())}]


class Bounded(GenerateManager):
    """Refuses prompts that leave no room in the model's context, and ends generation where the context ends."""

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **named: Any
    ) -> Any:
        """Generate token by token, inside the context."""
        _bound(model, inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *rest, **named)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """Generate to the end, inside the context."""
        _bound(model, inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)


class BoundedState(GenerationState):
    """Hands out one bounded generation manager."""

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        """Return the manager of ``model_id``; made on first use."""
        if model_id not in self._generate_managers:
            self._generate_managers[model_id] = Bounded()
        return self._generate_managers[model_id]


def _bound(model: PreTrainedModel, inputs: Any, gen_config: Any) -> None:
    context, used = model.config.max_position_embeddings, inputs["input_ids"].shape[-1]
    if used >= context:
        raise HTTPException(400, f"The prompt has {used} tokens, and the model's context is {context} tokens.")
    gen_config.max_new_tokens = min(gen_config.max_new_tokens, context - used)


def build_app(name: str, model: PreTrainedModel, tokenizer: Any) -> FastAPI:
    """Return the OpenAI-compatible application for ``model``, known to clients as ``name``."""
    models, state = OneModel(name, model, tokenizer), BoundedState()
    app = build_server(
        models,
        ChatCompletionHandler(models, state),
        CompletionHandler(models, state),
        ResponseHandler(models, state),
        TranscriptionHandler(models, state),
        state,
    )
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") not in REMOVED]
    return app
