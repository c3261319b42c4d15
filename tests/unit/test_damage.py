"""Generated damage of the files that people hand in: each is read, or refused in words, and what is read can be used."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import specdec_tui
from specdec_cli.tables import compared
from specdec_engine.bench import report
from specdec_engine.bench.figures import Sample
from specdec_engine.bench.plan import Arm, Plan
from specdec_engine.errors import SpecdecError, TraceError, UsageError
from specdec_engine.loading import LoadOptions, load_model
from specdec_engine.prompt_files import Question
from specdec_tui.narrate import script
from specdec_tui.source import read_frame
from tests.fakes import save_checkpoint

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


class refused:
    """Passes, or raises this error, which names the file."""

    def __init__(self, kind, path):
        self._kind, self._path = kind, path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, at):
        if kind is None or not issubclass(kind, self._kind):
            return False
        assert str(self._path) in error.message
        return True
