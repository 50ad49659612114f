"""The `kvcompress` command, run in this process: real generation on a tiny random model, and one line for an error."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import kvcompress
from kvcompress import cli

WORDS = ["<unk>", "</s>", *(f"w{i}" for i in range(62))]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """A tiny random model in the place of the embedded one."""
    model = tiny_model()

    def load(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
        return model.to(dtype), word_tokenizer()

    monkeypatch.setattr(kvcompress.models, "embedded", load)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny model and its tokenizer."""
    tiny_model().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def run(*arguments: str) -> str:
    """The standard output of a command that goes well."""
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def test_generate_with_a_prefix_store(embedded: LlamaForCausalLM, tmp_path: Path):
    """A second prompt that begins as the first one did goes on from its pages, and says the same as without."""
    text = " ".join(f"w{i % 61}" for i in range(300))
    options = ("--spec", "trellis3", "--max-new-tokens", "5")
    store = ("--prefix-store", str(tmp_path / "prefixes"), "--min-tokens", "100")
    first = run("generate", text, *options, *store)
    assert "prefix store: 0 tokens of the prompt reused; 1 entries," in first
    again = run("generate", f"{text} w3 w4", *options, *store)
    assert "prefix store: 300 tokens of the prompt reused; 1 entries," in again
    assert again.splitlines()[0] == run("generate", f"{text} w3 w4", *options).splitlines()[0]


def test_generate_with_offloaded_pages(
    embedded: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says the same as with all pages on the device, and where they are."""
    options = (" ".join(f"w{i % 61}" for i in range(300)), "--spec", "lloyd3", "--max-new-tokens", "5")
    found = run("generate", *options, "--offload", "0B", "--offload-folder", str(tmp_path))
    assert found.splitlines()[0] == run("generate", *options).splitlines()[0]
    assert "on disk" in found
    assert list(tmp_path.iterdir()) == []
    assert "--offload BYTES" in fail(capsys, "generate", "w1", "--offload-folder", str(tmp_path))
    assert "'much' as a size" in fail(capsys, "generate", "w1", "--offload", "much")
    assert "nowhere" in fail(capsys, "generate", "w1", "--offload", "0B", "--offload-folder", str(tmp_path / "nowhere"))


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that fails."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(arguments))
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def long_prompt(words: int = 300) -> str:
    return " ".join(f"w{i % 60}" for i in range(words))


def continuation(model: LlamaForCausalLM, prompt: str, tokens: int) -> str:
    """What the model says without any compression."""
    tokenizer = word_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


class TestGenerate:
    def test_exact_cache_gives_the_models_own_words(self, embedded: LlamaForCausalLM) -> None:
        expected = continuation(embedded, long_prompt(), 12)
        out = run("generate", long_prompt(), "--spec", "exact", "--max-new-tokens", "12", "--device", "cpu")
        assert out.partition("\n")[0].split() == expected.split()

    def test_ends_with_the_memory_that_the_cache_took(self, embedded: LlamaForCausalLM) -> None:
        out = run("generate", long_prompt(700), "--max-new-tokens", "5", "--device", "cpu")
        assert "cache of 704 tokens" in out  # the last new token is never fed back
        assert "bits per coded element" in out

    def test_default_spec_compresses(self, embedded: LlamaForCausalLM) -> None:
        default = run("generate", long_prompt(700), "--max-new-tokens", "2", "--device", "cpu")
        named = run("generate", long_prompt(700), "--max-new-tokens", "2", "--spec", str(kvcompress.DEFAULT_SPEC))
        assert default == named

    def test_prompt_from_standard_input(self, embedded: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = ["--max-new-tokens", "3", "--device", "cpu"]
        direct = run("generate", "w1 w2 w3", *arguments)
        result = CliRunner().invoke(cli.app, ["generate", "-", *arguments], input="w1 w2 w3")
        assert result.stdout == direct

    def test_sampling_is_repeatable_with_a_seed(self, embedded: LlamaForCausalLM) -> None:
        arguments = ["generate", "w1 w2 w3", "--temperature", "2", "--max-new-tokens", "20", "--device", "cpu"]
        first, again = run(*arguments, "--seed", "1"), run(*arguments, "--seed", "1")
        assert first == again
        assert first != run(*arguments, "--seed", "2")

    def test_model_from_a_folder_and_dtype(self, folder: Path) -> None:
        out = run("generate", "w1 w2 w3", "--model", str(folder), "--dtype", "bfloat16", "--max-new-tokens", "3")
        elements = 2 * 2 * 2 * 16 * 5  # layers, sides, heads, numbers, tokens
        assert f"uncompressed {2 * elements / 1024:.2f} KiB" in out

    def test_the_embedded_models_dtype(self, embedded: LlamaForCausalLM) -> None:
        run("generate", "w1 w2", "--dtype", "bfloat16", "--max-new-tokens", "2", "--device", "cpu")
        assert embedded.dtype == torch.bfloat16


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["generate", "hi", "--spec", "trelis3"], "unknown codec 'trelis3'; did you mean 'trellis'?"),
            (["generate", "hi", "--spec", "trellis3,window=-1"], "window must be a number of tokens"),
            (["generate", ""], "the prompt is empty"),
            (["generate", "hi", "--device", "toaster"], "cannot use the device 'toaster'"),
            (["generate", "hi", "--model", "./nowhere"], "./nowhere"),
            (["generate", "hi", "--max-new-tokens", "0"], "--max-new-tokens"),
            (["generate", "hi", "--dtype", "int3"], "--dtype"),
            (["generate", "hi", "--temperature", "-1"], "--temperature"),
            (["generate"], "PROMPT"),
            (["plan", "./nowhere"], "no folder or config.json at 'nowhere'"),
            (["plan", "./nowhere", "--context", "7q"], "cannot read '7q' as a number of tokens"),
            (["plan", "./nowhere", "--gpu", "80"], "cannot read '80' as a size"),
            (["compress"], "compress"),
            (["plan", "x", "--nonsense"], "--nonsense"),
        ],
    )
    def test_one_line(self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
        assert message.lower() in fail(capsys, *arguments).lower()

    def test_debug_shows_the_traceback(self) -> None:
        with pytest.raises(OSError, match="nowhere"):
            cli.main(["--debug", "plan", "./nowhere"])

    def test_a_bug_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*arguments: object, **settings: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(kvcompress, "plan", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            cli.main(["plan", "x"])

    def test_out_of_memory_is_no_bug(self) -> None:
        assert cli.user_message(torch.OutOfMemoryError("CUDA out of memory.\nTried")) == "CUDA out of memory."

    def test_interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*arguments: object, **settings: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(kvcompress, "plan", interrupt)
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["plan", "x"])
        assert exit_info.value.code == 130


class TestPlanAndSpecs:
    def test_plan(self, folder: Path) -> None:
        out = run("plan", str(folder), "--context", "1M", "--gpu", "24GB", "--batch", "2", "--spec", "trellis2")
        expected = kvcompress.plan(folder, "1M", "trellis2", "24GB", batch=2)
        assert out == f"{expected}\n"
        assert "1,048,576" in out

    def test_specs_lists_every_codec_and_the_grammar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        out = run("specs")
        for name in ("exact", "fp8", "lloyd8", "trellis3", "spectral2.5", "kivi2", "nf4", "balanced", "trellis:auto3"):
            assert name in out
        assert "3.125" in out  # trellis3 at head_dim 128: 3 bits and a scale of 16 bits
        assert "SETTING :=" in out
        assert str(kvcompress.DEFAULT_SPEC) in out

    def test_specs_says_what_a_codec_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
        monkeypatch.setenv("COLUMNS", "200")
        out = run("specs")
        assert "the codec nf4 needs bitsandbytes" in out
        assert "trellis4" in out


class TestHelp:
    @pytest.mark.parametrize("command", ["generate", "plan", "calibrate", "specs"])
    def test_each_command_has_help(self, command: str) -> None:
        out = run(command, "--help")
        assert f"kvcompress {command}" in out or command == "specs"

    def test_no_command_shows_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_info:
            cli.main([])
        captured = capsys.readouterr()
        assert exit_info.value.code == 2
        assert "generate" in captured.out + captured.err
        assert "error" not in captured.err

    def test_module(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "kvcompress", "generate", "x", "--spec", "?"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: unknown codec '?'")
        assert "Traceback" not in done.stderr
