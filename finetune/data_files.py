"""Data files: JSON, JSON Lines, Parquet and Arrow, opened lazily.

    samples = load_samples(["data/general", "data/charts.jsonl"])
    samples[7], samples.location(7), samples.folder(7)

In memory are 8 bytes for each sample of a JSON file; the samples stay in the files until they are asked for.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import stat
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from json.decoder import JSONDecodeError, scanstring
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import SHOWN, shown
from finetune.file_kinds import HEAD, kind_of

logger = logging.getLogger(__name__)

LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow")
SUFFIXES = (".json", *LINES, *TABLES)
CHUNK = 4 << 20  # bytes read at once while a file is opened; the scan needs up to 40 times as much memory
OPEN_FILES = 64  # per process; a folder may hold more files than a process may have open
SHOWN_SAMPLE = 2000  # characters of a sample in a warning
# By one of these a sample in any format is known, even one that is not read, whose error says more.
SAMPLES_BEGIN = ("conversations", "messages", "conversation", "instruction", "query", "question", "prompt", "input")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")

BLANKS = " \t\r\n"
TEXT_AFTER = "text after the list's end"
QUOTES, COMMAS, WORDS = "single quotes", "a comma before a closing bracket", "True, False or None"
JSON_WORDS = {"True": "true", "False": "false", "None": "null"}
PYTHON_MARK = re.compile(r"""["']|,(?=[ \t\r\n]*[\]}])|[\[{][ \t\r\n]*,|\b(?:True|False|None)\b""")
SINGLE_QUOTED_MARK = re.compile(r"\\[^\x00\r\n]?|['\x00\r\n]")  # an escape, or what ends the string
PYTHON_ONLY = frozenset("',]}TFN")  # where JSON stops at what Python allows
HINT = "JSON has double quotes (\"id\", not 'id') and no comma before a closing bracket"


def _among(characters: str) -> np.ndarray:
    return np.isin(np.arange(256), list(characters.encode()))


QUOTE, COMMA, CLOSING, BACKSLASH, NEWLINE = b'",]\\\n'
STRUCTURE, TEXT = _among('"[]{},'), ~_among(BLANKS)
STEP = _among("[{").astype(np.int8) - _among("]}")  # in depth
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of a UTF-8 character but its first


class Samples(Sequence):
    """The samples of several files, one after the other. Can be pickled and used after a fork."""

    def __init__(self, paths: Sequence[str], files: Sequence[Sequence], kept: np.ndarray | None = None):
        self.paths = list(paths)
        self._files = files
        self._ends = np.cumsum([len(file) for file in files])
        self._kept = kept

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> Any:
        """The sample, whatever stands there, normally a dict.

        Raises:
            ValueError: when it is malformed, naming file, line and column; when the file changed meanwhile.
        """
        number, index = self._find(index)
        return self._files[number][index]

    def location(self, index: int) -> tuple[str, int]:
        """The file, as it was named, and the sample's index in it, from 0."""
        number, index = self._find(index)
        return self.paths[number], index

    def origin(self, index: int) -> int:
        """The sample's index before any was left out."""
        return index if self._kept is None else int(self._kept[index])

    def folder(self, index: int) -> str:
        """Absolute path of the folder that the sample's file is in; of a saved dataset the folder itself."""
        return self._files[self._find(index)[0]].folder

    def without(self, indices: np.ndarray) -> Samples:
        """The same samples but those at `indices` (int64)."""
        kept = np.arange(len(self)) if self._kept is None else self._kept
        return Samples(self.paths, self._files, np.delete(kept, indices))

    def _find(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]
        if self._kept is not None:
            index = int(self._kept[index])
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)


def load_samples(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> Samples:
    """Open data files: JSON (a list), JSON Lines, Parquet, Arrow, folders of these, datasets saved by `datasets`.

    JSON and JSON Lines are told apart by content. Single quotes and commas before a closing bracket, which are
    Python and not JSON, are read with a warning.

    Raises:
        ValueError: naming the file and the cause: missing, empty, no samples, malformed (line and column), of another
            kind; on a system that cannot read them as they are read here.
    """
    if not hasattr(os, "pread"):
        raise ValueError(
            "this system has no os.pread, with which data files are read: use Linux or macOS, or on Windows the "
            "Windows Subsystem for Linux (WSL)"
        )
    named = [paths] if isinstance(paths, str | os.PathLike) else paths
    found: dict[Path, str] = {}
    for path in (file for name in named for file in _expand(os.fspath(name))):
        real = Path(path).resolve()
        if real in found:
            raise ValueError(f"{path}: is named twice, first as {found[real]}; name each file once")
        found[real] = path
    if not found:
        raise ValueError("no data file is named")
    tables = [Path(path).is_dir() or Path(path).suffix.lower() in TABLES for path in found.values()]
    files = [_Table(p) if table else _open_json(p) for p, table in zip(found.values(), tables, strict=True)]
    return Samples(list(found.values()), files)


def _expand(path: str) -> Iterator[str]:
    """The files meant by a path; a saved dataset counts as one."""
    if not path:
        raise ValueError("an empty path names no data file")
    with _readable(path):
        mode = Path(path).stat().st_mode
        entries = sorted(Path(path).iterdir()) if stat.S_ISDIR(mode) else []
    if stat.S_ISREG(mode) or Path(path, "state.json") in entries:
        yield path
    elif not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: is no regular file; save its content as one")
    elif Path(path, "dataset_dict.json") in entries:
        splits = ", ".join(str(entry) for entry in entries if (entry / "state.json").exists())
        raise ValueError(f"{path}: is a dataset of several splits; name the folder of one: {splits}")
    else:
        files = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and not entry.is_dir()]
        files = [entry for entry in files if not entry.name.startswith(".")]
        packed = [entry for entry in entries if entry.suffix.lower() in PACKED and Path(entry.stem).suffix in SUFFIXES]
        if packed:
            raise ValueError(f"{packed[0]}: is packed, and so is not read with its folder; unpack it, or take it away")
        if not files:
            raise ValueError(f"{path}: is a folder without a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
        for entry in files:
            yield from _expand(str(entry))


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _check_kind(path: str, head: bytes) -> None:
    """
    Raises:
        ValueError: when a file that begins with these bytes is known to be of another kind.
    """
    if kind := kind_of(head):
        raise ValueError(f"{path}: is not JSON, Parquet or Arrow: it is {kind[0]}; {kind[1]}")


def _changed(path: str) -> ValueError:
    return ValueError(f"{path}: the file changed while in use; start again, and leave it alone meanwhile")


class _Descriptor:
    """An open file, closed with the last reference to it."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


_opened = functools.lru_cache(maxsize=OPEN_FILES)(lambda path, _: _Descriptor(path))


class _Json:
    """A JSON list or JSON Lines: where each sample begins.

    Read with `pread`, which unlike a memory map survives a file that is cut off meanwhile, leaves no pages in the
    process's memory, and has no state that processes or threads could share.
    """

    def __init__(self, path: str):
        self.path, self.absolute = path, str(Path(path).absolute())
        self.folder = str(Path(self.absolute).parent)
        with _readable(path):
            self.identity = _identity(Path(path).stat())
        self.size = self.identity[0]
        self.bounds = np.zeros(1, np.int64)  # sample n: from bounds[n] to bounds[n + 1], less the comma
        self.comma = 0
        self.warned = False
        head = self.read(0, HEAD)
        if wide := _wide_encoding(head):
            raise ValueError(f"{path}: is not UTF-8 text ({wide} at byte 0); save it as UTF-8")
        if head and not head.strip(b"\0"):
            raise ValueError(f"{path}: begins with zero bytes: it was not written to its end; copy it anew")
        _check_kind(path, head)
        self.begin = 3 * head.startswith(codecs.BOM_UTF8)
        self._place = (self.begin, 1, 1)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Any:
        text, start = self.text(index)
        try:
            return _loads(text)
        except JSONDecodeError as error:
            failure = error
        try:
            _expect_python(failure)
            value, found = _loads_python(text)
        except JSONDecodeError:
            raise self.malformed(start, failure) from failure
        self.warn(start, text, found, value)
        return value

    def read(self, start: int, size: int) -> bytes:
        with _readable(self.path):
            file = _opened(self.absolute, self.identity)
            data = os.pread(file.number, size, start)
            if _identity(os.fstat(file.number)) != self.identity:
                raise _changed(self.path)
            return data

    def chunks(self, start: int) -> Iterator[tuple[int, bytes]]:
        for at in range(start, self.size, CHUNK):
            yield at, self.read(at, CHUNK)

    def text(self, index: int) -> tuple[str, int]:
        """What stands at a sample's place, and the byte where it begins."""
        start = int(self.bounds[index])
        return self.decode(self.read(start, int(self.bounds[index + 1]) - start - self.comma), start), start

    def decode(self, data: bytes, start: int) -> str:
        try:
            text = data.decode()
            return text.rstrip(BLANKS) or text  # so that what is missing is missed right behind the text
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path}: is not UTF-8 text ({error.reason} at byte {start + error.start}, "
                f"line {self.place(start + error.start)[0]}); save it as UTF-8"
            ) from error

    def first_text(self, start: int) -> int:
        """The first byte from `start` on that is not blank."""
        for at, data in self.chunks(start):
            if text := data.lstrip(BLANKS.encode()):
                return at + len(data) - len(text)
        return self.size

    def place(self, offset: int) -> tuple[int, int]:
        """Line and column, from 1, of a byte. Goes on from the last place asked for: a file of nothing but mistakes
        is read once, not once for each."""
        at, line, column = self._place if self._place[0] <= offset else (self.begin, 1, 1)
        while at < offset:
            data = self.read(at, min(CHUNK, offset - at))
            at += len(data)
            lines = data.count(b"\n")
            end = data.rpartition(b"\n")[2]
            line, column = line + lines, len(end.translate(None, CONTINUATION)) + (1 if lines else column)
        self._place = (at, line, column)
        return line, column

    def malformed(self, start: int, error: JSONDecodeError) -> ValueError:
        """`error` in the text that begins at byte `start`."""
        at = start + len(error.doc[: error.pos].encode())
        message = "Expecting ',' delimiter" if self.comma and error.msg == "Extra data" else error.msg
        line, column = self.place(at)
        reach = 2 * SHOWN  # a character has up to 4 bytes
        before = self.read(max(at - reach, self.begin), min(reach, at - self.begin)).decode(errors="ignore")
        after = self.read(at, reach).decode(errors="ignore")
        there = before.rpartition("\n")[2][-SHOWN // 2 :] + after.partition("\n")[0][: SHOWN // 2]
        return ValueError(
            f"{self.path}: not valid JSON at line {line}, column {column}: {message}; "
            f"the text there is {there.strip()!r}. {HINT}"
        )

    def warn(self, start: int, text: str, found: dict[str, int], sample: Any = None) -> None:
        """Once for a file: what is not JSON in the text that begins at byte `start`, and `sample` in JSON."""
        if self.warned:
            return
        self.warned = True
        lines = {what: self.place(start + len(text[:at].encode()))[0] for what, at in found.items()}
        what = ", ".join(f"{what} (line {line})" for what, line in lines.items())
        spelled = "" if sample is None else f" In JSON:\n{_spelling(sample)}"
        logger.warning("%s: not JSON but Python, which is read too: %s. %s.%s", self.path, what, HINT, spelled)


def _wide_encoding(head: bytes) -> str | None:
    """Which of UTF-32 and UTF-16 a file is in, and how that is seen. Without a byte order mark: by the zero bytes
    beside its first character, which is ASCII in JSON."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32 byte order mark"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16 byte order mark"
    zeros = [byte == 0 for byte in head[:4]]
    if zeros in ([True, True, True, False], [False, True, True, True]):
        return "UTF-32 without a byte order mark"
    if zeros[:2] in ([True, False], [False, True]):
        return "UTF-16 without a byte order mark"
    return None


class _Listed(list):
    """The samples of a file that had to be read as a whole."""

    def __init__(self, samples: Iterable, folder: str):
        super().__init__(samples)
        self.folder = folder


def _open_json(path: str) -> _Json | _Listed:
    file = _Json(path)
    first = file.first_text(file.begin)
    opening = file.read(first, 1)
    if not opening:
        raise ValueError(f"{path}: not valid JSON: the file is empty, expected samples")
    is_lines = Path(path).suffix.lower() in LINES
    if opening == b"[":
        file.bounds, broken = _scan_list(file, first)
        file.comma = 1
        # Text after a list that ends on its first line: in JSON Lines the list is a (wrong) sample of its own.
        if not (is_lines and broken and broken[1] == TEXT_AFTER and _one_line(file, first, int(file.bounds[-1]))):
            return _checked_list(file, first, broken)
        file.comma = 0
    file.bounds = _scan_lines(file, first)
    if not is_lines:
        file.text(0)  # raises where it is not UTF-8
        try:
            sample = file[0]
        except ValueError:
            if opening != b"{":
                raise
            sample = None
        if not (isinstance(sample, dict) and any(field in sample for field in SAMPLES_BEGIN)):
            kind = {b"{": "object", b'"': "string"}.get(opening, "value")
            raise ValueError(
                f"{path}: holds a JSON {kind}, expected a list of samples, or one sample a line (JSON Lines)"
            )
    return file


def _one_line(file: _Json, start: int, end: int) -> bool:
    return file.place(start)[0] == file.place(end)[0]


def _checked_list(file: _Json, first: int, broken: tuple[int, str] | None) -> _Json | _Listed:
    """The file, if its brackets add up and its first sample is JSON; else all of it as Python would read it."""
    trailing = not broken and not file.text(len(file) - 1)[0].strip(BLANKS)
    if trailing and len(file) == 1:
        raise ValueError(f"{file.path}: holds an empty list, expected samples")
    try:
        for index in range(len(file) if broken else 1):
            text, start = file.text(index)
            _loads(text)
    except JSONDecodeError as error:
        try:
            _expect_python(error)  # before all of a large file that was only cut off is read
            text = file.decode(b"".join(data for _, data in file.chunks(first)), first)
            samples, found = _loads_python(text)
        except JSONDecodeError:
            raise file.malformed(start, error) from error
        file.warn(first, text, found, samples[index])
        return _Listed(samples, file.folder)
    if broken:
        raise file.malformed(broken[0], JSONDecodeError(broken[1], "", 0))
    if trailing:
        file.bounds = file.bounds[:-1]
        file.warn(int(file.bounds[-1]) - 1, "", {COMMAS: 0})
    return file


def _scan_list(file: _Json, first: int) -> tuple[np.ndarray, tuple[int, str] | None]:
    """Where the elements of the JSON list at byte `first` begin, and what ends the last one, plus 1; (byte, cause)
    when the brackets do not add up."""
    starts, depth, quoted, escaped = [np.array([first + 1])], 0, 0, False
    for base, data in file.chunks(first):
        chunk = np.frombuffer(data, np.uint8)
        marked = STRUCTURE[chunk]
        backslashes = np.flatnonzero(chunk == BACKSLASH)
        if escaped:
            marked[0] = False
            backslashes = backslashes[backslashes > 0]
        # Of a run of backslashes each escapes the next; the last of an odd run escapes what follows the run.
        run_ends = np.flatnonzero(np.diff(backslashes, append=-1) != 1)
        odd = np.diff(run_ends, prepend=-1) % 2 == 1
        escapes = backslashes[run_ends[odd]] + 1
        escaped = len(escapes) > 0 and escapes[-1] == len(chunk)
        marked[escapes[: len(escapes) - escaped]] = False

        at = np.flatnonzero(marked)
        is_quote = chunk[at] == QUOTE
        inside = np.bitwise_xor.accumulate(is_quote.view(np.uint8)) ^ np.uint8(quoted)
        quoted = int(inside[-1]) if len(at) else quoted
        at = at[(inside == 0) & ~is_quote]
        kind = chunk[at]
        level = depth + np.cumsum(STEP[kind], dtype=np.int64)
        closed = np.flatnonzero(level == 0)[:1]
        if len(closed):
            at, kind, level = (of[: closed[0] + 1] for of in (at, kind, level))
        starts.append(base + at[(kind == COMMA) & (level == 1)] + 1)
        if len(closed):
            end = base + int(at[-1])
            rest = file.first_text(end + 1)
            wrong = kind[-1] != CLOSING
            broken = (end, "Expecting ',' delimiter") if wrong else (rest, TEXT_AFTER) if rest < file.size else None
            return np.concatenate([*starts, [end + 1]]), broken
        depth = int(level[-1]) if len(level) else depth
    return np.concatenate([*starts, [file.size + 1]]), (file.size, "Expecting ',' delimiter")


def _scan_lines(file: _Json, first: int) -> np.ndarray:
    """Where the lines that are not blank begin, from byte `first` on, and the file's end."""
    starts, begun = [], False
    for base, data in file.chunks(first):
        chunk = np.frombuffer(data, np.uint8)
        cuts = np.append(0, np.flatnonzero(chunk == NEWLINE) + 1)
        ended = cuts[-1] == len(chunk)
        cuts = cuts[: len(cuts) - ended]
        filled = np.logical_or.reduceat(TEXT[chunk], cuts)
        goes_on = not ended and (filled[-1] or (begun and len(cuts) == 1))
        filled[0] &= not begun
        starts.append(base + cuts[filled])
        begun = goes_on
    return np.concatenate([*starts, [file.size]])


def _loads(text: str) -> Any:
    """`json.loads`, all of whose errors are JSONDecodeError."""
    try:
        return json.loads(text)
    except JSONDecodeError:
        raise
    except RecursionError as error:
        raise JSONDecodeError("nested too deep to be read", text, 0) from error
    except ValueError as error:  # an integer of thousands of digits
        raise JSONDecodeError(str(error), text, 0) from error


def _expect_python(failure: JSONDecodeError) -> None:
    """Raises `failure` unless it stands where Python's spelling differs from JSON."""
    if failure.doc[failure.pos : failure.pos + 1] not in PYTHON_ONLY:
        raise failure


def _loads_python(text: str) -> tuple[Any, dict[str, int]]:
    """Python's spelling of JSON: single-quoted strings, commas before a closing bracket, True, False, None.

    Returns:
        the value, and where the first of each of these stands.

    Raises:
        JSONDecodeError: when it is not that either.
    """
    pieces, copied, at, found = [], 0, 0, {}
    while mark := PYTHON_MARK.search(text, at):
        (start, at), word = mark.span(), mark[0]
        if word == '"':
            at = scanstring(text, at)[1]
            continue
        if word == "'":
            while (mark := SINGLE_QUOTED_MARK.search(text, at)) and mark[0] not in "'\x00\r\n":
                at = mark.end()
            at = mark.end() if mark and mark[0] == "'" else _fail("Unterminated string", text, start)
            what, piece = QUOTES, json.dumps(_python_string(text[start:at]))
        elif word == ",":
            what, piece = COMMAS, ""
        else:  # a comma after an opening bracket is neither Python nor JSON
            what, piece = WORDS, JSON_WORDS.get(word) or _fail("Expecting value", text, start)
        found.setdefault(what, start)
        pieces += text[copied:start], piece
        copied = at
    return _loads("".join([*pieces, text[copied:]])), found


def _fail(message: str, text: str, at: int) -> Any:
    raise JSONDecodeError(message, text, at)


def _python_string(literal: str) -> str:
    if "\\" not in literal:
        return literal[1:-1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape
            return ast.literal_eval(literal)
    except (SyntaxError, ValueError) as error:
        raise JSONDecodeError(str(error), literal, 0) from error


def _spelling(sample: Any) -> str:
    try:
        text = json.dumps(_brief(sample), indent=2, ensure_ascii=False)
    except RecursionError:
        text = json.dumps(sample, ensure_ascii=False)
    return text if len(text) <= SHOWN_SAMPLE else f"{text[:SHOWN_SAMPLE]} ..."


def _brief(value: Any) -> Any:
    """The same, with what is no sentence, such as a picture in base64, shortened."""
    if isinstance(value, dict):
        return {_brief(name): _brief(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_brief(inner) for inner in value]
    return shown(value, quotes=False) if isinstance(value, str) and not re.search(r"\s", value) else value


class _Table:
    """A Parquet or Arrow file or a saved dataset, through `datasets`; opened again in another process."""

    def __init__(self, path: str):
        self.path, self.absolute = path, Path(path).absolute()
        self.folder = str(self.absolute if self.absolute.is_dir() else self.absolute.parent)
        self.identity = self._identity()
        self._dataset = self._open()
        self._length = len(self._dataset)
        if not self._length:
            raise ValueError(f"{path}: holds no rows, expected samples")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if self._dataset is None:
            self._dataset = self._open()
        try:
            return _without_none(self._dataset[index])
        except Exception as error:  # of a damaged file: of many kinds
            raise ValueError(f"{self.path}: row {index} cannot be read: {_one_line_of(error)}") from error

    def __getstate__(self) -> dict:
        return {**vars(self), "_dataset": None}

    def _identity(self) -> tuple[int, int]:
        with _readable(self.path):
            is_file = self.absolute.is_file()
            return _identity((self.absolute if is_file else self.absolute / "state.json").stat())

    def _open(self) -> Any:
        if self._identity() != self.identity:
            raise _changed(self.path)
        self._check_file()
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"{self.path}: needs the package datasets: pip install datasets, or convert it to JSON Lines"
            ) from error
        bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)
        try:
            dataset = self._load(datasets)
        except Exception as error:  # of a damaged file: of many kinds
            cause = _one_line_of(error)
            raise ValueError(f"{self.path}: cannot be read, it may be damaged or empty: {cause}") from error
        finally:
            datasets.logging.set_verbosity(level)
            if not bars:
                datasets.enable_progress_bars()
        features = {name: _undecoded(feature) for name, feature in dataset.features.items()}
        dataset.info.features = datasets.Features(features)
        return dataset

    def _check_file(self) -> None:
        if self.absolute.is_file():
            with _readable(self.path), self.absolute.open("rb") as file:
                head = file.read(HEAD)
            if not head.startswith((b"PAR1", b"ARROW1")):
                _check_kind(self.path, head)

    def _load(self, datasets: Any) -> Any:
        path = str(self.absolute)
        if self.absolute.is_dir():
            return datasets.load_from_disk(path)
        if self.absolute.suffix.lower() == ".parquet":
            return datasets.Dataset.from_parquet(path)
        with self.absolute.open("rb") as file:
            is_stream = file.read(6) != b"ARROW1"
        if is_stream:
            return datasets.Dataset.from_file(path)
        import pyarrow as pa

        return datasets.Dataset(datasets.table.InMemoryTable(pa.ipc.open_file(pa.memory_map(path)).read_all()))


def _one_line_of(error: Exception) -> str:
    """Other libraries print what they found in a file, in any length."""
    return " ".join(str(error).split())[:300]


def _undecoded(feature: Any) -> Any:
    """A feature of `datasets` with pictures (and sound) left as `{"bytes", "path"}`, at any depth."""
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if getattr(feature, "decode", False) and type(feature).__name__ != "Json":  # JSON kept as text is no picture
        return dataclasses.replace(feature, decode=False)
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    return feature


def _without_none(value: Any) -> Any:
    """Less the fields that are None, with which Arrow fills what other samples have."""
    if isinstance(value, dict) and value.keys() != {"bytes", "path"}:
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
