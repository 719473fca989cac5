"""Prompt files, good and bad."""

import json
import os

import pytest
from conftest import make_tokenizer

from ssd_core.checks import UsageError
from ssd_core.prompts import CODE_STOP_STRINGS, for_chat, load_prompts

CHAT = [{"role": "user", "content": "Hello"}]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_formats(tmp_path):
    lines = write(tmp_path / "p.jsonl", json.dumps({"prompt": "a", "id": 7}) + "\n\n" + json.dumps({"messages": CHAT})
                  + "\n" + json.dumps("c") + "\n")
    assert load_prompts(lines).items == ("a", CHAT, "c")
    assert load_prompts(write(tmp_path / "p.json", json.dumps([{"prompt": "a"}, "b", CHAT]))).items == ("a", "b", CHAT)
    assert load_prompts(write(tmp_path / "p.txt", "one\n\n  two \r\nthree")).items == ("one", "two", "three")
    assert load_prompts(write(tmp_path / "q.txt", "one\u2028still one\ntwo")).items == ("one\u2028still one", "two")
    assert load_prompts(["x", CHAT]).items == ("x", CHAT)
    assert len(load_prompts("demo").items) == 64


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt"])
def test_byte_order_marks_and_windows_line_ends(tmp_path, suffix):
    text = {".jsonl": '{"prompt": "a"}\r\n{"prompt": "b"}\r\n', ".json": '["a",\r\n"b"]', ".txt": "a\r\nb\r\n"}[suffix]
    assert load_prompts(write(tmp_path / f"p{suffix}", b"\xef\xbb\xbf" + text.encode())).items == ("a", "b")


def test_duplicates_are_dropped_and_counted(tmp_path):
    found = load_prompts(["a  b", "a b", "a\nb", "c", CHAT, CHAT, "Hello"])
    assert found.items == ("a  b", "c", CHAT, "Hello") and found.duplicates == 3
    chats = [[{"role": "user", "content": "a  b"}], [{"role": "user", "content": "a b"}],
             [{"role": "system", "content": "a b"}],
             [{"role": "user", "content": "a"}, {"role": "user", "content": " b"}]]
    assert load_prompts(chats).items == (chats[0], chats[2], chats[3])      # roles and turns count
    assert found.digest != load_prompts(["c"]).digest and found.digest == load_prompts(list(found.items)).digest


@pytest.mark.parametrize(("name", "data", "message"), [
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl:2: not valid JSON"),
    ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r"p\.jsonl:2: expected a 'prompt' string or 'messages', got keys"),
    ("p.jsonl", '{"prompt": "a"}\n7\n', r"p\.jsonl:2: expected a string, 'prompt' or 'messages', got 7"),
    ("p.jsonl", '{"messages": [{"role": "user"}]}\n', r"p\.jsonl:1: expected messages with 'role' and 'content'"),
    ("p.jsonl", '{"messages": [{"role": "user", "content": null}]}\n', r"p\.jsonl:1: expected messages with"),
    ("p.jsonl", '{"messages": "a"}\n', r"p\.jsonl:1: expected a list of messages, got 'a'"),
    ("p.jsonl", '{"messages": []}\n', r"p\.jsonl:1: expected a prompt, got an empty one"),
    ("p.jsonl", '"a"\n"\\ud800 b"\n', r"p\.jsonl:2: expected text, got half of a surrogate pair"),
    ("p.json", '["a", " "]', r"p\.json\[1\]: expected a prompt, got an empty one"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', r"p\.jsonl:2: expected a prompt, got an empty one"),
    ("p.jsonl", b'{"prompt": "\xff"}\n', r"p\.jsonl:1: not UTF-8"),
    ("p.jsonl", "\n\n", r"prompts: expected at least one, got none in .*p\.jsonl"),
    ("p.json", '["a",\n"b"', r"p\.json:2: not valid JSON"),
    ("p.json", '{"a": 1}', r"p\.json: expected a list of prompts, got dict"),
    ("p.txt", "", "expected at least one"),
    ("p.txt", b"\xff\xfe", r"p\.txt: not UTF-8"),
    ("p.csv", "a", r"expected a \.jsonl, \.json or \.txt file"),
])
def test_bad_files_are_named_with_the_line(tmp_path, name, data, message):
    with pytest.raises(UsageError, match=message):
        load_prompts(write(tmp_path / name, data))


def test_missing_files(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="a folder"):
        load_prompts(tmp_path)
    with pytest.raises(UsageError, match=r"prompts: cannot read .*: File name too long"):
        load_prompts("name" * 100 + ".jsonl")
    with pytest.raises(UsageError, match="expected at least one, got none in given"):
        load_prompts([])


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt"])
def test_files_that_may_not_be_read(tmp_path, suffix):
    write(tmp_path / f"p{suffix}", "[]").chmod(0)
    with pytest.raises(UsageError, match=r"prompts: cannot read .*: Permission denied"):
        load_prompts(tmp_path / f"p{suffix}")


def test_a_text_becomes_a_users_message():
    items, stops = for_chat(load_prompts(["a", CHAT]), make_tokenizer())
    assert items == [[{"role": "user", "content": "a"}], CHAT] and stops == ()


def test_without_a_template_texts_stay_and_stop_strings_come(caplog):
    items, stops = for_chat(load_prompts(["a"]), make_tokenizer(chat=False))
    assert items == ["a"] and stops == CODE_STOP_STRINGS and "no chat template" in caplog.text
    with pytest.raises(UsageError, match=r"prompts\[0\]: expected a text, as the model has no chat template"):
        for_chat(load_prompts([CHAT]), make_tokenizer(chat=False))
