"""One reader of prompt files, for every command: the shapes that people have, and one line for what is none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec_engine.errors import UsageError
from specdec_engine.record.prompt_files import Question, read_questions

HI, YO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SHAREGPT = {"id": "1", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
BATCH = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [HI]}}


def lines(*values: object) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


TWO = [("a",), ("b",)]
READ = {
    "a prompt a line": ("p.txt", "one\ntwo\n\n", [("one",), ("two",)]),
    "lines end at line feeds alone": ("p.txt", "a\u2028b\x0cc\u0085\r\nd", [("a\u2028b\x0cc\u0085",), ("d",)]),
    "a byte order mark": ("p.jsonl", "\ufeff" + lines({"prompt": "a"}, {"prompt": "b"}), TWO),
    "Windows' ends of lines": ("p.jsonl", lines({"prompt": "a"}, {"prompt": "b"}).replace("\n", "\r\n"), TWO),
    "Unicode's ends of lines in a string": ("p.jsonl", lines({"prompt": "a\u2028b\u0085c"}), [("a\u2028b\u0085c",)]),
    "braces in text": ("p.txt", "{name} asks: why?\n[1] is a list\n", [("{name} asks: why?",), ("[1] is a list",)]),
    "an array": ("p.json", json.dumps([{"prompt": "a"}, {"prompt": "b"}]), TWO),
    "an array over many lines": ("p.json", json.dumps([{"prompt": "a"}, "b"], indent=2), TWO),
    "an array under another name": ("prompts", json.dumps(["a", "b"], indent=2), TWO),
    "an object over many lines": ("p.json", json.dumps({"prompt": "a"}, indent=2), [("a",)]),
    "lines under the name of a document": ("p.json", lines({"prompt": "a"}, {"prompt": "b"}), TWO),
    "lines under the name of text": ("p.txt", lines({"prompt": "a"}, {"prompt": "b"}), TWO),
    "texts": ("p.jsonl", lines("a", "b"), TWO),
    "turns in an array": ("p.jsonl", lines(["a", "b"]), [("a", "b")]),
    "Spec-Bench": ("p.jsonl", lines({"question_id": 1, "category": "qa", "turns": ["a", "b"]}), [("a", "b")]),
    "one turn": ("p.jsonl", lines({"turns": "a"}), [("a",)]),
    "no turns, but a prompt": ("p.jsonl", lines({"prompt": "a", "turns": []}), [("a",)]),
    "GSM8K": ("p.jsonl", lines({"question": "Why?", "answer": "42"}), [("Why?",)]),
    "Alpaca": ("p.jsonl", lines({"instruction": "Do it", "input": "x", "output": "y"}), [("Do it\n\nx",)]),
    "Alpaca with its text": ("p.jsonl", lines({"instruction": "Do it", "output": "y", "text": "All of it: y"}), [("Do it",)]),
    "OpenAI's messages": ("p.jsonl", lines({"messages": [HI, YO, HI]}), [("hi", "hi")]),
    "messages as a prompt": ("p.jsonl", lines({"prompt": [HI]}), [("hi",)]),
    "a message in parts": ("p.jsonl", lines({"messages": [{**HI, "content": [{"type": "text", "text": "hi"}]}]}), [("hi",)]),
    "ShareGPT": ("p.json", json.dumps([SHAREGPT]), [("hi",)]),
    "an OpenAI batch": ("p.jsonl", lines(BATCH), [("hi",)]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "turns"), READ.values(), ids=READ)
def test_the_shapes_that_people_have(name, content, turns, tmp_path):
    file = tmp_path / name
    file.write_bytes(content.encode())
    assert [q.turns for q in read_questions(file)] == turns


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_windows_shell_writes_utf_16(encoding, tmp_path):
    (file := tmp_path / "p.txt").write_bytes("hello\n".encode(encoding))
    assert read_questions(file) == [Question("text", ("hello",))]


def test_what_a_conversation_begins_with_is_kept(tmp_path):
    (file := tmp_path / "p.jsonl").write_text(lines({"messages": [{"role": "system", "content": "Be brief."}, HI]}))
    assert read_questions(file) == [Question("prompts", ("hi",), system="Be brief.")]


@pytest.mark.parametrize("shape", [{"prompt": "hi"}, {"instruction": "hi"}, {"messages": [HI]}])
def test_a_system_message_beside_a_prompt_is_kept(shape, tmp_path):
    (file := tmp_path / "p.jsonl").write_text(lines({**shape, "system": "Be brief."}))
    assert read_questions(file) == [Question("prompts", ("hi",), system="Be brief.")]


@pytest.mark.parametrize(("category", "told"), [(None, "prompts"), ("maths", "maths"), (["a", "b"], "a, b"), (3, "3")])
def test_a_category_is_text(category, told, tmp_path):
    (file := tmp_path / "p.jsonl").write_text(lines({"prompt": "a", "category": category}))
    assert read_questions(file)[0].category == told


REFUSED = {
    "no text": ("p.txt", b"a\0b\n", "zero characters"),
    "UTF-16 without its mark": ("p.txt", "hello".encode("utf-16-le"), "UTF-16 without its mark"),
    "a broken line first": ("p.txt", b'{"prompt": "a"\n{"prompt": "b"}\n', "line 1 .* not JSON"),
    "a broken array": ("p.txt", b'[{"prompt": "a"},\n]\n', "not JSON"),
    "a part that is no part": (
        "p.jsonl",
        lines({"messages": [{**HI, "content": ["hi"]}]}).encode(),
        "no part of a message",
    ),
    "thousands of digits": ("p.jsonl", b'{"prompt": ' + b"1" * 9999 + b"}\n", "thousands of digits"),
    "half a character": ("p.jsonl", b'{"prompt": "a\\ud83d b"}\n', "line 1 .* half a character"),
    "a comment": ("p.jsonl", b'// mine\n{"prompt": "a"}\n', "line 1 .* not JSON"),
    "no shape": ("p.jsonl", b'{"prompt": "a"}\n{"note": "b"}\n', "line 2 .* its keys are note"),
    "an image": (
        "p.jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n',
        "image_url",
    ),
    "another role": ("p.jsonl", b'{"messages": [{"role": "tool", "content": "x"}]}\n', "role 'tool'"),
    "answers alone": ("p.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "without a user's turn"),
    "a number": ("p.jsonl", b"42\n", "is 42, and no prompt"),
    "an empty prompt": ("p.jsonl", b'{"prompt": "  "}\n', "empty prompt"),
    "a prompt that is an object": ("p.jsonl", b'{"prompt": {"a": 1}}\n', "neither text nor a list"),
    "brackets without end": ("p.jsonl", b"[" * 100_000, "nested too deeply"),
    "objects without end": ("p.json", b'{"a":' * 100_000, "nested too deeply"),
    "an array that is cut": ("p.json", b'[{"prompt": "a"},\n{"prompt": "b"', "cannot be read"),
    "a table": ("p.csv", b"prompt,category\nhello,chat\n", "csv file"),
    "Latin-1": ("p.txt", "café".encode("latin1"), "not UTF-8: byte 0xe9 at offset 3"),
    "nothing": ("p.txt", b"\n \n", "has no prompts"),
}


@pytest.mark.parametrize(("name", "content", "said"), REFUSED.values(), ids=REFUSED)
def test_one_line_for_what_is_no_prompt(name, content, said, tmp_path):
    (file := tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said) as refused:
        read_questions(file)
    assert name in refused.value.message
    assert len(refused.value.message) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["turns", "messages", "prompt", "role", "content", "from", "value", "body", "category"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(
    st.lists(JSON.map(json.dumps) | st.text(max_size=20), max_size=4),
    st.sampled_from(["p.jsonl", "p.json", "p.txt", "p"]),
)
def test_whatever_stands_in_a_file_is_prompts_or_one_error(tmp_path_factory, content, name):
    file = tmp_path_factory.mktemp("fuzz") / name
    file.write_bytes("\n".join(content).encode("utf-8", "surrogatepass"))
    try:
        found, said = read_questions(file), ""
    except UsageError as error:
        found, said = [], error.message
    assert bool(found) == (str(file) not in said)
    assert all(turn.strip() for question in found for turn in question.turns)
