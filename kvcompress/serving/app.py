"""The server put together: transformers' app with our models, handlers and generation, and `/metrics`."""

from __future__ import annotations

import logging

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.utils import logging as transformers_logging

from kvcompress.serving import handlers, refusal
from kvcompress.serving.generating import State
from kvcompress.serving.loading import CompressedModels
from kvcompress.serving.metrics import Metrics
from kvcompress.serving.settings import Settings
from kvcompress.serving.watching import Watching

#: transformers' ways that do not generate text, so that neither cache nor budget would hold for them.
ABSENT = frozenset({"/v1/systemone", "/v1/audio/transcriptions"})


def serve(settings: Settings) -> None:
    """Load the model and serve; raises ValueError or OSError where the model cannot be had or served."""
    transformers_logging.set_verbosity_error()
    logging.getLogger("kvcompress").setLevel(logging.INFO)
    uvicorn.run(build(settings), host=settings.host, port=settings.port)


def build(settings: Settings) -> Watching:
    """The ASGI app, its model loaded."""
    metrics = Metrics()
    models = CompressedModels(settings, metrics)
    state = State(models, metrics)
    app: FastAPI = build_server(
        models,
        handlers.Chat(models, state),
        completion_handler=handlers.Completions(models, state),
        response_handler=handlers.Responses(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in ABSENT]
    refusal.install(app)

    @app.get("/metrics")
    def page() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    return Watching(app, models, metrics)
