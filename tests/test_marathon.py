"""The stages of the marathon model's training that long documents need."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.embedded.corpus import VOCABULARY
from benchmarks.marathon import lengthen, match
from benchmarks.marathon.lengthen import Documents, Lengthening, Seen, block_losses
from benchmarks.marathon.match import CROWD, matching_loss
from benchmarks.marathon.model import GLOBAL, TRAINING, load

SMALL = Lengthening(documents=2, shortest=4096, longest=8192, blocks=2, block=1024, recall=1.0, answer_weight=8.0)


@torch.no_grad()
def test_a_block_costs_what_the_whole_forward_pass_says() -> None:
    model, _ = load()
    model.set_attn_implementation(TRAINING)
    ids = torch.randint(1, VOCABULARY, (1, 3001), generator=torch.Generator().manual_seed(0))
    losses = nn.functional.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")
    for place in (0, 300, 2000):
        found = block_losses(model, Seen.of(model, ids), ids, place, 700)
        torch.testing.assert_close(found, losses[place : place + 700], atol=2e-4, rtol=0)


def test_matching_is_cheap_where_equal_pairs_agree() -> None:
    """One-hot queries and keys for pairs: a match has all the weight; with zeros, its share of all."""
    pairs = torch.tensor([5, 6, 7, 5, 6, 8])
    position = torch.tensor([4])  # the pair 6, which stood before key 2; keys 0, 1, 3 and 4 do not match
    key, query = torch.zeros(6, 9), torch.zeros(1, 9)
    assert matching_loss(query, key, pairs, position, 1.0).item() == pytest.approx(np.log(1 + 4 * CROWD))
    key[2, 6] = query[0, 6] = 8.0
    assert matching_loss(query, key, pairs, position, 1.0).item() < 1e-6
    alone = torch.tensor([5])  # pair 8 has no match: the first key is the right one
    key[0, 8] = query[0, 8] = 8.0
    query[0, 6] = 0.0
    assert matching_loss(query, key, pairs, alone, 1.0).item() < 1e-6


def test_documents_ask_for_facts_that_stand_before() -> None:
    class Words:
        def token_to_id(self, token: str) -> int:
            return 0

        def encode(self, text: str, add_special_tokens: bool) -> object:
            return type("Encoding", (), {"ids": [1000 + ord(letter) for letter in text[:40]]})

    prose, code = np.full(20_000, 1, np.int64), np.full(20_000, 2, np.int64)
    documents = Documents(Words(), prose, code, SMALL, seed=1)  # type: ignore[arg-type]
    asked = 0
    for _ in range(10):
        ids, weights, places = documents.draw()
        assert set(weights.unique().tolist()) <= {1.0, 8.0}
        assert SMALL.shortest <= ids.shape[1] <= SMALL.longest
        assert ids[0, 0] == 0
        assert len(places) == SMALL.blocks
        assert all(SMALL.block <= place <= ids.shape[1] - SMALL.block for place in places)
        asked += int((weights == 8).sum())
    assert asked > 0


def test_only_what_stands_above_the_look_up_is_trained() -> None:
    model, tokenizer = load()
    model.set_attn_implementation(TRAINING)
    rng = np.random.default_rng(0)
    stream = rng.integers(1, VOCABULARY, 20_000)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    documents = Documents(tokenizer.backend_tokenizer, stream, stream, SMALL, seed=0)
    found = list(lengthen.lengthen(model, documents))
    assert [number for number, _, _ in found] == [0, 1]
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert f"model.layers.{GLOBAL}.self_attn.o_proj.weight" in moved
    assert f"model.layers.{GLOBAL + 1}.self_attn.q_proj.weight" in moved
    assert not {name for name in moved if name.startswith(("model.embed", "model.layers.0", "model.layers.2"))}
    assert f"model.layers.{GLOBAL}.self_attn.k_proj.weight" not in moved


def test_matching_trains_the_look_up_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load()
    model.set_attn_implementation(TRAINING)
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, VOCABULARY, 2000)).unsqueeze(0)
    monkeypatch.setattr(match, "ROUNDS", 2)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    asked = torch.tensor([500, 700])
    ((number, loss),) = match.match(model, lambda: (ids, asked), match.Matching(documents=1))
    assert number == 0
    assert loss > 0
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {f"model.layers.{GLOBAL}.self_attn.{side}_proj.weight" for side in "qk"}
