"""The Triton kernels. In a source tree they lie in the root folder `kernels/`; an installed wheel has them here.

They are imported as `kvcompress.kernels.<name>` in both: a top-level package `kernels` would hide Hugging Face's, which
transformers looks for by that name. Importing this package imports no kernel, hence no Triton.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "kernels").is_dir():
    __path__.append(str(_ROOT / "kernels"))
