"""What is printed: for every reader, encoding and terminal, and for none."""

from __future__ import annotations

from refimpl.training.cli import main

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import EXAMPLES, SCRIPTS

from refimpl.errors import UsageError
from refimpl.training.console import count, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a\nb\tc"),
        ("\x1b[31m\a\x0e\r\0\x7f", r"\x1b[31m\x07\x0e\x0d\x00\x7f"),
        ("\x9b31m\u202e\u2028", r"\x9b31m\u202e\u2028"),  # ESC [ in one code, an override of direction, a line's end
        (b"caf\xc3\xa9 \xff\x1b", r"café \xff\x1b"),
        ("\udcff", r"\udcff"),  # a byte of a file's name that is not UTF-8
        ("grüße 数 🙂", "grüße 数 🙂"),
        ("\U000e0001", r"\U000e0001"),
    ],
)
def test_nothing_that_a_terminal_would_obey(text: str | bytes, shown: str) -> None:
    assert printable(text) == shown


def test_every_byte_and_every_character_below_2048_is_harmless() -> None:
    for text in (bytes(range(256)), "".join(map(chr, range(2048)))):
        assert all(c.isprintable() or c in "\n\t" for c in printable(text))


class Pipe(io.TextIOWrapper):
    """Standard output into a pipe whose reader has gone."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        super().__init__(os.fdopen(writer, "wb"))


@pytest.mark.parametrize(("goes_on", "code", "said"), [(False, 0, ""), (True, 7, "continuing without it\n")])
def test_a_reader_who_has_gone(
    goes_on: bool, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def run() -> int:
        print("first")
        print("second")
        done.append(True)
        return 7

    with Pipe() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            main(run, goes_on)
    assert ended.value.code == code and bool(done) == goes_on
    assert capsys.readouterr().err.endswith(said) and (said or not capsys.readouterr().err)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_no_encoding_lacks_a_way_to_print(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        main(lambda: print("\ufffd é 数 \x1b \udcff"))
    stream.seek(0)
    assert ended.value.code == 0 and "\x1b" not in stream.read()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("no\nsuch\x1b file"), 2, "error: no\\nsuch\\x1b file\n"),
        (MemoryError("Unable to allocate 21.8 TiB"), 2, "error: out of memory (Unable to allocate 21.8 TiB)"),
        (MemoryError(), 2, "error: out of memory (no more is available)"),
        (KeyboardInterrupt(), 130, "ended by Ctrl-C\n"),
    ],
)
def test_one_line_for_each_end(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main(run)
    told = capsys.readouterr().err
    assert ended.value.code == code and told.startswith(line) and told.count("\n") == 1


ALL = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem not in EXAMPLES)
ASKED = {"train": "--help", "generate": "--help", "convert": "--help", "trace": "--help", "pytorch_trace": "--help",
         "compare_pytorch": "--help", "bench": "--help", "record_vectors": "--help", "gpu_check": "--predict",
         "compare_recipes": "--help", "inspect_precision": "--help", "loss_scale": "--compare",
         "audit_cost": "--help"}  # fmt: skip


@pytest.mark.parametrize("name", ["recipes", "train", *(pytest.param(n, marks=pytest.mark.slow) for n in ALL)])
def test_no_room_and_no_output_at_all(name: str, tmp_path: Path) -> None:
    """`> /dev/full` and `>&-`: one line each."""
    if name == "record_vectors":
        pytest.importorskip("torch", reason="records PyTorch")
    if name == "freeze_cupy_api":
        pytest.importorskip("cupy", reason="lists CuPy")
    for redirection in ("> /dev/full", ">&-"):
        command = f'exec "{sys.executable}" "{SCRIPTS / name}.py" {ASKED.get(name, "")} {redirection}'
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert done.stderr.count("\n") == 1 and "standard output" in done.stderr, done.stderr
        assert done.returncode in (0, 1)


def test_numbers_of_things_are_singular_for_one() -> None:
    assert [count(n, "step") for n in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
