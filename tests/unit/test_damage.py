"""Generated damage of the files that people hand in: each is read, or refused in words, and what is read can be used."""

from __future__ import annotations

import copy
import json
import math
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import specdec_tui
from specdec_cli.tables import compared
from specdec_engine.bench import report
from specdec_engine.bench.figures import Sample
from specdec_engine.bench.plan import Arm, Plan
from specdec_engine.errors import ModelUnavailable, SpecdecError, TraceError, UsageError
from specdec_engine.models.loading import load_model
from specdec_engine.models.options import LoadOptions
from specdec_engine.record.prompt_files import Question
from specdec_tui.narrate import script
from specdec_tui.streams import read_frame
from tests.fakes import save_checkpoint, save_gguf

DEMO = (Path(specdec_tui.__file__).parent / "demo.jsonl").read_text("utf-8").splitlines()[:12]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
OFTEN = st.sampled_from([None, -1, 0, 1, 2**63, 0.5, 1e308, "", "text", [], {}, [1], {"a": 1}, True])
BOUNDED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damaged(draw, record):
    """The JSON of a copy in which one value, at any depth, is another one or missing; now and then cut short."""
    found = copy.deepcopy(record)
    here = found
    while True:
        key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        inner = here[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
            break
        here = inner
    if draw(st.integers(0, 4)) == 0:
        del here[key]
    else:
        here[key] = draw(OFTEN | ANYTHING)
    text = json.dumps(found)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


@BOUNDED
@given(data=st.data())
def test_a_damaged_trace(data, tmp_path):
    number = data.draw(st.integers(0, len(DEMO) - 1))
    line = data.draw(damaged(json.loads(DEMO[number])))
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join([*DEMO[:number], line, *DEMO[number + 1 :]]) + "\n", "utf-8")
    with refused(TraceError, path):
        assert list(script(*read_frame(path)))


PLAN = Plan("builtin", (Arm("ngram", 2, 0.0),), (Question("text", ("a",)), Question("text", ("b",))), 1, 8, 0)


def sample(question, arm):
    passes = {"1": (4, 0.1), "3": (4, 0.2)}
    return Sample(question, 0, 0.0, arm, 1, 8, 4, 8, 6, 4, 0.1, 0.4, 0.01, 0.1, passes, (1, 2, 3), (3,))


@pytest.fixture(scope="module")
def record():
    samples = [sample(question, arm) for question in (0, 1) for arm in (None, 0)]
    environment = {"threads": 2, "target": {"weight_bytes": 10}, "drafts": {}}
    return json.loads(json.dumps(report.record(PLAN, samples, environment, {})))


@BOUNDED
@given(data=st.data())
def test_a_damaged_record(data, record, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(data.draw(damaged(record)), "utf-8")
    with refused(UsageError, path):
        found = report.read(path)
        assert list(compared(found, record)) is not None
        with suppress(UsageError):  # of another plan
            samples = report.samples_of(found, PLAN, 2)
            report.record(PLAN, samples, record["environment"], {})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=1)


@pytest.mark.filterwarnings("ignore")  # transformers' own, of what it then refuses
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_damaged_checkpoint(name, checkpoint, tmp_path):
    file = checkpoint / name
    whole = file.read_text("utf-8")

    @settings(max_examples=40, deadline=None)
    @given(text=damaged(json.loads(whole)))
    def holds(text):
        file.write_text(text, "utf-8")
        with suppress(SpecdecError):
            load_model(str(checkpoint), LoadOptions(dtype="float32", threads=1))

    try:
        holds()
    finally:
        file.write_text(whole, "utf-8")


def test_a_damaged_gguf(tmp_path, monkeypatch):
    """Bytes of the header, which all else is found by; or cut short anywhere."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    file = save_gguf(tmp_path / "tiny.gguf")
    whole = file.read_bytes()
    header = int(gguf.GGUFReader(file).data_offset)
    spot = st.tuples(st.integers(0, header - 1), st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))

    @settings(max_examples=60, deadline=None)
    @given(spots=st.lists(spot, min_size=1, max_size=4), end=st.just(len(whole)) | st.integers(0, len(whole)))
    def holds(spots, end):
        damaged = bytearray(whole)
        for at, byte in spots:
            damaged[at] = byte
        file.write_bytes(damaged[:end])
        with refused(SpecdecError, file, never="JSON"):
            load_model(str(file), LoadOptions(dtype="float32", threads=1))

    holds()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"runtime": "generic"}, {"dtype": "auto"}], ids=["lean", "generic", "auto"])
@pytest.mark.parametrize("where", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_weights_that_are_no_numbers(where, options, value, tmp_path):
    """Of a target every run would fail; of a draft every token would be rejected, without a word."""
    folder = save_checkpoint(tmp_path, seed=1)
    tensors = load_file(folder / "model.safetensors")
    tensors[where][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match="not numbers, in "):
        load_model(str(folder), LoadOptions(**{"dtype": "float32", "threads": 1, **options}))


@pytest.mark.parametrize(
    ("key", "byte", "value"),
    [
        ("llama.embedding_length", 3, 255),
        ("tokenizer.ggml.tokens", 0, 9),
        ("llama.feed_forward_length", 3, 127),
        ("llama.attention.head_count_kv", 1, 127),
        ("llama.attention.head_count", 3, 1),
    ],
)
def test_a_header_that_asks_for_more_than_memory(key, byte, value, tmp_path, monkeypatch):
    """The width of a layer, an array of arrays that gguf would read until memory ends: what hypothesis found, and was killed
    by; and a count of heads that was told of a file in the cache folder."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    file = save_gguf(tmp_path / "tiny.gguf")
    whole = bytearray(file.read_bytes())
    whole[whole.index(key.encode()) + len(key) + 4 + byte] = value
    file.write_bytes(whole)
    with pytest.raises(ModelUnavailable, match="which no model has"):
        load_model(str(file), LoadOptions(dtype="float32", threads=1))


def test_sizes_of_a_class_are_not_made_for_a_small_file(tmp_path, monkeypatch):
    """A key of the header lost: the config falls back on 4096 wide layers of 11008."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    file = save_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes().replace(b"llama.embedding_length", b"llama.embedding_lengtx"))
    with pytest.raises(ModelUnavailable, match=r"has the size|embedding_lengtx"):
        load_model(str(file), LoadOptions(dtype="float32", threads=1))


class refused:
    """Passes, or raises this error, which names the file and never says that."""

    def __init__(self, kind, path, never=None):
        self._kind, self._path, self._never = kind, path, never

    def __enter__(self):
        return self

    def __exit__(self, kind, error, at):
        if kind is None or not issubclass(kind, self._kind):
            return False
        assert str(self._path) in error.message
        assert self._never is None or self._never not in error.message
        return True
