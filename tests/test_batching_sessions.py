"""kvcompress.batching: how sessions begin, end and begin again, and which models cannot have one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from kvcompress import batching
from kvcompress.basis import Basis, save
from kvcompress.batching.manager import RecordsManager
from kvcompress.paged.codecs import codecs, parse
from tests.families import COMMON, build
from tests.test_batching import NEW, alone, batched, config, finished, greedy, prompts


def begun(**generation: Any) -> RecordsManager:
    """A manager of a tiny model whose records keep the numbers themselves."""
    model = batching.enable(build("llama", "sdpa", head_dim=16), "exact")
    start: Any = model.init_continuous_batching
    settings = GenerationConfig(**generation) if generation else greedy()
    manager: RecordsManager = start(generation_config=settings, continuous_batching_config=config())
    return manager


def attention(manager: RecordsManager) -> str:
    name: str = manager.model.config._attn_implementation
    return name


def test_a_manager_that_cannot_be_made_leaves_the_model_alone() -> None:
    model = batching.enable(build("llama", "sdpa", head_dim=16), "exact")
    wanted = alone(model, prompts()[1])
    start: Any = model.init_continuous_batching
    with pytest.raises(ValueError, match="strictly positive"):
        start(
            generation_config=GenerationConfig(do_sample=True, temperature=0.0, eos_token_id=-1),
            continuous_batching_config=config(),
        )
    assert model.config._attn_implementation == "sdpa"
    assert alone(model, prompts()[1]) == wanted


def test_stopped_and_started_again() -> None:
    """As with transformers' own manager; between the two the model is what it was."""
    manager = begun()
    answers = []
    for _ in range(2):
        manager.start()
        answers.append(finished(manager, manager.add_request(prompts()[0], max_new_tokens=NEW)))
        manager.stop()
        assert attention(manager) == "sdpa"
    assert answers == [alone(manager.model, prompts()[0])] * 2  # type: ignore[arg-type]


def test_stopped_without_waiting() -> None:
    """Requests that run are answered to their end with the attention that they began with."""
    manager = begun()
    manager.start()
    manager.add_request(prompts()[1], max_new_tokens=40)
    while manager.batch_processor is None or not manager.batch_processor.scheduler.active_requests:
        time.sleep(0.001)
    manager.stop(block=False, keep_for_next_session=True)
    result = manager.get_result(timeout=20)
    assert result is not None
    assert (result.error, len(result.generated_tokens)) == (None, 40)
    manager.join(time.perf_counter())
    assert attention(manager) == "sdpa"
    batching.disable(manager.model)  # type: ignore[type-var]


def test_a_thread_that_fails_gives_the_attention_back() -> None:
    manager = begun()
    manager.start()
    manager.add_request([10**6], max_new_tokens=NEW)  # no such token
    result = manager.get_result(timeout=20)
    assert result is not None
    assert result.error == "index out of range in self"
    manager.join(time.perf_counter(), timeout=10)
    assert attention(manager) == "sdpa"


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("stablelm", "does not tell its attention of the cache"),
        ("diffllama", "layer 0 attends more than once"),  # halves of its values: enabled, its tokens were others
        ("git", r"layers \[0, 1\] did not attend"),  # so were these, which kept the cache for themselves
        ("jetmoe", r"layer 0 has heads \(4, 128\)"),
    ],
)
def test_models_whose_attention_does_not_take_part(family: str, reason: str) -> None:
    """They are refused as they are enabled, and not by the first request of a server."""
    fields = {name: COMMON[name] for name in COMMON.keys() - {"head_dim"}}
    if family == "git":  # sees images, too
        fields["vision_config"] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 32}
        fields["vision_config"]["num_attention_heads"] = 2
    model = AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[family](**fields)).train()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=rf"attention of \w+ cannot work on codes: .*{reason}"):
        batching.enable(model, "exact")
    assert batching.METHOD not in vars(model)
    assert model.config._attn_implementation == before
    assert model.training


def test_learned_positions_are_no_hindrance() -> None:
    """GPT-2 goes by `position_ids`, which packed requests bring along."""
    model = build("gpt2", "eager")
    wanted = [alone(model, ids) for ids in prompts()]
    assert batched(batching.enable(model, "exact"), prompts(), config()) == wanted


def test_a_basis_that_was_learned_again(tmp_path: Path) -> None:
    """A file that has been replaced is read anew: not what it held when the process began."""
    path = tmp_path / "basis.safetensors"
    spec = parse(f"trellis3,basis={path}", "test")
    for value in (1.0, 2.0):
        mean = torch.full((1, 2, 64), value)
        save(path, {0: Basis(("trellis3", "trellis3"), ({"mean": mean}, {"mean": mean.clone()}))})
        os.utime(path, ns=(int(value), int(value)))  # a file system's clock may be slower than this test
        key, _ = codecs(spec, 64, 2, torch.float32, 0)
        assert torch.equal(key.fit["mean"], mean)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="there is no basis file"):
        codecs(spec, 64, 2, torch.float32, 0)
