"""What the server needs of others: the packages of the extra, and names inside transformers that it does not promise.

They are looked up before anything is built on them, so that another transformers is told by what it lacks.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

import transformers

#: Of transformers: the versions that tests/test_serving.py has passed with.
TRIED = ("5.23.0",)
PACKAGES = ("fastapi", "uvicorn", "openai", "prometheus_client", "accelerate")
SERVING = "transformers.cli.serving"
_GENERATE = ("model", "processor", "inputs", "gen_config", "request_id")

#: By module: names, and the parameters that are given to them.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
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
        "GenerationState.get_manager": ("model_id", "use_cb"),
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
    moved = [what for module, names in NAMES.items() for what in _moved(module, names)]
    if moved:
        raise ImportError(
            f"kvcompress serve builds on parts of transformers that version {transformers.__version__}, the one here, "
            f"does not have as they were: {'; '.join(moved)}. It was tried with {', '.join(TRIED)}: "
            f"pip install transformers=={TRIED[-1]}"
        )


def _moved(module: str, names: dict[str, tuple[str, ...]]) -> list[str]:
    """What a module lacks of names and their parameters."""
    try:
        holder = importlib.import_module(module)
    except ImportError as error:
        return [f"{module} ({error})"]
    lacking = []
    for name, parameters in names.items():
        found: Any = holder
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            lacking.append(f"{module}.{name}")
        elif parameters:
            taken = inspect.signature(found).parameters
            lacking += [f"{module}.{name}({wanted}=)" for wanted in parameters if wanted not in taken]
    return lacking
