"""A GGUF's header in one pass: the same values as gguf's own reader, and the same folder as transformers makes by itself."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import transformers

from specdec_engine.errors import ModelUnavailable
from specdec_engine.models import gguf_files, gguf_header
from specdec_engine.models.gguf_files import beside
from specdec_engine.models.gguf_header import Header
from specdec_engine.models.loading import find_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.models.progress import silent
from tests.fakes import save_gguf

SENTENCEPIECE = ("llama", "gemma2", "gemma3", "phi3")
BYTE_LEVEL = ("llama", "qwen2", "qwen3", "gpt2", "falcon", "starcoder2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "specdec-cache"))


def write(file, architecture, sentencepiece):
    """A header as llama.cpp writes it, and one small tensor."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2 if architecture == "gpt2" else 1)
    writer.add_key_length(128 if architecture == "qwen3" else 16)  # which a config leaves to its class
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tags(["one", "two"])
    special, letters = ["<unk>", "<s>", "</s>"], [*"abcdefgh ", "é", "日"]
    pieces = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    if sentencepiece:
        tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", "  ", *letters[:8], *letters[9:], *pieces]
        types = [2, 3, 3, *[6] * 256, 1, 4, *[1] * (len(tokens) - 261)]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_add_bos_token(True)
    else:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        tokens = [*special, *bytes_to_unicode().values(), *pieces]
        types = [*[3] * 3, *[1] * (len(tokens) - 3)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges([" ".join(piece) for piece in pieces])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_vocab_size(len(tokens))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(params=[*((a, True) for a in SENTENCEPIECE), *((a, False) for a in BYTE_LEVEL)], ids=str)
def file(request, tmp_path):
    return write(tmp_path / "tiny.gguf", *request.param)


def uncounted(done, total):
    pass


def test_it_is_what_gguf_reads(file):
    ours, theirs = Header(file, uncounted), gguf.GGUFReader(file)
    assert ours.fields.keys() == theirs.fields.keys()
    for name, field in theirs.fields.items():
        assert (ours.fields[name].contents(), ours.fields[name].types) == (field.contents(), field.types), name
    assert [str(tensor[:6]) for tensor in ours.tensors] == [str(tensor[:6]) for tensor in theirs.tensors]


def test_transformers_makes_the_same_of_it_as_of_the_file(file, tmp_path, monkeypatch):
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    gguf_files._make(file, tmp_path / "ours", "tiny", silent)
    monkeypatch.setattr(gguf_header, "Header", lambda file, count: _Theirs(file))
    monkeypatch.setattr(gguf_header, "given_to_transformers", lambda header, file: nullcontext())
    gguf_files._make(file, tmp_path / "theirs", "tiny", silent)
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("ours", "theirs"))
    assert ours == theirs
    assert {"config.json", "tokenizer.json", "index.json"} <= ours.keys()


class _Theirs(gguf.GGUFReader):
    @property
    def part_of(self):
        return [0] * len(self.tensors)


def test_the_file_is_read_once(tmp_path, monkeypatch):
    file, readings = save_gguf(tmp_path / "tiny.gguf", "F16"), []
    usual = gguf.GGUFReader.__init__

    def counted(self, *arguments):
        readings.append(arguments)
        usual(self, *arguments)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    beside(file, "tiny", silent)
    assert len(readings) == 1


def test_how_far_it_is_is_said_in_tokens(tmp_path, monkeypatch):
    file, reports = write(tmp_path / "tiny.gguf", "qwen2", False), []
    monkeypatch.setattr(gguf_files, "_SLOW", 0)
    monkeypatch.setattr(gguf_header, "_EACH", 100)
    beside(file, "tiny", reports.append)
    assert {r.doing for r in reports} == {"converting the header of tiny"}
    assert [r.amount for r in reports] == [
        "323 tokens",
        "100 of 323 tokens",
        "200 of 323 tokens",
        "300 of 323 tokens",
        "323 tokens",
    ]


@pytest.mark.parametrize("share", [0.02, 0.2, 0.4, 0.6, 0.8])
def test_a_header_that_is_cut_short_is_a_model_that_cannot_be_had(tmp_path, share):
    whole = write(tmp_path / "tiny.gguf", "gemma3", True).read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelUnavailable, match=r"short.gguf"):
        find_model(str(tmp_path / "short.gguf"), LoadOptions())


@pytest.mark.parametrize("name", [b"tokenizer.ggml.tokens", b"tokenizer.ggml.scores"])
@pytest.mark.parametrize("length", [1 << 20, 1 << 62])
def test_an_array_longer_than_the_file_is_a_model_that_cannot_be_had(tmp_path, name, length):
    whole = bytearray(write(tmp_path / "tiny.gguf", "gemma3", True).read_bytes())
    at = whole.index(name) + len(name) + 8  # behind the value's type and the elements'
    whole[at : at + 8] = length.to_bytes(8, "little")
    (tmp_path / "long.gguf").write_bytes(whole)
    with pytest.raises(ModelUnavailable, match=r"long.gguf"):
        find_model(str(tmp_path / "long.gguf"), LoadOptions())


def test_a_conversion_that_broke_leaves_nothing_and_the_next_one_is_whole(tmp_path, monkeypatch):
    file = save_gguf(tmp_path / "tiny.gguf", "F16")
    with monkeypatch.context() as patched:
        patched.setattr("transformers.AutoTokenizer.from_pretrained", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            beside(file, "tiny", silent)
    assert gguf.GGUFReader.__name__ == "GGUFReader"
    assert not list((tmp_path / "specdec-cache" / "gguf").iterdir())
    assert (beside(file, "tiny", silent) / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json", "config.json"])
def test_a_conversion_that_was_damaged_since_is_made_anew(name, tmp_path):
    """By the same number of bytes, too."""
    file = save_gguf(tmp_path / "tiny.gguf", "F16")
    kept = beside(file, "tiny", silent) / name
    whole = kept.read_bytes()
    for damage in (whole[: len(whole) // 2], whole.replace(b":", b";", 1)):
        kept.write_bytes(damage)
        assert (beside(file, "tiny", silent) / name).read_bytes() == whole


class Said:
    """A field of a header."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def contents(self):
        return self.value


SLIDING = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("kind", "config", "key", "value", "computed"),
    [
        ("Llama", {}, "expert_count", 0, True),
        ("Llama", {}, "expert_count", 8, False),
        ("Llama", {}, "rope.scaling.type", "none", True),
        ("Llama", {}, "rope.scaling.type", "yarn", False),
        ("Llama", {}, "rope.scaling.attn_factor", 1.0, True),
        ("Llama", {}, "attention.causal", True, True),
        ("Llama", {}, "attention.causal", False, False),
        ("Llama", {}, "attention.key_length", 8, True),
        ("Llama", {}, "attention.key_length", 16, False),
        ("Llama", {}, "attention.sliding_window", 64, False),
        ("Llama", {}, "attention.sliding_window", 2048, True),
        ("Llama", {}, "logit_scale", 0.5, False),
        ("Llama", {}, "a.key.of.tomorrow", 3, False),
        ("Gemma2", {}, "attn_logit_softcapping", 50.0, True),
        ("Gemma2", {}, "attn_logit_softcapping", 30.0, False),
        ("Gemma2", {}, "attn_logit_softcapping", 0.0, False),
        ("Gemma3Text", SLIDING, "rope.freq_base_swa", 10000.0, True),
        ("Gemma3Text", SLIDING, "rope.freq_base_swa", 20000.0, False),
        ("Gemma3Text", SLIDING, "rope.freq_base_swa", 1_000_000.0, False),
        ("Gemma3Text", SLIDING, "attention.sliding_window_pattern", 6, True),
        ("Gemma3Text", SLIDING, "attention.sliding_window_pattern", [True] * 5 + [False], True),
        ("Gemma3Text", SLIDING, "attention.sliding_window_pattern", [True] * 6, False),
    ],
)
def test_what_a_header_says_is_in_the_config_or_is_refused(kind, config, key, value, computed, tmp_path):
    arch = {"Llama": "llama", "Gemma2": "gemma2", "Gemma3Text": "gemma3"}[kind]
    made = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=2048, **{"head_dim": 8, **config}
    )
    said = (Said("general.architecture", arch), Said(f"{arch}.{key}", value), Said("tokenizer.ggml.model", "gpt2"))
    header = SimpleNamespace(fields={field.name: field for field in said})
    refused = nullcontext() if computed else pytest.raises(ModelUnavailable, match=key)
    with refused:
        gguf_header.check_computed(header, tmp_path / "f.gguf", made, ())
