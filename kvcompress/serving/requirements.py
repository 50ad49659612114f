"""What the server needs of others: the packages of the extra, and names inside transformers that it does not promise.

They are looked up before anything is built on them, so that another transformers is told by what it lacks.
"""

from __future__ import annotations

import importlib.util

import transformers

from kvcompress import upstream
from kvcompress.batching import requirements as batching

#: Of transformers: the versions that tests/test_serving.py has passed with.
TRIED = ("5.20.2", "5.21.1", "5.22.2", "5.23.0")
PACKAGES = ("fastapi", "uvicorn", "openai", "prometheus_client", "accelerate")
SERVING = "transformers.cli.serving"
_GENERATE = ("model", "processor", "inputs", "gen_config", "request_id")

NAMES: upstream.Names = {
    f"{SERVING}.server": {
        "build_server": (
            "model_manager",
            "chat_handler",
            "completion_handler",
            "response_handler",
            "transcription_handler",
            "systemone_handler",
            "generation_state",
        )
    },
    f"{SERVING}.model_manager": {
        "ModelManager": ("device", "dtype", "force_model"),
        "ModelManager._load_model": ("model_id_and_revision",),
        "ModelManager.load_model_and_processor": ("model_id_and_revision",),
        "ModelManager.get_gen_models": (),
    },
    f"{SERVING}.utils": {
        "GenerateManager.generate_streaming": (*_GENERATE, "response_parser"),
        "GenerateManager.generate_non_streaming": _GENERATE,
        "GenerationState": ("continuous_batching",),
        "GenerationState.get_manager": ("model_id", "use_cb"),
        "GenerationState.use_continuous_batching": ("model", "modality"),
        "GenerationState.is_cb_alive": (),
        "BaseGenerateManager": (),
        "CBGenerateManager.is_alive": (),
        "CBStreamer": ("cb_manager", "request_id", "tokenizer", "loop", "queue", "response_parser"),
        "Modality": (),
        "_StreamError": ("msg",),
        "BaseHandler._resolve_model": ("body",),
        "_GenerationCancelled": (),
    },
    f"{SERVING}.chat_completion": {"ChatCompletionHandler.handle_request": ("body", "request_id")},
    f"{SERVING}.completion": {"CompletionHandler.handle_request": ("body", "request_id")},
    f"{SERVING}.response": {"ResponseHandler.handle_request": ("body", "request_id")},
    f"{SERVING}.transcription": {"TranscriptionHandler": ("model_manager", "generation_state")},
    f"{SERVING}.systemone": {"SystemOneHandler": ("model_manager", "generation_state")},
}


def check() -> None:
    """Raises ImportError that says what is not installed, or what of transformers is not where it was."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(
            f"kvcompress serve needs {', '.join(absent)}, not installed here: pip install 'kvcompress[serve]'"
        )
    moved = upstream.missing(NAMES | batching.NAMES)
    if moved:
        raise ImportError(
            f"kvcompress serve builds on parts of transformers that version {transformers.__version__}, the one here, "
            f"does not have as they were: {'; '.join(moved)}. It was tried with {', '.join(TRIED)}: "
            f"pip install transformers=={TRIED[-1]}"
        )
