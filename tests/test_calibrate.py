"""Budgets, bases and ranks that are found on a text: what they promise, on tiny models and texts."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import kvcompress
from benchmarks.texts import load as load_text
from kvcompress import CacheSpec, CompressedCache, basis, cli
from kvcompress.budget import Part, allot, average, splits, to_spec
from kvcompress.calibrate import Calibration, calibrate, choices
from kvcompress.divergence import Judge, Text
from kvcompress.learning import coded_from, find_parts, learn_basis, ranks_by_energy, with_ranks
from kvcompress.presets import PRESETS
from kvcompress.spec import CodecSpec
from kvcompress.store import PAGE

LAYERS, HEADS, WIDTH, VOCABULARY, CONTEXT = 2, 2, 16, 64, 1024
TEXT = Path(argparse.__file__).read_text("utf-8")  # which the embedded model was not trained on


def tiny_model(layers: int = LAYERS) -> LlamaForCausalLM:
    """A random Llama, the first layer's attention with twelve times the weight of the others'."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=WIDTH,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.mul_(0.25 if index else 3.0)
    return model


@pytest.fixture(scope="module")
def text() -> Text:
    ids = torch.randint(2, VOCABULARY, (4000,), generator=torch.Generator().manual_seed(1))
    return Text(ids, torch.tensor([1]))


@pytest.fixture(scope="module")
def told() -> list[tuple[int, int]]:
    """What `found`'s search tells of its progress."""
    return []


@pytest.fixture(scope="module")
def found(text: Text, told: list[tuple[int, int]]) -> Calibration:
    def progress(done: int, total: int, what: str) -> None:
        told.append((done, total))

    return calibrate(tiny_model(), text, 2, context=CONTEXT, progress=progress)


class TestBudget:
    def test_the_allotment_is_the_best_of_all(self) -> None:
        """Against every combination of numbers, for parts of unequal size and losses that are not convex."""
        generator = torch.Generator().manual_seed(0)
        parts = [Part(index, side, None, 16 * (1 + index)) for index in range(2) for side in (0, 1)]
        for bits in (1, 1.5, 2, 2.7, 4):
            losses = {
                part: dict(
                    zip((1, 1.5, 2, 4), torch.rand(4, generator=generator).sort().values.tolist()[::-1], strict=True)
                )
                for part in parts
            }
            every = (dict(zip(parts, pick, strict=True)) for pick in itertools.product((1, 1.5, 2, 4), repeat=4))
            best = min(sum(losses[p][n] for p, n in own.items()) for own in every if average(own) <= bits)
            chosen = allot(losses, bits)
            assert average(chosen) <= bits
            assert sum(losses[p][n] for p, n in chosen.items()) == pytest.approx(best, abs=1e-12)

    def test_less_than_the_least_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"an average of 1\.5 bits is not to be had: the least is 2"):
            allot({Part(0, 0, None, 16): {2: 0.1, 3: 0.0}}, 1.5)

    def test_splits_fill_the_budget(self) -> None:
        parts = [Part(0, 0, None, 16), Part(0, 1, None, 16)]
        assert [list(own.values()) for own in splits(parts, [1, 2, 3, 4], 3)] == [[2, 4], [3, 3], [4, 2]]
        assert [list(own.values()) for own in splits(parts, [1, 2, 3, 4], 1.5)] == [[1, 2], [2, 1]]
        wide = [Part(0, 0, None, 16), Part(0, 1, None, 48)]  # a bit more for values costs three times as much
        assert [list(own.values()) for own in splits(wide, [1, 2, 3], 2)] == [[2, 2], [3, 1]]

    def test_the_commonest_layer_becomes_the_rule(self) -> None:
        codecs = {
            Part(index, side, None, 16): CodecSpec("trellis", 4 if (index, side) == (1, 0) else 2)
            for index in range(3)
            for side in (0, 1)
        }
        assert to_spec(codecs, CacheSpec(sinks=7)) == CacheSpec.parse("trellis2,sinks=7,layer1=trellis:k4v2")

    def test_heads_that_differ_are_named_one_by_one(self) -> None:
        codecs = {Part(0, side, head, 16): CodecSpec("trellis", 3 + side * head) for side in (0, 1) for head in (0, 1)}
        assert to_spec(codecs, CacheSpec()) == CacheSpec.parse("key=trellis3,value=trellis3/trellis4")


class TestCalibrate:
    def test_a_layer_that_hurts_more_gets_more_bits(self, found: Calibration) -> None:
        """Twelve times the weight is 144 times the squared error, to which KL is proportional while it is small."""
        hurt = [sum(own[2] for part, own in found.losses.items() if part.layer == index) for index in range(LAYERS)]
        assert hurt[0] > 50 * hurt[1]
        numbers = found.candidates[0].numbers
        assert min(n for p, n in numbers.items() if p.layer == 0) > max(n for p, n in numbers.items() if p.layer == 1)

    def test_more_bits_hurt_less(self, found: Calibration) -> None:
        for own in found.losses.values():
            assert own[4] < own[2] < own[1]

    def test_the_budget_holds(self, found: Calibration) -> None:
        """Numbers average 2; what is measured has a 16-bit gain for 16 dimensions too, and means and tables: 3.09."""
        for each in found.candidates:
            assert each.average <= 2
            assert each.measured.bits <= 2 + 16 / WIDTH + 0.1
        assert found.winner.average == average(found.winner.numbers)

    def test_the_best_of_what_was_measured_is_taken(self, found: Calibration) -> None:
        plain = [each for each in found.candidates if "sinks" not in each.name]
        assert [each.name for each in plain] == ["allotted", "trellis:k1v3", "trellis2", "trellis:k3v1"]
        assert found.winner.measured.kl <= min(each.measured.kl for each in plain)
        assert plain[0].measured.kl < plain[2].measured.kl

    def test_other_sinks_and_windows_are_paid_for(self, found: Calibration) -> None:
        """No dearer than the best of the standard ones but for where the last page ends: half of PAGE on average."""
        standard = min(found.candidates[:4], key=lambda each: each.measured.kl)
        tried = found.candidates[4:]
        assert tried
        for each in tried:
            slack = PAGE * 32 / CONTEXT
            assert each.measured.effective <= standard.measured.effective + slack

    def test_progress_tells_every_measurement(self, found: Calibration, told: list[tuple[int, int]]) -> None:
        """Parts times numbers, the allotted spec and the splits, sinks and windows."""
        total = LAYERS * 2 * 4 + 1 + 3 + 5
        assert told == [(done, total) for done in range(1, total + 1)]

    def test_heads_by_themselves(self, text: Text) -> None:
        result = calibrate(tiny_model(layers=1), text, 1.5, "lloyd", heads=True, context=CONTEXT)
        assert [str(part) for part in result.losses][:3] == [
            f"layer 0 {part}" for part in ("keys, head 0", "keys, head 1", "values, head 0")
        ]
        assert result.candidates[0].average <= 1.5
        assert CacheSpec.parse(str(result.winner.spec)) == result.winner.spec

    @pytest.mark.parametrize(
        ("codec", "bits", "message"),
        [
            ("trelis", 3, "unknown codec 'trelis'; did you mean 'trellis'"),
            ("trellis", 7, "bits must be within 1 and 4 for 'trellis', got 7"),
            ("trellis", 0.5, r"bits must be within 1 and 4 for 'trellis', got 0\.5"),
            ("fp8", 3, "no bits to allot in 'fp8': 'fp8' takes no number; trellis, spectral"),
            ("lowrank", 3, "'lowrank' is numbered by ranks, which --energy chooses"),
            ("prerop+trellis", 3, "unknown codec 'prerop'"),
        ],
    )
    def test_what_cannot_be_allotted(self, codec: str, bits: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            choices(codec, bits)

    def test_numbers_with_a_point(self) -> None:
        assert choices("spectral", 2.2) == [1.5, 2, 2.5, 3, 3.5, 4]

    def test_a_text_that_is_too_short(self, text: Text) -> None:
        short = Text(text.ids[:900], text.prefix)
        with pytest.raises(ValueError, match=r"has 900 tokens, too few for 2 passages of 1024 .* shorter --context"):
            calibrate(tiny_model(), short, 3, context=CONTEXT)

    def test_a_context_without_codes(self, text: Text) -> None:
        """lowrank and spectral learn from 512 tokens after the sinks, so that their codes are met after two chunks."""
        model = tiny_model()
        begin = coded_from(model, CacheSpec.parse("lowrank8"))
        assert (begin, coded_from(model, CacheSpec.parse("trellis3"))) == (1024, 512)
        with pytest.raises(
            ValueError, match="must have 2048 tokens or more, since codes are met after 1024, got a --con"
        ):
            Judge(model, text.passages(1, CONTEXT), begin)


class TestPassages:
    def test_they_do_not_overlap_and_are_drawn_by_the_seed(self) -> None:
        text = Text(torch.arange(1000), torch.tensor([-1]))
        first, again, other = (text.passages(3, 101, seed) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(torch.cat(first), torch.cat(other))
        tokens = torch.cat([each[0, 1:] for each in first])
        assert len(tokens) == len(tokens.unique()) == 300
        assert all(each[0, 0] == -1 for each in first)

    def test_an_exact_cache_diverges_by_rounding_alone(self, text: Text) -> None:
        judge = Judge(tiny_model(), text.passages(1, CONTEXT))
        assert abs(judge.measure(CacheSpec.parse("exact")).kl) < 1e-6
        assert judge.measure(CacheSpec.parse("trellis1")).kl > 1e-4

    def test_the_models_own_attention_comes_back(self, text: Text) -> None:
        model = tiny_model()
        own = model.config._attn_implementation
        Judge(model, text.passages(1, CONTEXT)).measure(CacheSpec.parse("exact"))
        assert model.config._attn_implementation == own != "kvcompress"


class TestBasis:
    @pytest.mark.slow
    def test_it_is_nearly_as_good_as_one_from_the_prompt(self, tmp_path: Path) -> None:
        """At most 1.3 times the KL, the bound that the project set, on other modules than it was learned from."""
        model, tokenizer = kvcompress.models.embedded()
        held_out = load_text(tokenizer, None, 0)
        half = len(held_out.ids) // 2
        source, other = Text(held_out.ids[:half], held_out.prefix), Text(held_out.ids[half:], held_out.prefix)
        file = tmp_path / "spectral3.safetensors"
        basis.save(file, learn_basis(model, source, CacheSpec.parse("spectral3")))
        judge = Judge(model, other.passages(1, 3584), coded_from(model, CacheSpec.parse("spectral3")))
        own, learned = (judge.measure(CacheSpec.parse(f"spectral3,basis={b}")).kl for b in ("prompt", file))
        assert 0 < learned <= 1.3 * own

    def test_codes_start_right_after_sinks_and_window(self, text: Text, tmp_path: Path) -> None:
        model, file = tiny_model(), tmp_path / "b.safetensors"
        spec = CacheSpec.parse("lloyd3,window=32")
        basis.save(file, learn_basis(model, text, spec))
        held = {}
        for name in ("prompt", str(file)):
            cache = CompressedCache(model.config, f"{spec},basis={name}")
            with torch.inference_mode():
                model(text.ids[None, : 4 + 32 + PAGE], past_key_values=cache, use_cache=True)
                held[name] = [layer.history.coded for layer in cache.layers]
        assert held == {"prompt": [[0]] * LAYERS, str(file): [[PAGE]] * LAYERS}

    def test_another_codecs_file_is_refused(self, text: Text, tmp_path: Path) -> None:
        model, file = tiny_model(), tmp_path / "b.safetensors"
        basis.save(file, learn_basis(model, text, CacheSpec.parse("lloyd3,layer1.value=lloyd2")))
        with pytest.raises(
            ValueError, match="the basis of layer 1 was learned by lloyd2 for values, the spec says lloyd3"
        ):
            CompressedCache(model.config, f"lloyd3,basis={file}")
        CompressedCache(model.config, f"lloyd3,layer1.value=lloyd2,basis={file}")

    def test_a_text_that_is_too_short(self, text: Text) -> None:
        short = Text(text.ids[:90], text.prefix)
        with pytest.raises(
            ValueError, match="has 90 tokens, too few for 1 passages of 132"
        ):  # 4 sinks, 128 to learn from
            learn_basis(tiny_model(), short, CacheSpec.parse("lloyd3"))


class TestEnergy:
    def test_more_energy_takes_more_ranks(self, text: Text) -> None:
        model = tiny_model()
        some, most, whole = (ranks_by_energy(model, text, "lowrank", energy) for energy in (0.3, 0.9, 1.0))
        assert list(some) == find_parts(model)
        assert all(some[part] % 8 == 0 and some[part] <= most[part] <= whole[part] for part in some)
        assert set(whole.values()) == {WIDTH}
        assert sum(some.values()) < sum(whole.values())

    def test_a_joint_basis_has_the_dimensions_of_all_heads(self, text: Text) -> None:
        assert set(ranks_by_energy(tiny_model(), text, "jointrank", 1.0).values()) == {HEADS * WIDTH}

    def test_the_rank_goes_before_what_stands_behind(self) -> None:
        ranks = {Part(0, 0, None, 32): 16, Part(0, 1, None, 32): 8}
        spec = CacheSpec.parse("key=prerope+lowrank16+trellis4,value=prerope+lowrank8+trellis4")
        assert with_ranks("prerope+lowrank+trellis4", ranks) == spec

    @pytest.mark.parametrize(
        ("codec", "energy", "message"),
        [
            ("trellis", 0.9, "energy chooses ranks, which 'trellis' has none of to choose"),
            ("lowrank16", 0.9, "which 'lowrank16' has none of to choose"),
            ("lowrank", 1.5, r"energy must be a share above 0 and at most 1, got 1\.5"),
        ],
    )
    def test_errors(self, text: Text, codec: str, energy: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ranks_by_energy(tiny_model(), text, codec, energy)


class TestCommand:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "text.txt"
        path.write_text(TEXT)
        return path

    @pytest.fixture
    def shallow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first two layers of the embedded model in its place, to be quick."""
        model, tokenizer = kvcompress.models.embedded()
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
        monkeypatch.setattr(kvcompress.models, "embedded", lambda: (model, tokenizer))

    def run(self, *arguments: str | Path) -> str:
        result = CliRunner().invoke(cli.app, ["calibrate", *map(str, arguments), "--device", "cpu"])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    @pytest.mark.usefixtures("shallow")
    def test_from_a_text_to_a_spec(self, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """All at its least: four parts of two numbers each."""
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr("kvcompress.calibrate.SINKS", (4,))
        monkeypatch.setattr("kvcompress.calibrate.WINDOWS", (128,))
        monkeypatch.setattr("kvcompress.calibrate.choices", lambda codec, bits: [1, 2])
        output, bases = tmp_path / "spec.json", tmp_path / "b.safetensors"
        out = self.run("--text", file, "--bits", "1.5", "--context", "1024", "--output", output, "--basis", bases)
        assert "compared on other passages" in out
        assert "1 bits" in out
        spec = CacheSpec.parse(str(output))
        assert spec.basis == str(bases)
        assert CacheSpec.from_json(spec.to_json()) == spec
        config = kvcompress.models.embedded()[0].config
        layers = [spec.layer(index, 2) for index in range(2)]
        assert sum(side.bits for layer in layers for side in (layer.key, layer.value)) <= 1.5 * 4
        CompressedCache(config, str(output))  # the basis goes with it
        with safe_open(bases, "pt") as stored:
            assert "0.key.mean" in stored.keys()  # noqa: SIM118

    def test_help_says_what_it_does(self) -> None:
        out = self.run("--help")
        assert "kvcompress calibrate --text book.txt --codec lowrank --energy 0.95" in " ".join(out.split())

    @pytest.mark.usefixtures("shallow")
    def test_ranks_by_energy(self, file: Path, tmp_path: Path) -> None:
        output = tmp_path / "spec.json"
        out = self.run("--text", file, "--energy", "0.9", "--context", "2048", "--output", output)
        assert "by energy" in out
        assert "one for all" in out
        assert CacheSpec.parse(str(output)).key.name == "lowrank"

    @pytest.mark.usefixtures("shallow")
    def test_the_basis_of_a_spec(self, file: Path, tmp_path: Path) -> None:
        path = tmp_path / "b.safetensors"
        out = self.run("--text", file, "--spec", "lloyd3", "--basis", path)
        assert f"use it with --spec lloyd3,basis={path}" in out
        assert sorted(basis.load(path)) == [0, 1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "calibrate needs --text FILE"),
            (["--text", "missing.txt"], "No such file or directory: 'missing.txt'"),
            (["--bits", "3", "--energy", "0.9"], "--bits and --energy exclude each other"),
            (["--spec", "lloyd3"], "--spec says of which codecs to learn a --basis FILE"),
            (["--energy", "0.9", "--heads"], "--heads is for --bits"),
            (["--codec", "trelis"], "unknown codec 'trelis'"),
            (["--bits", "9"], "bits must be within 1 and 4 for 'trellis', got 9"),
            (["--energy", "0.9", "--codec", "trellis"], "energy chooses ranks"),
            (["--basis", "x.json"], "--basis writes a .safetensors file"),
            (["--output", "x.txt"], "--output writes a .json file"),
        ],
    )
    def test_one_line_for_an_error(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["calibrate", *arguments])
        captured = capsys.readouterr()
        assert exit_info.value.code == 2
        assert captured.err.count("\n") == 1
        assert message in captured.err

    def test_a_text_that_is_too_short(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "short.txt"
        path.write_text("too short")
        with pytest.raises(SystemExit):
            cli.main(["calibrate", "--text", str(path)])
        assert "too few for 2 passages of 4096" in capsys.readouterr().err


class TestPreset:
    def test_it_is_for_the_embedded_model(self) -> None:
        spec = CacheSpec.parse("trellis:auto3")
        assert spec == PRESETS["trellis:auto3"].spec()
        config = kvcompress.models.embedded()[0].config
        CompressedCache(config, spec)
        layers = [spec.layer(index, 5) for index in range(5)]
        assert sum(side.bits for layer in layers for side in (layer.key, layer.value)) <= 3 * 10

    def test_a_model_of_other_layers_refuses_it(self) -> None:
        with pytest.raises(ValueError, match=r"the spec names layer ., but the model has 2 layers"):
            CompressedCache(tiny_model().config, "trellis:auto3")
