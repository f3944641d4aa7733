"""refimpl.training.tokenizer, token_cache: ids and bytes of a text, streams that take nothing back, caches that are checked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from progress_bars import Terminal
from tiny_tokenizers import END, TEXT, Pairs, byte_level, saved, sentence_pieces

from refimpl.errors import UsageError
from refimpl.training import checkpoint, token_cache
from refimpl.training.data import load_corpus
from refimpl.training.token_cache import encode_text, tokenized
from refimpl.training.tokenizer import BYTES, Tokenizer, load_tokenizer, refuse_smaller


@pytest.fixture(autouse=True)
def cache_of_the_user(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "refimpl"


def array(text: str | bytes) -> np.ndarray:
    return np.frombuffer(text if isinstance(text, bytes) else text.encode(), np.uint8)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_are_their_own_ids() -> None:
    ids, lengths = BYTES.encode(bytes(range(256)))
    assert ids.dtype == BYTES.dtype == np.uint8 and ids.tolist() == [*range(256)] and lengths.tolist() == [1] * 256
    assert load_tokenizer("bytes") is BYTES
    text = array(TEXT)
    ids, lengths = encode_text(BYTES, text)
    assert ids is text and lengths.shape == text.shape and lengths.strides == (0,)  # nothing is copied


def written(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The pieces of a stream."""
    stream = tokenizer.stream()
    return [*(stream.add(token) for token in ids), stream.rest()]


def test_a_stream_of_bytes_holds_back_a_character_until_it_is_whole() -> None:
    assert written(BYTES, [*"aé😀".encode()]) == ["a", "", "é", "", "", "", "😀", ""]
    assert written(BYTES, [*"😀".encode()[:3]]) == ["", "", "", r"\xf0\x9f\x98"]
    assert written(BYTES, [0x61, 0xFF, 0xC3, 0x62]) == ["a", r"\xff", "", r"\xc3b", ""]
    rng = np.random.default_rng(0)
    for _ in range(20):
        data = rng.integers(0, 256, 200, np.uint8).tobytes()
        assert "".join(written(BYTES, [*data])) == data.decode("utf-8", "backslashreplace")


def test_what_is_still_held_back_can_be_asked_for_between_tokens() -> None:
    stream = BYTES.stream()
    assert stream.add(0xC3) == "" and stream.rest() == r"\xc3"
    assert stream.add(0x61) == "a" and stream.rest() == ""


# ------------------------------------------------------------------------------------------------------- tokenizer.json


def kinds(folder: Path) -> dict[str, Path]:
    """Tokenizers of the kinds that models have."""
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre.Split(tokenizers.Regex(llama3), "isolated")
    byte = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    return {
        "gpt2": byte_level(folder / "gpt2"),
        "llama3": byte_level(folder / "llama3", pre_tokenizer=pre.Sequence([split, byte])),
        "smollm": byte_level(folder / "smollm", pre_tokenizer=pre.Sequence(digits)),
        "llama2": sentence_pieces(folder / "llama2"),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return kinds(tmp_path_factory.mktemp("tokenizers"))


KINDS = ("gpt2", "llama3", "smollm", "llama2")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_package(kind: str, files: dict[str, Path]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ours, theirs = load_tokenizer(str(files[kind])), tokenizers.Tokenizer.from_file(str(files[kind]))
    assert ours.vocab_size == theirs.get_vocab_size() and ours.dtype == np.uint16
    ids, lengths = ours.encode(TEXT.encode())
    assert ids.dtype == np.uint16 and ids.tolist() == theirs.encode(TEXT, add_special_tokens=False).ids
    assert lengths.sum() == len(TEXT.encode()) > len(ids) and lengths.min() >= 0
    assert load_tokenizer(str(files[kind].parent)).checksum == ours.checksum  # its folder will do


def test_each_token_of_whole_characters_has_the_bytes_that_it_stands_for(files: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(files["gpt2"]))
    ids, lengths = tokenizer.encode(TEXT.encode())
    for i, length in zip(ids.tolist(), lengths.tolist(), strict=True):
        piece = "".join(written(tokenizer, [i]))
        if "\ufffd" not in piece:
            assert length == len(piece.encode())
    # A character of several tokens is counted once, with the first of them.
    character, rest = tokenizer.encode("𝄞x".encode())
    assert len(character) == 5 and rest.tolist() == [4, 0, 0, 0, 1]


def test_bytes_that_a_tokenizer_leaves_out_count_with_the_token_after_them(tmp_path: Path) -> None:
    """Also those at the end, with the last token: so that bits per byte are over all of the text."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "é": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = load_tokenizer(str(saved(words, tmp_path)))
    ids, lengths = tokenizer.encode("  a é  xyz é  \n".encode())
    assert ids.tolist() == [0, 1, 2, 1] and lengths.tolist() == [3, 3, 5, 6]
    assert [part.tolist() for part in tokenizer.encode(b"   ")] == [[], []]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_the_text_of_all_tokens_and_takes_nothing_back(kind: str, files: dict[str, Path]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer, theirs = load_tokenizer(str(files[kind])), tokenizers.Tokenizer.from_file(str(files[kind]))
    ids = tokenizer.encode(TEXT.encode())[0].tolist()
    pieces = written(tokenizer, ids)
    assert "".join(pieces) == theirs.decode(ids) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(piece != "" for piece in pieces) > len(ids) / 2  # most tokens appear at once
    cut = ids[: next(i for i, piece in enumerate(pieces) if piece == "" and i > 5) + 1]  # ends in half a character
    assert "".join(written(tokenizer, cut)) == theirs.decode(cut)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_any_tokens_comes_to_an_end(kind: str, files: dict[str, Path]) -> None:
    """Of random tokens most are no text. What is held back stays short, and all whole characters are there."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer, theirs = load_tokenizer(str(files[kind])), tokenizers.Tokenizer.from_file(str(files[kind]))
    for seed in range(10):
        ids = np.random.default_rng(seed).integers(1, tokenizer.vocab_size, 200).tolist()
        pieces = written(tokenizer, ids)
        quiet = max(len(run) for run in "".join("." if piece else "x" for piece in pieces).split("."))
        assert quiet <= 17
        strip = str.maketrans("", "", "\ufffd")
        if kind != "llama2":  # there a run of bytes is text or not as a whole, however far it goes on
            assert "".join(pieces).translate(strip) == theirs.decode(ids).translate(strip)


def test_special_tokens_are_read_end_texts_and_do_not_show(files: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(files["gpt2"]))
    ids, lengths = tokenizer.encode(f"a{END}b".encode())
    assert tokenizer.ends == {0} and ids[1] == 0 and lengths.tolist() == [1, len(END), 1]
    assert "".join(written(tokenizer, ids.tolist())) == "ab"


def test_settings_of_a_file_that_would_change_a_corpus_are_off(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = byte_level(tmp_path)
    plain = load_tokenizer(str(path)).encode(TEXT.encode())[0]
    changed = tokenizers.Tokenizer.from_file(str(path))
    changed.enable_truncation(8)
    changed.enable_padding(length=1000)
    changed.model.dropout = 0.5
    changed.post_processor = tokenizers.processors.TemplateProcessing(f"{END} $A", special_tokens=[(END, 0)])
    assert changed.encode(TEXT).ids != plain.tolist()
    other = load_tokenizer(str(saved(changed, tmp_path / "changed")))
    assert np.array_equal(other.encode(TEXT.encode())[0], plain)


@pytest.mark.parametrize(("size", "kind"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_ids_are_in_the_smallest_type(size: int, kind: type, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"a": 0, "b": size - 1}, unk_token="a")  # ids may have gaps
    tokenizer = load_tokenizer(str(saved(tokenizers.Tokenizer(words), tmp_path)))
    ids, _ = tokenizer.encode(b"b")
    assert tokenizer.vocab_size == size and ids.dtype == kind and ids.tolist() == [size - 1]


def test_files_that_are_no_tokenizers_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    assert "no such tokenizer: " in refusal(lambda: load_tokenizer(str(tmp_path / "missing.json")))
    assert "tokenizer.json'; give 'bytes', a tok" in refusal(lambda: load_tokenizer(str(tmp_path)))
    assert "cannot read the tokenizer 'zero\\x00byte'" in refusal(lambda: load_tokenizer("zero\x00byte"))
    path = tmp_path / "tokenizer.json"
    whole = byte_level(tmp_path / "good").read_bytes()
    for contents in (b"", b"{}", b"[1]", b"\xff\xfe", whole[:-5], whole[: len(whole) // 2], b"[" * 100_000, b'{"model": 3}'):
        path.write_bytes(contents)
        assert f"{path} is not a tokenizer.json: " in refusal(lambda: load_tokenizer(str(path)))
    tokenizers = pytest.importorskip("tokenizers")
    empty = saved(tokenizers.Tokenizer(tokenizers.models.BPE()), tmp_path / "empty")
    assert refusal(lambda: load_tokenizer(str(empty))).endswith("is not a tokenizer.json: it has no tokens")

    def refuse(path: Path) -> bytes:  # in place of chmod, which does not stop root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal(lambda: load_tokenizer("t.json")) == "cannot read the tokenizer 't.json': Permission denied"


def test_without_the_package_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # makes the import fail
    assert refusal(lambda: load_tokenizer(str(tmp_path))).endswith("needs the package tokenizers: pip install tokenizers")


def test_a_vocabulary_must_have_all_ids_of_the_tokenizer() -> None:
    refuse_smaller(BYTES, 256, "--vocab-size")
    said = refusal(lambda: refuse_smaller(BYTES, 255, "--vocab-size"))
    assert "--vocab-size is 255, but text is read and written as bytes" in said
    pairs = Pairs()
    refuse_smaller(pairs, 65792, "x")
    assert refusal(lambda: refuse_smaller(pairs, 65791, "the vocabulary of M")).startswith(
        "the vocabulary of M is 65791, but pairs has 65792 ids: it is the tokenizer of another model"
    )


# --------------------------------------------------------------------------------------------------------------- pieces


LINES = (TEXT + "\n") * 20


@pytest.mark.parametrize("kind", ("gpt2", "llama3", "smollm"))
def test_pieces_have_the_tokens_of_the_whole_text(kind: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(files[kind]))
    whole = tokenizer.encode(LINES.encode())
    monkeypatch.setattr(token_cache, "PIECE", 200)
    pieces = encode_text(tokenizer, array(LINES))
    assert np.array_equal(pieces[0], whole[0]) and np.array_equal(pieces[1], whole[1])


def test_a_piece_without_lines_or_words_ends_with_a_whole_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "PIECE", 10)
    cut = lambda text: token_cache._cut(text.encode()[:11])  # noqa: E731
    assert cut("ab\ncd\nef gh ij") == 6  # after the last line whose successor begins with a character
    assert cut("ab\ncd\n\n  gh ij") == 3
    assert cut("ab cd ef gh ij") == 8  # before the last word
    assert cut("a\n漢字漢字漢字") == 2
    assert cut("漢字漢字漢字") == 9
    assert cut("abcdefghijklmn") == 10
    assert token_cache._cut(b"\x80" * 11) == 10  # no text at all
    assert token_cache._cut(b"short") == 5


def test_bytes_that_are_no_text_are_named_with_their_place(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "PIECE", 64)
    content = bytearray(LINES.encode())
    for place in (50, 1000, len(content) - 20):
        content[place] = 0xFF
        (tmp_path / "t.txt").write_bytes(content)
        said = refusal(lambda: load_corpus(str(tmp_path / "t.txt"), 8, tokenizer=load_tokenizer(str(files["gpt2"]))))
        assert f"t.txt cannot be tokenized: byte {place}, 0xff, is not UTF-8: " in said
        content[place] = 0x20


def test_long_texts_show_their_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    encode_text(Pairs(), array(LINES))
    assert terminal.getvalue() == ""  # it took less than five seconds
    monkeypatch.setattr(token_cache, "PATIENCE", 0.0)
    encode_text(Pairs(), array(LINES))
    assert "tokenizing: 100%" in terminal.getvalue()


# ---------------------------------------------------------------------------------------------------------------- cache


def make(tokenizer: Tokenizer, folder: Path | None, text: bytes = b"some words and more " * 20) -> token_cache.TokenizedParts:
    part = array(text)
    return tokenized(tokenizer, part[:300], part[300:], "t.txt", folder)


def same(a: token_cache.TokenizedParts, b: token_cache.TokenizedParts) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def test_tokens_are_computed_once(tmp_path: Path, cache_of_the_user: Path) -> None:
    pairs = Pairs()
    first = make(pairs, tmp_path)
    assert first.train.dtype == np.uint32 and first.valid_lengths.dtype == np.uint8
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt.pppppppppppp.tokens"] and not cache_of_the_user.exists()
    assert pairs.calls == 2 and same(first, make(pairs, tmp_path)) and pairs.calls == 2


def test_a_cache_of_another_text_or_tokenizer_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, other = Pairs(), Pairs()
    make(pairs, tmp_path)
    make(pairs, tmp_path, b"other words" * 40)
    path = tmp_path / "t.txt.pppppppppppp.tokens"
    assert capsys.readouterr().err == f"note: {path} has the tokens of another text; the text is tokenized again\n"
    other.checksum = "p" * 63 + "q"
    make(other, tmp_path, b"other words" * 40)
    assert capsys.readouterr().err == f"note: {path} has the tokens of another tokenizer; the text is tokenized again\n"
    calls = other.calls
    make(other, tmp_path, b"other words" * 40)
    assert other.calls == calls and capsys.readouterr().err == ""
    part = array(b"other words" * 40)
    tokenized(other, part[:301], part[301:], "t.txt", tmp_path)  # the same text, divided at another place
    assert "of another text" in capsys.readouterr().err


def test_a_damaged_cache_is_noticed_and_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = Pairs()
    good = make(pairs, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = [b"", whole[:-1], whole[:50], b"x" * 100, whole + b"x", *(_flipped(whole, i) for i in range(0, len(whole), 97))]
    for contents in damaged:
        path.write_bytes(contents)
        calls = pairs.calls
        assert same(good, make(pairs, tmp_path))
        said = capsys.readouterr().err
        assert pairs.calls > calls and said.startswith(f"note: {path} ") and said.endswith("tokenized again\n")
        assert path.read_bytes() == whole


def _flipped(contents: bytes, place: int) -> bytes:
    return contents[:place] + bytes([contents[place] ^ 1]) + contents[place + 1 :]


def test_a_folder_that_cannot_be_written_to_leaves_the_cache_of_the_user(
    tmp_path: Path, cache_of_the_user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, forbidden = checkpoint.save, [tmp_path]

    def refuse(path: Path, *rest: Any) -> None:  # in place of chmod, which does not stop root
        if any(folder in path.parents for folder in forbidden):
            raise UsageError(f"cannot write {path}: Read-only file system")
        save(path, *rest)

    monkeypatch.setattr(checkpoint, "save", refuse)
    pairs = Pairs()
    first = make(pairs, tmp_path)
    assert not [*tmp_path.iterdir()] and len([*cache_of_the_user.rglob("*.tokens")]) == 1
    assert same(first, make(pairs, tmp_path)) and pairs.calls == 2 and capsys.readouterr().err == ""
    forbidden.append(cache_of_the_user)
    text = b"something else" * 40
    assert same(make(pairs, tmp_path, text), make(pairs, tmp_path, text)) and pairs.calls == 6
    assert capsys.readouterr().err.startswith("note: the tokens are not kept, and the next run computes them again: cannot")


def test_a_user_without_a_cache_folder_has_it_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_cache.user_cache() == Path(os.path.expanduser("~")) / ".cache" / "refimpl"


# --------------------------------------------------------------------------------------------------------------- corpora


def test_a_corpus_under_a_tokenizer_is_the_same_text_with_the_same_split(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    for more in range(4):  # 90 % of the bytes end at each byte of a character
        path.write_text("é" * 100 + "漢😀" * 50 + "x" * more)
        plain, other = load_corpus(str(path), 8), load_corpus(str(path), 8, tokenizer=Pairs())
        assert 0 <= plain.valid.size - other.valid_lengths.sum() <= 3
        text = path.read_bytes()
        text[len(text) - int(other.valid_lengths.sum()) :].decode()  # begins with a whole character
    assert other.description["tokenizer"] == Pairs.checksum and other.description["sha256"] == plain.description["sha256"]
    assert (other.description["train_tokens"], other.description["valid_tokens"]) == (other.train.size, other.valid.size)
    assert "tokenizer" not in plain.description


def test_built_in_texts_are_cached_by_the_user(cache_of_the_user: Path) -> None:
    pairs = Pairs()
    corpus = load_corpus("pydoc", 64, tokenizer=pairs)
    calls = pairs.calls
    again = load_corpus("pydoc", 64, tokenizer=pairs)
    assert pairs.calls == calls and np.array_equal(corpus.valid, again.valid)
    assert len([*cache_of_the_user.rglob("*.tokens")]) == 1
    load_corpus("pydoc", 64, seed=1, tokenizer=pairs)
    assert pairs.calls > calls and len([*cache_of_the_user.rglob("*.tokens")]) == 2


def test_a_text_with_too_few_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 100)
    load_corpus(str(tmp_path / "t.txt"), 4, tokenizer=Pairs())
    said = refusal(lambda: load_corpus(str(tmp_path / "t.txt"), 5, tokenizer=Pairs()))
    assert "45 tokens for training and 5 for validation, where each part needs at least 6 tokens" in said
