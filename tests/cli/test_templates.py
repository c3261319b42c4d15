"""Options that tell a chat template something, of one prompt and of many."""

from __future__ import annotations

import json
import shutil

import pytest

from specdec_engine.errors import UsageError
from specdec_engine.models.chat import names_read
from specdec_engine.pair import load_pair
from tests.fakes import CHAT_TEMPLATE

SWITCH = (
    "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{{ mood if mood is defined else '' }}"
)


@pytest.fixture(scope="module")
def thinker(checkpoint, tmp_path_factory):
    """The checkpoint with a template that can be told something."""
    folder = tmp_path_factory.mktemp("models") / "thinker"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + SWITCH)
    return folder


def asked(specdec, model, *typed):
    done = specdec("generate", "hi", "-t", model, "-d", "none", "-n", "2", "--json", *typed)
    assert done.code == 0, done.err
    return json.loads(done.out)["prompt_tokens"]


def test_a_prompts_template_is_told_what_was_typed(specdec, thinker):
    """Byte by byte: three for the mark, five for the mood."""
    plain = asked(specdec, thinker)
    assert asked(specdec, thinker, "--thinking") == plain
    assert asked(specdec, thinker, "--no-thinking") == plain + len("<no>")
    told = ("--no-thinking", "--template-kwargs", '{"mood": "gloom"}')
    assert asked(specdec, thinker, *told) == plain + len("<no>gloom")


def test_so_are_those_of_many_prompts_and_another_is_no_resumption(specdec, thinker, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "hi"}\n{"prompt": "the light"}\n')
    words = ("generate", "--prompts", prompts, "-t", thinker, "-d", "none", "-n", "2", "--out", out)
    assert specdec(*words, "--no-thinking").code == 0
    lengths = [json.loads(line)["prompt_tokens"] for line in out.read_text().splitlines()[1:]]
    assert lengths[0] == asked(specdec, thinker, "--no-thinking")
    assert specdec(*words, "--no-thinking", "--resume").code == 0
    other = specdec(*words, "--resume")
    assert (other.code, "begun with template {'enable_thinking': False}, not {}" in other.err) == (2, True), other.err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--thinking", "--raw"), "--raw uses no chat template"),
        (("--template-kwargs", "[1]"), "is no object"),
        (("--template-kwargs", '{"messages": []}'), "cannot set messages"),
        (("--template-kwargs", '{"return_dict": true}'), "cannot set return_dict"),
        (("--template-kwargs", '{"mod": 1}'), "it knows enable_thinking, mood"),
        (("--template-kwargs", '{"range": 1}'), "reads no range"),
        (("--no-thinking", "--template-kwargs", '{"enable_thinking": true}'), "--no-thinking both set enable_thinking"),
        (("--thinking", "--attach", "http://localhost:1"), "for our own engine"),
    ],
)
def test_what_cannot_be_told_is_refused(specdec, thinker, typed, said):
    done = specdec("generate", "hi", "-t", thinker, "-n", "2", *typed)
    assert (done.code, said in done.err) == (2, True), done.err


def test_a_template_without_a_switch_is_named_before_weights_are_read(specdec, checkpoint, monkeypatch):
    monkeypatch.setattr("specdec_engine.models.loading.Candidate.load", lambda self: pytest.fail("weights were read"))
    done = specdec("generate", "hi", "-t", checkpoint, "--no-thinking")
    assert (done.code, "has no switch for thinking" in done.err) == (2, True), done.err


def test_a_template_that_only_transformers_can_parse_is_told_anything():
    assert names_read("{% generation %}{{ mood }}{% endgeneration %}") is None
    assert names_read("{% set a = 1 %}{% for x in messages %}{{ x ~ a ~ mood }}{% endfor %}") == frozenset(
        ("messages", "mood")
    )


def test_a_program_tells_it_as_well(thinker):
    pair = load_pair(str(thinker), "none")
    told = pair.tokenizer.decode(pair.encode("hi", template={"enable_thinking": False}))
    assert told == pair.tokenizer.decode(pair.encode("hi")) + "<no>"
    with pytest.raises(UsageError, match="needs one"):
        pair.encode("hi", chat=False, template={"enable_thinking": False})
