"""Cache files from somebody else: whatever they hold, `load` raises what says so, or gives a cache that is right.

Every example ends in ValueError or FileNotFoundError, or in a cache whose logits are bit by bit those of the file that
was changed. Examples are few and the same every time; the whole file takes some seconds.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcompress import CacheSpec, CompressedCache, basis, persist
from tests.families import build, prompt

SPECS = {
    "llama": CacheSpec("trellis3", "lloyd2", sinks=4, window=32, layers={1: "kivi2"}),
    "gemma3": CacheSpec("trellis3", "lloyd2", sinks=4, window=32),
    "falcon_h1": CacheSpec("trellis3", "lloyd2", sinks=4, window=32),
}
LENGTH, TAIL = 240, 5  # tokens: three pages and what follows them, and what is fed after loading
FUZZ = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Saved:
    """A family's saved cache, as bytes and as tensors and metadata, and the logits that go on from it."""

    def __init__(self, family: str, folder: Path):
        self.model, self.path = build(family), folder / family
        cache = CompressedCache(self.model.config, SPECS[family])
        self.tail = prompt(1, TAIL, seed=1)
        with torch.no_grad():
            self.model(prompt(1, LENGTH), past_key_values=cache, use_cache=True)
        cache.save(self.path)
        self.whole = self.path.read_bytes()
        self.tensors = load_file(self.path)
        size = struct.unpack("<Q", self.whole[:8])[0]
        self.header = json.loads(self.whole[8 : 8 + size])
        self.data = self.whole[8 + size :]
        self.metadata = self.header["__metadata__"]
        self.content = json.loads(self.metadata["cache"])
        self.logits = self.go_on(cache)

    def go_on(self, cache: CompressedCache) -> Tensor:
        with torch.no_grad():
            return self.model(self.tail, past_key_values=cache, use_cache=True).logits

    def check(self, path: Path) -> bool:
        """Whether the file at `path` was refused; if not it gives the same logits."""
        said = None
        try:
            cache = CompressedCache.load(path, self.model.config)
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
        if said is not None:
            assert 20 < len(said) < 2000, said  # a message, and not the file
            return True
        assert torch.equal(self.go_on(cache), self.logits)
        return False

    def refuses(self, content: bytes) -> bool:
        changed = self.path.with_name("changed")
        changed.write_bytes(content)
        return self.check(changed)

    def signed(self, tensors: dict[str, Tensor], content: object, **metadata: str) -> Path:
        """A file with the right checksum."""
        said = self.metadata | {"cache": content if isinstance(content, str) else json.dumps(content)} | metadata
        tensors = {name: x.contiguous() for name, x in tensors.items()}
        said["sha256"] = persist.checksum(tensors, said)
        changed = self.path.with_name("signed")
        save_file(tensors, changed, said)
        return changed

    def with_header(self, header: dict[str, Any]) -> bytes:
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + self.data


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    folder = tmp_path_factory.mktemp("hostile")
    return {family: Saved(family, folder) for family in SPECS}


@pytest.fixture(scope="module")
def llama(saved: dict[str, Saved]) -> Saved:
    return saved["llama"]


def test_the_file_itself_is_taken(saved: dict[str, Saved]):
    for own in saved.values():
        assert not own.check(own.path)
        assert not own.check(own.signed(own.tensors, own.content))


# --- without the right checksum


@FUZZ
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), in_header=st.booleans())
def test_any_flipped_bit_is_refused(llama: Saved, place: float, bit: int, in_header: bool):
    size = len(llama.whole) - len(llama.data)
    at = int(place * size) if in_header else size + int(place * len(llama.data))
    changed = bytearray(llama.whole)
    changed[at] ^= 1 << bit
    assert llama.refuses(bytes(changed))


@FUZZ
@given(place=st.floats(0, 1, exclude_max=True), more=st.binary(max_size=40))
def test_cut_or_continued_files_are_refused(llama: Saved, place: float, more: bytes):
    assert llama.refuses(llama.whole[: int(place * len(llama.whole))] + more)
    assert not more or llama.refuses(llama.whole + more)


HUGE = (-1, 0, 1, 2**31, 2**63, 10**30)


def header_edits() -> st.SearchStrategy[tuple[str, object]]:
    return st.one_of(
        st.tuples(st.just("dtype"), st.sampled_from(["F64", "U8", "I64", "BF16", "F8_E4M3", "F4", "X", None, 7])),
        st.tuples(st.just("shape"), st.lists(st.sampled_from(HUGE), max_size=4)),
        st.tuples(st.just("data_offsets"), st.lists(st.sampled_from(HUGE), min_size=1, max_size=3)),
        st.tuples(
            st.just("name"), st.sampled_from(["", "0", "9.sink.key", "-1.sink.key", "../x", "0.pages.key", "note."])
        ),
        st.tuples(st.just("gone"), st.none()),
    )


@FUZZ
@given(which=st.integers(0, 10**6), edit=header_edits())
def test_edited_headers_are_refused(llama: Saved, which: int, edit: tuple[str, object]):
    header = json.loads(json.dumps(llama.header))
    name = sorted(llama.tensors)[which % len(llama.tensors)]
    what, value = edit
    before = json.dumps(header)
    if what == "name":
        header[value] = header.pop(name)
    elif what == "gone":
        del header[name]
    else:
        header[name][what] = value
    assert llama.refuses(llama.with_header(header)) or json.dumps(header) == before


@pytest.mark.parametrize("metadata", [None, [], "x", {"format": 1}, {"format": ["kvcompress-cache"]}, {}], ids=str)
def test_headers_without_proper_metadata(llama: Saved, metadata: object):
    assert llama.refuses(llama.with_header({**llama.header, "__metadata__": metadata}))


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**22 + 1, 2**32, 2**63, 2**64 - 1])
def test_headers_of_any_size(llama: Saved, size: int):
    assert llama.refuses(struct.pack("<Q", size) + llama.whole[8:])


# --- with it


def places(content: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all that JSON holds, `content` itself left out."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def put_at(content: Any, path: tuple[Any, ...], value: object) -> Any:
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


HOSTILE = [
    None,
    -1,
    0,
    1,
    5,
    64,
    2**31,
    2**63,
    10**30,
    1e308,
    "x",
    "../../etc/passwd",
    "",
    [],
    {},
    [0],
    [[0]],
    True,
    False,
]


@FUZZ
@given(
    family=st.sampled_from(list(SPECS)), which=st.integers(0, 10**6), value=st.sampled_from(HOSTILE), gone=st.booleans()
)
def test_edited_facts(saved: dict[str, Saved], family: str, which: int, value: object, gone: bool):
    """Anywhere in the JSON: the spec, the model, what each layer says of itself."""
    own = saved[family]
    every = list(places(own.content))
    path = every[which % len(every)]
    content = put_at(own.content, path, value)
    if gone and isinstance(path[-1], str):
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
    own.check(own.signed(own.tensors, content))


def tensor_edits() -> dict[str, Callable[[Tensor], Tensor]]:
    dtypes = (torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
    return {
        **{f"as {dtype}": lambda x, dtype=dtype: x.to(dtype) for dtype in dtypes},
        "bytes": lambda x: x.flatten().view(torch.uint8),
        "flat": Tensor.flatten,
        "deeper": lambda x: x.unsqueeze(0),
        "turned": lambda x: x.transpose(0, -1),
        "none": lambda x: x[:0],
        "twice": lambda x: torch.cat([x, x]),
        "less": lambda x: x[..., :-1],
        "NaN": lambda x: x.index_fill(0, torch.tensor([len(x) - 1]), torch.nan) if x.is_floating_point() else x * 0 - 1,
        "infinite": lambda x: x / 0 if x.is_floating_point() else x * 0 + torch.iinfo(x.dtype).max,
        "below": lambda x: -x - 5 if not x.is_floating_point() else x.new_full(x.shape, -torch.inf),
    }


EDITS = tensor_edits()
#: What is another cache, and as good as any: rows of pages are whatever their numbers are, and these have other bits.
OTHER = {"0.pages", "1.pages", "3.pages"}


@FUZZ
@given(family=st.sampled_from(list(SPECS)), which=st.integers(0, 10**6), edit=st.sampled_from(list(EDITS)))
def test_edited_tensors(saved: dict[str, Saved], family: str, which: int, edit: str):
    own = saved[family]
    name = sorted(own.tensors)[which % len(own.tensors)]
    changed = EDITS[edit](own.tensors[name])
    if changed.dtype == own.tensors[name].dtype and changed.shape == own.tensors[name].shape and name in OTHER:
        return
    own.check(own.signed({**own.tensors, name: changed}, own.content))


@FUZZ
@given(
    which=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), how=st.sampled_from(["swapped", "gone", "renamed"])
)
def test_tensors_in_wrong_places(llama: Saved, which: tuple[int, int], how: str):
    names = sorted(llama.tensors)
    first, second = (names[n % len(names)] for n in which)
    tensors = dict(llama.tensors)
    if how == "swapped":
        if tensors[first].shape == tensors[second].shape and tensors[first].dtype == tensors[second].dtype:
            return
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()
    elif how == "renamed":
        tensors[f"{second}.more"] = tensors.pop(first)
    else:
        del tensors[first]
    assert llama.check(llama.signed(tensors, llama.content))


def nested(levels: int) -> object:
    part: dict[str, object] = {"name": "trellis", "bits": 3}
    for _ in range(levels):
        part = {"name": "lowrank", "bits": 2, "parts": [part]}
    return part


AIMED: dict[str, Callable[[Any], object]] = {
    "no JSON": lambda content: "{",
    "deep": lambda content: "[" * 200_000,
    "deep and whole": lambda content: "[" * 50_000 + "]" * 50_000,
    "a number": lambda content: "7",
    "NaN": lambda content: json.dumps(put_at(content, ("layers", 0, "check", 0), float("nan"))),
    "a deep spec": lambda content: put_at(content, ("spec", "key"), nested(200)),
    "a long name": lambda content: put_at(content, ("spec", "key", "name"), "trellis" * 150_000),
    "many layers": lambda content: put_at(content, ("layers",), [{}] * 300_000),
    "megabytes": lambda content: put_at(content, ("notes",), "x" * 2**23),
    "long numbers": lambda content: json.dumps(content).replace('"sinks": 4', '"sinks": ' + "4" * 5000),
    "a layer far off": lambda content: put_at(content, ("spec", "layers"), {"1000000": content["spec"]["layers"]["1"]}),
    "many rows": lambda content: put_at(content, ("layers", 0, "lengths"), [LENGTH] * 200_000),
    "a wide record": lambda content: put_at(content, ("layers", 0, "record", 0, 2), [2**40]),
    "a basis": lambda content: put_at(content, ("spec", "basis"), "/etc/hostname.safetensors"),
    "a codec of another name": lambda content: put_at(content, ("spec", "value", "name"), "../lloyd"),
}


@pytest.mark.parametrize("case", AIMED)
def test_aimed_metadata_is_refused_at_once(llama: Saved, case: str):
    changed = llama.signed(llama.tensors, AIMED[case](llama.content))
    begun = time.process_time()
    assert llama.check(changed)
    assert time.process_time() - begun < 3  # seconds; the slowest parses 4 MiB of JSON


def test_a_spec_makes_load_read_no_other_file(llama: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither a basis that is there nor a spec's own JSON file."""
    file = tmp_path / "basis.safetensors"
    basis.save(file, {})
    opened: list[object] = []
    monkeypatch.setattr(basis, "load", lambda path: opened.append(path) or {})
    monkeypatch.setattr(Path, "read_text", lambda self, *args: opened.append(self))
    assert llama.check(llama.signed(llama.tensors, put_at(llama.content, ("spec", "basis"), str(file))))
    assert llama.check(llama.signed(llama.tensors, put_at(llama.content, ("spec", "key", "name"), f"{file}.json")))
    assert opened == []


# --- little memory


def zero_sized(own: Saved, shape: Callable[[list[int]], list[int]]) -> dict[str, Tensor]:
    """The first layer's exact tokens with dimensions that cost nothing, since one of them is 0."""
    names = [f"0.{part}.{side}" for part in ("sink", "recent") for side in ("key", "value")]
    return {**own.tensors, **{name: torch.empty(shape(list(own.tensors[name].shape))) for name in names}}


LARGE: dict[str, Callable[[Saved], dict[str, Tensor]]] = {
    "wide": lambda own: zero_sized(own, lambda s: [s[0], s[1], 0, 2**40]),
    "many heads": lambda own: zero_sized(own, lambda s: [s[0], 2**40, 0, s[3]]),
    "many rows": lambda own: zero_sized(own, lambda s: [2**40, s[1], 0, s[3]]),
    "many pages": lambda own: {**own.tensors, "0.pages": torch.empty(2**40, 0, dtype=torch.int64)},
    "wide tables": lambda own: {**own.tensors, "0.table.ids": torch.empty(0, 2**40, dtype=torch.int32)},
    "long queries": lambda own: {**own.tensors, "0.queries.0": torch.empty(4, 2**40, 0)},
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the limit is a forked process's")
@pytest.mark.parametrize("case", LARGE)
def test_nothing_large_is_allocated(llama: Saved, case: str):
    """In a process that may take 64 MiB more than it has."""
    changed = llama.signed(LARGE[case](llama), llama.content)
    llama.check(llama.path)  # what is made once in a process is there
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + 2**26,) * 2)
            code = 0 if llama.check(changed) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- paths


def test_paths(llama: Saved, tmp_path: Path):
    config = llama.model.config
    renamed, link = tmp_path / "some name \n.png", tmp_path / "link"
    renamed.write_bytes(llama.whole)
    link.symlink_to(renamed)
    assert not llama.check(renamed)
    assert not llama.check(link)
    empty, loop, pipe = tmp_path / "empty", tmp_path / "loop", tmp_path / "pipe"
    empty.touch()
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="is no safetensors file, or is cut short"):
        CompressedCache.load(empty, config)
    for path in (
        tmp_path,
        loop,
        pipe,
        tmp_path / "missing",
        tmp_path / ("x" * 5000),
        f"{tmp_path}/a\0b",
        "/dev/zero",
        "",
    ):
        with pytest.raises(FileNotFoundError, match="there is no cache file"):
            CompressedCache.load(path, config)
