"""`kvcompress serve`: transformers' own OpenAI-compatible server, whose models hold their contexts compressed.

What is needed beyond kvcompress is in the extra `serve`; nothing of it is imported before `run` is called.
"""

from __future__ import annotations

from kvcompress.serving.settings import Settings


def run(settings: Settings) -> None:
    """Serve until the process is told to stop.

    Raises ImportError where the extra is not installed or transformers is not as it was, ValueError or OSError where
    the model cannot be had or served.
    """
    from kvcompress.serving import requirements

    requirements.check()
    from kvcompress.serving import app

    app.serve(settings)
