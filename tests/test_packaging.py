"""The wheel, the sdist and the editable install: what they hold, and that each can be imported from anywhere.

The root folder `kernels/` must be importable as `kvcompress.kernels` only: transformers looks for Hugging Face's
`kernels` by name, and a regular package of ours with that name on `sys.path` would break it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALLS = ("wheel", "sdist", "editable")

# What a fresh process sees of an installation. Who imports Triton is asked at the import statement, for torch and
# transformers may have imported it already. hqq is hidden: transformers imports it where it can, which takes seconds.
PROBE = """
import builtins, importlib.util, json, os, sys
sys.modules["hqq"] = None
importers, real_import = set(), builtins.__import__
def watched(name, globals=None, *rest, **named):
    if name.partition(".")[0] == "triton":
        importers.add((globals or {}).get("__name__", "?"))
    return real_import(name, globals, *rest, **named)
builtins.__import__ = watched
import kvcompress, kvcompress.kernels, torch
found = importlib.util.find_spec("kernels")
print(json.dumps({
    "package": os.path.realpath(kvcompress.__file__),
    "kernel_files": sorted({n for folder in kvcompress.kernels.__path__ for n in os.listdir(folder)}),
    "kernels_found": found is not None,
    "kernels_is_package": found is not None and found.origin is not None,
    "triton_importers": sorted(n for n in importers if n.partition(".")[0] in ("kvcompress", "kernels")),
    "cuda_initialised": torch.cuda.is_initialized(),
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command, run without what pytest and its caller put on the path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def source_files(folder: str) -> set[str]:
    """Files below a root folder, relative to it, without caches."""
    found = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def new_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, but not what is installed here in editable mode."""
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    bin_folder = folder / ("Scripts" if os.name == "nt" else "bin")
    python = bin_folder / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # --system-site-packages would give the base interpreter's packages; a .pth gives ours, and reads no .pth there.
    ours = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    Path(own, "packages.pth").write_text("\n".join(ours) + "\n")
    return python


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, "-t", "wheel", "-t", "sdist", cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def probes(distributions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """What each installation looks like from elsewhere and from the repository's root, two processes at a time."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folders = {"elsewhere": elsewhere, "root": ROOT}

    def install(kind: str) -> Path:
        python = new_environment(tmp_path_factory.mktemp(kind) / "venv")
        what = ("-e", ROOT) if kind == "editable" else (distributions[kind],)
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--quiet")
        run(python, "-m", "pip", "install", *options, *what, cwd=elsewhere)
        return python

    def probe(case: tuple[str, str]) -> dict:
        kind, place = case
        return json.loads(run(pythons[kind], "-c", PROBE, cwd=folders[place]).splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        pythons = dict(zip(INSTALLS, pool.map(install, INSTALLS), strict=True))
        cases = [(kind, place) for kind in INSTALLS for place in folders]
        return dict(zip(cases, pool.map(probe, cases), strict=True))


def test_root_kernels_is_no_regular_package():
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_the_package_alone(distributions: dict[str, Path]):
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names} - {"kvcompress"} == {"kvcompress-0.1.0.dist-info"}
    # Data files too: tables, tokenizers, safetensors, py.typed.
    assert {f"kvcompress/{name}" for name in source_files("kvcompress")} <= names
    assert {f"kvcompress/kernels/{name}" for name in source_files("kernels")} <= names


def test_shim_and_root_kernels_share_no_file():
    """Both go to kvcompress/kernels/ in the wheel, where one would overwrite the other."""
    assert not source_files("kvcompress/kernels") & source_files("kernels")


def test_sdist_holds_what_the_tests_need(distributions: dict[str, Path]):
    with tarfile.open(distributions["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= names
    for folder in ("kvcompress", "kernels", "tests"):
        assert {f"{folder}/{name}" for name in source_files(folder)} <= names
    assert "benchmarks/__init__.py" in names


@pytest.mark.parametrize("place", ["elsewhere", "root"])
@pytest.mark.parametrize("kind", INSTALLS)
def test_import(probes: dict[tuple[str, str], dict], kind: str, place: str):
    """`python -c` puts the working directory first: at the root that is the source tree, whatever is installed."""
    seen = probes[kind, place]
    from_source = place == "root" or kind == "editable"
    assert Path(seen["package"]).is_relative_to(ROOT) == from_source
    assert source_files("kernels") | {"__init__.py"} <= set(seen["kernel_files"])
    assert seen["triton_importers"] == []
    assert not seen["cuda_initialised"]


@pytest.mark.parametrize("place", ["elsewhere", "root"])
@pytest.mark.parametrize("kind", INSTALLS)
def test_no_kernels_package_of_ours_is_found(probes: dict[tuple[str, str], dict], kind: str, place: str):
    """Nothing called `kernels` comes with the wheel; in a source tree it is a namespace, which a real package beats."""
    if any(d.metadata["Name"] == "kernels" for d in importlib.metadata.distributions()):
        pytest.skip("Hugging Face's kernels is installed here, and is rightly found")
    seen = probes[kind, place]
    assert not seen["kernels_is_package"]
    if place == "elsewhere" and kind != "editable":
        assert not seen["kernels_found"]
