"""Data files: what is read is what `json.loads` reads, lazily; and what is said of files that are wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import multiprocessing
import os
import pickle
import re
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune import data_files
from finetune.data_files import load_samples

# From the original toolkit's README, as it stands there.
README_EXAMPLE = r"""
  [
    {
      "id": "0",
      "image": 'path/to/image_0.jpg',
      "conversations": [
            {
              'role': 'user', 
              'content': '<image>\nHow many desserts are on the white plate?'
            }, 
            {
                'role': 'assistant', 
                'content': 'There are three desserts on the white plate.'
            },   
            {
                'role': 'user', 
                'content': 'What type of desserts are they?'
            },
            {
                'role': 'assistant', 
                'content': 'The desserts are cakes with bananas and pecans on top. They share similarities with donuts, but the presence of bananas and pecans differentiates them.'
            }, 
            {
                'role': 'user', 
                'content': 'What is the setting of the image?'}, 
            {
                'role': 'assistant', 
                'content': 'The image is set on a table top with a plate containing the three desserts.'
            },
        ]
    },
  ]
"""  # noqa: E501, W291
TINY_CHUNKS = (1, 2, 3, 7, data_files.CHUNK)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("\"\\[]{},:' \né画😀a", max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('"\\[,a', max_size=3), inner, max_size=3),
    max_leaves=12,
)


@pytest.fixture
def write(tmp_path):
    """Text or bytes into a file of the temporary folder; its path."""

    def write(content: str | bytes, name: str = "train.json") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder for tests that hypothesis calls many times."""
    return tmp_path_factory.mktemp("scratch")


def listed(path: str, chunk: int) -> list:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_files, "CHUNK", chunk)
        return list(load_samples(path))


def turns(*texts: str) -> dict:
    return {"conversations": [{"role": role, "content": text} for role, text in zip("ua", texts, strict=False)]}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(VALUES, min_size=1, max_size=5),
    st.sampled_from([None, 0, 3, "\t", "\r\n"]),
    st.booleans(),
    st.sampled_from(["", " ", "\r\n\t "]),
    st.sampled_from(TINY_CHUNKS),
)
def test_lists_are_read_as_by_json(scratch, samples, indent, escaped, around, chunk):
    text = around + json.dumps(samples, indent=indent, ensure_ascii=escaped) + around
    path = scratch / "list.json"
    path.write_bytes(text.encode())
    assert listed(path, chunk) == json.loads(text)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(VALUES, st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"])), max_size=5),
    st.booleans(),
    st.sampled_from(TINY_CHUNKS),
)
def test_lines_are_read_as_by_json(scratch, lines, ended, chunk):
    text = "".join(json.dumps(value, ensure_ascii=False) + end for value, end in [({"first": 1}, "\n"), *lines])
    path = scratch / "lines.jsonl"
    path.write_bytes((text if ended else text.rstrip()).encode())
    assert listed(path, chunk) == [{"first": 1}, *(value for value, _ in lines)]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text("[]{},'\"\\ \na1", max_size=25) | st.binary(max_size=12).map(lambda b: b.decode("latin1")))
def test_any_bytes_are_read_or_refused(scratch, text):
    for name in ("any.json", "any.jsonl"):
        path = scratch / name
        path.write_bytes(text.encode("latin1"))
        try:
            samples = list(load_samples(path))
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            samples = None
        try:
            strict = json.loads(text.encode("latin1").decode())
        except ValueError:
            continue
        if isinstance(strict, list) and strict:
            assert samples == strict


@pytest.mark.parametrize("chunk", TINY_CHUNKS)
@pytest.mark.parametrize(
    "text",
    [
        r'["\\", "\\\\\"],[", "\"", ["\\\\"], 1]',
        '[{"a": "]"}, {"b": "}{"}, ",", "", [], {}]',
        "[\n\n 1\n,\n 2 \n]\n\n",
        "[-1.5e5, true, null]",
    ],
)
def test_borders_of_chunks(write, text, chunk):
    assert listed(write(text), chunk) == json.loads(text)
    assert listed(write("\ufeff" + text), chunk) == json.loads(text)


def test_constants_and_lone_surrogates(write):
    nan, surrogate = load_samples(write(r'[NaN, "\ud800"]'))
    assert nan != nan and surrogate == "\ud800"


def test_sequence(write):
    samples = load_samples([write("[0, 1, 2]", "a.json"), write("3\n\n4", "b.jsonl"), write("[5]", "c.ndjson")])
    assert len(samples) == 6 and list(samples) == [0, 1, 2, 3, 4, 5]
    assert samples[-1] == 5 and samples[np.int64(3)] == 3
    for index in (6, -7):
        with pytest.raises(IndexError):
            samples[index]
    assert [os.path.basename(path) for path in samples.paths] == ["a.json", "b.jsonl", "c.ndjson"]  # noqa: PTH119
    assert samples.location(4) == (samples.paths[1], 1) and samples.location(-1) == (samples.paths[2], 0)


def test_without(write):
    samples = load_samples([write("[0, 1, 2]", "a.json"), write("3\n4", "b.jsonl")])
    fewer = samples.without(np.array([0, 3]))
    assert list(fewer) == [1, 2, 4] and len(samples) == 5
    assert fewer.location(2) == (samples.paths[1], 1)
    fewest = fewer.without(np.array([1]))
    assert list(fewest) == [1, 4] and fewest.location(-1) == (samples.paths[1], 1)
    assert fewest.paths == samples.paths
    assert len(fewest.without(np.array([], np.int64))) == 2 and len(fewest.without(np.array([0, 1]))) == 0


def test_folder_of_a_sample(write, tmp_path, monkeypatch):
    write("[1]")
    monkeypatch.chdir(tmp_path)
    samples = load_samples("train.json")
    monkeypatch.chdir("/")
    assert samples.folder(0) == str(tmp_path) and samples.location(0) == ("train.json", 0) and samples[0] == 1


def _read_in_child(samples, queue):
    queue.put(list(samples))


def test_other_processes(write):
    samples = load_samples([write("[0, 1]"), write("[{'a': 1}]", "python.json"), write("2\n3", "b.jsonl")])
    expected = [0, 1, {"a": 1}, 2, 3]
    assert list(pickle.loads(pickle.dumps(samples))) == expected
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(samples, queue))
    child.start()
    assert queue.get(timeout=30) == expected
    child.join()


def test_memory_of_a_sample(write):
    """A number for each, and nothing that grows when samples are read."""
    samples = load_samples(write("[" + ",".join(["1"] * 10000) + "]"))
    before = len(pickle.dumps(samples))
    assert sum(samples) == 10000
    assert len(pickle.dumps(samples)) - before < 100 and before < 8 * 10000 + 2000


def test_more_files_than_may_be_open(tmp_path):
    for number in range(data_files.OPEN_FILES + 20):
        (tmp_path / f"{number:03}.json").write_text(f"[{number}]")
    descriptors = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0  # noqa: PTH208
    samples = load_samples(tmp_path)
    assert list(samples) == list(range(data_files.OPEN_FILES + 20))
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= descriptors + data_files.OPEN_FILES  # noqa: PTH208


@pytest.mark.parametrize("change", ["[1, 2, 4]", "[1, 2, 3, 4]", "[1"])
def test_files_that_change(write, change):
    path = write("[1, 2, 3]")
    samples = load_samples(path)
    assert samples[2] == 3
    stored = pickle.dumps(samples)
    time.sleep(0.01)
    write(change)
    data_files._opened.cache_clear()
    for held in (samples, pickle.loads(stored)):
        with pytest.raises(ValueError, match=r"train\.json: the file changed while in use"):
            held[2]
    os.remove(path)  # noqa: PTH107
    data_files._opened.cache_clear()
    with pytest.raises(ValueError, match="there is no such file"):
        samples[0]


# -- which files, and what they are


def test_folders(write, tmp_path):
    for name in ("b.JSON", "a.jsonl", "c.ndjson"):
        write(f'[["{name}"]]' if name[0] == "b" else f'"{name}"', name)
    for name in (".hidden.json", "notes.txt"):
        write("nothing", name)
    (tmp_path / "inner.json").mkdir()
    samples = load_samples(tmp_path)
    assert list(samples) == ["a.jsonl", ["b.JSON"], "c.ndjson"]
    assert samples.location(1) == (str(tmp_path / "b.JSON"), 0)
    with pytest.raises(ValueError, match=r"is a folder without a \.json, .* or \.arrow file"):
        load_samples(tmp_path / "inner.json")
    (tmp_path / "d.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(ValueError, match=r"d\.json: there is no such file"):
        load_samples(tmp_path)


def test_wrong_paths(write, tmp_path):
    path = write("[1]")
    with pytest.raises(ValueError, match=r"gone\.json: there is no such file$"):
        load_samples(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="cannot be read: Not a directory"):
        load_samples(f"{path}/x")
    (tmp_path / "link").symlink_to(path)
    for again in (path, str(tmp_path), f"{tmp_path}/./train.json", tmp_path / "link"):
        with pytest.raises(ValueError, match=r"is named twice, first as .*train\.json"):
            load_samples([path, again])
    with pytest.raises(ValueError, match="no data file"):
        load_samples([])
    os.mkfifo(tmp_path / "fifo.json")
    for special in (tmp_path / "fifo.json", "/dev/null", tmp_path):
        with pytest.raises(ValueError, match="is no regular file"):
            load_samples(special)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ("[1, 2]", [1, 2]),
        ("[1,\n2]", [1, 2]),
        ("\n[\n[1]\n]\n", [[1]]),
        ('{"conversations": []}\n{"id": 2}\n', [{"conversations": []}, {"id": 2}]),
        ("{'conversations': []}\n{\"id\": 2}\n", [{"conversations": []}, {"id": 2}]),
    ],
)
def test_lists_and_lines_are_told_apart_by_content(write, name, text, samples):
    assert list(load_samples(write(text, name))) == samples


def test_lists_as_lines(write):
    """A list that ends on the first line of JSON Lines, with more to come, is a line."""
    text = "\n[1, 2]\n[3]"
    assert list(load_samples(write(text, "a.jsonl"))) == [[1, 2], [3]]
    with pytest.raises(ValueError, match=r"line 3, column 1: text after the list's end; the text there is '\[3\]'"):
        load_samples(write(text))
    with pytest.raises(ValueError, match=r"line 3, column 2: text after the list's end"):
        load_samples(write("[\n1, 2\n][3]\n", "a.jsonl"))


def test_files_of_something_else(write):
    for text, message in [
        ('{"id": 1}', r"holds a JSON object, expected a list of samples, or .*JSON Lines"),
        ('{\n"conversations": []\n}', "holds a JSON object, expected a list"),
        ('{"id": 1}\n{"conversations": []}', "holds a JSON object, expected a list"),
        ('"text"', "holds a JSON string, expected a list"),
        ("12", "holds a JSON value, expected a list"),
        ("[]", "holds an empty list, expected samples"),
        ("\ufeff [ \n ] ", "holds an empty list, expected samples"),
        ("", "not valid JSON: the file is empty"),
        ("\ufeff \n", "not valid JSON: the file is empty"),
        ("id,image\n1,a.png\n", "not valid JSON at line 1, column 1"),
    ]:
        path = write(text)
        with pytest.raises(ValueError, match=message) as caught:
            load_samples(path)
        assert str(caught.value).startswith(f"{path}: ")
    for text in ("[]", "", "\n"):
        with pytest.raises(ValueError, match="empty"):
            load_samples(write(text, "a.jsonl"))


# -- what is malformed


@pytest.mark.parametrize(
    ("text", "place", "message", "shown"),
    [
        ('[\n{"id": 1 "b": 2}\n]', "line 2, column 10", "Expecting ',' delimiter", '{"id": 1 "b": 2}'),
        ('[{"id": 1},\n {"é画": 1, "b" 2}]', "line 2, column 16", "Expecting ':' delimiter", '{"é画": 1, "b" 2}]'),
        ('[{"id": 1}, {"b" 2}]', "line 1, column 18", "Expecting ':' delimiter", '[{"id": 1}, {"b" 2}]'),
        ('\ufeff[{"b" 2}]', "line 1, column 7", "Expecting ':' delimiter", '[{"b" 2}]'),
        ('[{"id": 1},\n{"id": 2}', "line 2, column 10", "Expecting ',' delimiter", '{"id": 2}'),
        ('[{"id": 1},\n', "line 2, column 1", "Expecting value", ""),
        ('[{"id": 1},\n{"id": "2}]', "line 2, column 8", "Unterminated string", '{"id": "2}]'),
        ('[{"id": 1}\n{"id": 2}]', "line 2, column 1", "Expecting ',' delimiter", '{"id": 2}]'),
        ('[{"id": 1}},\n{"id": 2}]', "line 1, column 11", "Expecting ',' delimiter", '[{"id": 1}},'),
        ('[{"id": 1}]\n\n x', "line 3, column 2", "text after the list's end", "x"),
        ("[1, , 2]", "line 1, column 5", "Expecting value", "[1, , 2]"),
        ("[,]", "line 1, column 2", "Expecting value", "[,]"),
        ("[1,, ]", "line 1, column 4", "Expecting value", "[1,, ]"),
        ('["a\tb"]', "line 1, column 4", "Invalid control character", r"a\tb"),
        ("[1, \0]", "line 1, column 5", "Expecting value", r"[1, \x00]"),
        ("[" + "9" * 5000 + "]", "line 1, column 2", "Exceeds the limit", "9" * 60),
        ("[1, " + "[" * 100000 + "]" * 100000 + "]", "line 1, column 4", "nested too deep", "[1, ["),
        ("[" + "1, " * 100 + "x" * 100 + ", 2" * 100 + "]", "line 1, column 302", "Expecting value", "1, " + "x" * 60),
    ],
)
def test_place_of_a_mistake(write, text, place, message, shown):
    path = write(text)
    with pytest.raises(ValueError) as caught:
        list(load_samples(path))
    found = str(caught.value)
    assert found.startswith(f"{path}: not valid JSON at {place}: {message}")
    assert shown in found and "double quotes" in found and len(found) < len(path) + 500


def test_mistakes_are_found_when_a_sample_is_read(write):
    """One malformed sample leaves the others readable, in any order of asking."""
    lists = load_samples(write('[{"a": 1},\n{"b": },\n3,\n{"c" 4}]'))
    lines = load_samples(write('{"a": 1}\n{"b": }\n\r\n3\n{"c" 4}\n', "a.jsonl"))
    for samples, last in ((lists, 4), (lines, 5)):
        assert samples[2] == 3 and samples[0] == {"a": 1}
        for _ in range(2):
            for index, place in ((3, f"line {last}, column 6"), (1, "line 2, column 7")):
                with pytest.raises(ValueError, match=rf"not valid JSON at {place}: Expecting"):
                    samples[index]
    with pytest.raises(ValueError, match="line 1, column 8: Expecting ',' delimiter"):
        load_samples(write('{"a": 1 \n\n \n{}', "b.jsonl"))[0]


def test_many_mistakes_take_one_reading(write, monkeypatch):
    samples = load_samples(write("mistake\n" * 2000, "a.jsonl"))
    read, taken = data_files._Json.read, 0

    def counted(file, start, size):
        nonlocal taken
        taken += len(data := read(file, start, size))
        return data

    monkeypatch.setattr(data_files._Json, "read", counted)
    for index in range(2000):
        with pytest.raises(ValueError, match=rf"line {index + 1}, column 1"):
            samples[index]
    assert taken < 2000 * 1000


def test_python_is_tried_only_where_it_helps(write, monkeypatch):
    """A large file that was cut off is not converted as a whole."""
    monkeypatch.setattr(data_files, "PYTHON_MARK", None)
    with pytest.raises(ValueError, match="line 2, column 7: Unterminated string"):
        load_samples(write('[{"a": 1},\n{"b": "2'))


PACKED = {
    "gzip": gzip.compress(b'[{"conversations": []}]'),
    "bzip2": bz2.compress(b"[1]"),
    "xz": lzma.compress(b"[1]"),
    "zstd": b"\x28\xb5\x2f\xfd\x04\x00\x19\x00\x00",
    "a zip archive": b"PK\x03\x04\x14\x00",
}


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.json.gz", "train.parquet"])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_files_are_named(write, kind, name):
    path = write(PACKED[kind], name)
    with pytest.raises(
        ValueError, match=f"{re.escape(path)}: is not JSON, Parquet or Arrow: it is .*{kind}; unpack it"
    ):
        load_samples(path)


def test_packed_files_of_a_folder_are_not_left_out(write, tmp_path):
    write("[1]", "a.json")
    path = write(PACKED["gzip"], "b.json.gz")
    with pytest.raises(
        ValueError, match=f"{re.escape(path)}: is packed, and so is not read with its folder; unpack it"
    ):
        load_samples(tmp_path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.parquet", "train.arrow"])
def test_data_files_of_other_kinds(write, name):
    for content, words in (
        (LFS, "a git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html><title>403", "an HTML page, probably what a failed download left"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>", "XML, probably what a failed"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            load_samples(write(content, name))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_parquet_file_under_the_name_of_json(write):
    with pytest.raises(ValueError, match=r"it is a Parquet file; give it a name that ends in \.parquet"):
        load_samples(write(b"PAR1\x15\x04PAR1"))


@pytest.mark.parametrize("text", ['[{"id": "画"}]', "\n\n[1]", '{"id": 1}\n{"id": 2}'])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-32"])
def test_wide_encodings_are_named(write, text, encoding):
    mark = "byte order mark" if encoding == "utf-32" else "without a byte order mark"
    words = f"is not UTF-8 text ({encoding[:6].upper()} {mark} at byte 0); save it as UTF-8"
    for name in ("a.json", "a.jsonl"):
        with pytest.raises(ValueError, match=re.escape(words)):
            load_samples(write(text.encode(encoding), name))


def test_a_file_of_zero_bytes(write):
    """As a file system leaves it that went down while it wrote."""
    with pytest.raises(ValueError, match="begins with zero bytes: it was not written to its end"):
        load_samples(write(bytes(5000)))


def test_systems_that_cannot_read_data(write, monkeypatch):
    path = write("[1]")
    monkeypatch.delattr(os, "pread")
    for paths in (path, [], "none.json"):  # before anything else is said
        with pytest.raises(ValueError, match=r"no os\.pread.*Linux or macOS.*Windows.*WSL") as caught:
            load_samples(paths)
        assert "\n" not in str(caught.value)


def test_a_warning_shows_little_of_a_picture(write, caplog):
    load_samples(write("[{'image': 'data:image/png;base64," + "A" * 1500 + "', 'text': 'it is'}]"))[0]
    (record,) = caplog.records
    assert '"text": "it is"' in record.getMessage() and "A" * 120 not in record.getMessage()


def test_text_that_is_not_utf8(write):
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        mark = "" if encoding == "utf-16" else "\ufeff"
        with pytest.raises(ValueError, match=r"is not UTF-8 text \(UTF-16 .* at byte 0\)"):
            load_samples(write((mark + "[1]").encode(encoding)))
    for content, name in ((b'["\xe9"]', "a.json"), (b'{"\xe9": 1}', "b.json"), (b"\xe9", "c.json")):
        with pytest.raises(ValueError, match=rf"{name}: is not UTF-8 text \(.* at byte \d, line 1\)"):
            load_samples(write(content, name))
    for content, name in ((b'[1,\n"a\xff", 2]', "a.json"), (b'{}\n"\xff"\n2', "b.jsonl")):
        samples = load_samples(write(content, name))
        assert samples[2] == 2
        at = content.index(b"\xff")
        with pytest.raises(ValueError, match=rf"is not UTF-8 text \(invalid start byte at byte {at}, line 2\)"):
            samples[1]


# -- Python's spelling


def test_readme_example(write, caplog):
    path = write(README_EXAMPLE)
    samples = load_samples(path)
    assert len(samples) == 1 and len(samples[0]["conversations"]) == 6
    assert samples[0]["conversations"][1]["content"] == "There are three desserts on the white plate."
    assert samples[0]["conversations"][0]["content"].startswith("<image>\nHow")
    (record,) = caplog.records
    said = record.getMessage()
    assert record.levelno == logging.WARNING and path in said
    assert "single quotes (line 5), a comma before a closing bracket (line 29)" in said
    assert '"image": "path/to/image_0.jpg"' in said
    assert json.loads(said[said.index("{") :]) == samples[0]


@pytest.mark.parametrize(
    ("text", "samples", "what"),
    [
        ("[{'id': 1}]", [{"id": 1}], "single quotes (line 1)"),
        ('[\n{"id": 1,}\n]', [{"id": 1}], "closing bracket (line 2)"),
        ('[1, "a,]",\n]', [1, "a,]"], "closing bracket (line 1)"),
        ("[1, 2\n, ]", [1, 2], "closing bracket (line 2)"),
        ("[[1, ], {'a': [2,],}]", [[1], {"a": [2]}], "closing bracket (line 1), single quotes (line 1)"),
        ("[1,\n{'it': 'it\\'s \"]['}, 2]", [1, {"it": "it's \"]["}, 2], "single quotes (line 2)"),
        ("['say \"hi', '\" [', \"it's\"]", ['say "hi', '" [', "it's"], "single quotes (line 1)"),
        ("[True, 'True', \"None\", False, None]", [True, "True", "None", False, None], "True, False or None (line 1)"),
        ("['\\d', '\\x41\\n', '\\ud83d\\ude00', 'é', '\t']", ["\\d", "A\n", "😀", "é", "\t"], "single quotes"),
        ("['', \"\\\\\", 'a,]', 1]", ["", "\\", "a,]", 1], "single quotes"),
        ("['" + "x" * 5000 + "', 1]", ["x" * 5000, 1], " ..."),
    ],
)
def test_python_is_read_with_a_warning(write, caplog, recwarn, text, samples, what):
    assert list(load_samples(write(text))) == samples
    assert [what in record.getMessage() for record in caplog.records] == [True]
    assert len(caplog.records[0].getMessage()) < 3000 and not recwarn.list


def test_python_in_lines(write, caplog):
    path = write("{\"a\": 1}\n\n{'b': \"it's\",}\n{'c': 3}\n", "a.jsonl")
    samples = load_samples(path)
    assert samples[0] == {"a": 1} and not caplog.records
    assert list(samples) * 2 == [{"a": 1}, {"b": "it's"}, {"c": 3}] * 2
    (record,) = caplog.records
    assert re.search(r"single quotes \(line 3\), a comma before a closing bracket \(line 3\)", record.getMessage())
    assert '"b": "it\'s"' in record.getMessage()
    assert list(pickle.loads(pickle.dumps(samples))) == list(samples) and len(caplog.records) == 1


def test_a_comma_after_the_last_sample_leaves_the_file_lazy(write, caplog):
    samples = load_samples(write('[\n{"a": 1},\n{"b" 2},\n]'))
    assert len(samples) == 2 and "closing bracket (line 3)" in caplog.text
    with pytest.raises(ValueError, match="line 3, column 6"):
        samples[1]


@pytest.mark.parametrize(
    "text",
    [
        "['a' 'b']",
        "['a'\"b\"]",
        "['''a''']",
        "[u'a']",
        "['a\nb']",
        "['\\x4']",
        "['\\\n']",
        "['a\0']",
        "['a",
        "['a\\",
        "['a', \"]",
        "[{'a': [,]}]",
        "[{,}]",
        "[{'a': 1,,}]",
        "[xTrue]",
        "[{True: 1}]",
        "['a'] 'b'",
        "[('a',)]",
        "['a', \"\\x41\"]",
        "[" + "[" * 5000 + "'a'" + "]" * 5000 + "]",
    ],
)
def test_what_is_neither_python_nor_json(write, caplog, text):
    """The error is that of JSON, at its place."""
    path = write(text)
    with pytest.raises(ValueError, match=f"{path}: not valid JSON at line 1, column .* double quotes"):
        list(load_samples(path))
    assert not caplog.records


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(VALUES, min_size=1, max_size=4))
def test_python_literals_mean_what_python_says(scratch, samples):
    text = re.sub(r"\binf\b", "1", repr([None, *samples]))
    path = scratch / "python.json"
    path.write_text(text, encoding="utf-8")
    assert list(load_samples(path)) == eval(text)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    "unit",
    ["'", '"', "\\", "[", "{", "\\'", '\\"', "['a',", ", ", ",", "[,", "[True,", "\0", "\n", "[\n", "'a' ", " '"],
)
def test_hostile_files_are_refused_in_linear_time(write, name, unit):
    for start in ("[", "['", '["'):
        took = []
        for size in (50_000, 200_000):
            path = write(start + unit * (size // len(unit)), name)
            began = time.perf_counter()
            with pytest.raises(ValueError):
                list(load_samples(path))
            took.append(time.perf_counter() - began)
        assert took[1] < 8 * took[0] + 0.5


# -- Parquet and Arrow

PNG = b"\x89PNG no picture, and never decoded"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A dataset with pictures at two depths, in a cache of its own, without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connects"))
    text, picture = datasets.Value("string"), datasets.Image()
    turn = {"role": text, "content": text}
    features = datasets.Features(
        {
            "id": text,
            "image": picture,
            "more": datasets.Sequence(picture),
            "marks": {"<image_00>": picture, "<image_01>": picture},
            "conversations": [turn],
        }
    )
    shown = {"bytes": PNG, "path": None}
    rows = [
        {"id": "a", "image": shown, "more": [], "marks": None, **turns("q", "a")},
        {"id": None, "image": None, "more": [shown, None], "marks": {"<image_01>": shown}, **turns("q")},
    ]
    table = datasets.Dataset.from_list(rows, features=features)
    table.expected = [
        {"id": "a", "image": shown, "more": [], **turns("q", "a")},
        {"more": [shown, None], "marks": {"<image_01>": shown}, **turns("q")},
    ]
    return table


def test_tables(table, tmp_path, capfd, caplog):
    import pyarrow as pa

    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "b.arrow").write_bytes((tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes())
    with pa.OSFile(str(tmp_path / "c.ARROW"), "wb") as sink, pa.ipc.new_file(sink, table.data.schema) as writer:
        writer.write_table(table.data.table)
    capfd.readouterr()
    for name in ("a.parquet", "b.arrow", "c.ARROW", "saved"):
        samples = load_samples(tmp_path / name)
        assert list(samples) == table.expected, name
        assert list(pickle.loads(pickle.dumps(samples))) == table.expected
        assert len(pickle.dumps(samples)) < 2000
        assert samples.folder(0) == str(tmp_path / "saved" if name == "saved" else tmp_path)
        assert samples.location(-1) == (str(tmp_path / name), 1)
    assert capfd.readouterr() == ("", "") and not caplog.records
    mixed = load_samples([tmp_path, tmp_path / "saved"])
    assert list(mixed) == table.expected * 4
    assert list(mixed.without(np.arange(7))) == table.expected[1:]


@pytest.mark.usefixtures("table")
def test_columns_of_json(tmp_path):
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Json"):
        pytest.skip("no such columns in this version of datasets")
    features = datasets.Features({"any": datasets.Json()})
    datasets.Dataset.from_dict({"any": [{"a": 1}, [2]]}, features=features).to_parquet(str(tmp_path / "a.parquet"))
    assert list(load_samples(tmp_path / "a.parquet")) == [{"any": {"a": 1}}, {"any": [2]}]


def test_tables_that_change(table, tmp_path):
    path = tmp_path / "a.parquet"
    table.to_parquet(str(path))
    stored = pickle.dumps(load_samples(path))
    table.select([1]).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"a\.parquet: the file changed while in use"):
        pickle.loads(stored)[0]
    assert list(load_samples(path)) == table.expected[1:]  # not what is cached of the file before


def test_wrong_tables(table, tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa

    table.to_parquet(str(tmp_path / "good.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-9])
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes()[:700])
    (tmp_path / "bad.arrow").write_bytes(b"ARROW1 and no more")
    for name in ("empty.parquet", "cut.parquet", "cut.arrow", "bad.arrow"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read, it may be damaged or empty: "):
            load_samples(tmp_path / name)
    with pa.ipc.new_stream(str(tmp_path / "none.arrow"), table.data.schema):
        pass
    with pytest.raises(ValueError, match=r"none\.arrow: holds no rows"):
        load_samples(tmp_path / "none.arrow")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=rf"several splits; name the folder of one: {tmp_path}/splits/test, .*/train"):
        load_samples(tmp_path / "splits")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"good\.parquet: needs .*pip install datasets, or convert it to JSON Lines"):
        load_samples(tmp_path / "good.parquet")
