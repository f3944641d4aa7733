"""refimpl.training.data: the split leaks nothing, batches reach every byte, errors say what to do, n-grams agree with dicts."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from refimpl.errors import UsageError
from refimpl.training import data, ngrams
from refimpl.training.data import Corpus, load_corpus, sample_batch, sequential_batches
from refimpl.training.ngrams import ngram_entropies

pytestmark = pytest.mark.usefixtures("pythons_manual")



def tokens_of(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def assert_same(a: Corpus, b: Corpus) -> None:
    assert a.description == b.description
    assert np.array_equal(a.train, b.train) and np.array_equal(a.valid, b.valid)


# ---------------------------------------------------------------------------------------------------- built-in corpora


def titles(tokens: np.ndarray) -> set[str]:
    return set(re.findall(r"^Topic: (\S+)$", tokens.tobytes().decode(), re.MULTILINE))


def long_paragraphs(tokens: np.ndarray) -> set[str]:
    squeezed = (" ".join(p.split()) for p in re.split(r"\n\s*\n", tokens.tobytes().decode()))
    return {p for p in squeezed if len(p) >= 40}


@pytest.mark.parametrize("seed", range(5))
def test_pydoc_has_every_topic_on_one_side_and_shares_no_paragraph(seed: int) -> None:
    from pydoc_data.topics import topics

    corpus = load_corpus("pydoc", 64, seed)
    train, valid = titles(corpus.train), titles(corpus.valid)
    assert train and valid and not train & valid
    assert train | valid == set(topics)
    # Stronger than by topic: 'compound' quotes the whole of 'if', so a split by topic alone would share paragraphs.
    assert not long_paragraphs(corpus.train) & long_paragraphs(corpus.valid)
    assert 0.05 < corpus.valid.size / (corpus.train.size + corpus.valid.size) <= 0.101


def test_topics_that_share_a_paragraph_are_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    first = "this paragraph is quoted word by word by another topic"
    second = "and this one leads on to a third topic, which quotes only it"
    topics = {
        "alone": "a text of its own, long enough to be a paragraph that counts\n\nSee also:",
        "quoted": f"Quoted\n\n{first}\n\nSee also:",
        # The same paragraph, indented and wrapped at another place.
        "linking": f"Linking\n   \n   {first.replace(' word by', chr(10) + '   word by')}\n\n{second}",
        "third": f"Third\n\n{second}",
    }
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", types.SimpleNamespace(topics=topics))
    families = [titles(tokens_of(b"".join(documents))) for documents in data._topic_families()]
    assert sorted(families, key=len) == [{"alone"}, {"quoted", "linking", "third"}]


@pytest.mark.parametrize("spec", ["pydoc", "stdlib"])
def test_the_seed_decides_the_split_and_nothing_else(spec: str) -> None:
    first = load_corpus(spec, 64, seed=1)
    assert_same(first, load_corpus(spec, 64, seed=1))
    other = load_corpus(spec, 64, seed=2)
    assert first.description["sha256"] != other.description["sha256"]
    assert not np.array_equal(first.valid, other.valid)
    joined = first.train.tobytes() + first.valid.tobytes()
    assert first.description["sha256"] == hashlib.sha256(joined).hexdigest()


def test_another_process_loads_the_same_corpus() -> None:
    program = "from refimpl.training.data import load_corpus; print(load_corpus('pydoc', 64).description['sha256'])"
    seen = set()
    for seed in ("1", "12345"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        seen.add(out.stdout.strip())
    assert len(seen) == 1


def test_no_global_random_state_is_used() -> None:
    source = Path(data.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"\brandom\.(\w+)", source)) == {"Generator", "default_rng"}
    assert not re.search(r"^\s*(import|from) random\b|default_rng\(\)", source, re.MULTILINE)


@pytest.fixture
def fake_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of 20 modules, and of files that do not belong to the corpus."""
    for i in range(20):
        folder = tmp_path / ("package" if i % 2 else ".")
        folder.mkdir(exist_ok=True)
        (folder / f"module{i:02}.py").write_text(f"kept{i:02} = 'x'\n" * (10 + i))
    refused = ["test/t.py", "package/tests/t.py", "site-packages/s.py", "__pycache__/c.py", "config-3.11/p.py"]
    refused += ["_sysconfigdata__linux.py", "sitecustomize.py", "package/notes.txt"]
    for name in refused:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("refused = 1\n" * 5)
    (tmp_path / "package" / "__init__.py").write_text("\n")  # nothing in it: no document
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_stdlib_takes_the_sources_splits_by_file_and_skips_the_rest(fake_stdlib: Path) -> None:
    corpus = load_corpus("stdlib", 16)
    sides = [corpus.train.tobytes().decode(), corpus.valid.tobytes().decode()]
    assert "refused" not in sides[0] + sides[1]
    files = [set(re.findall(r"^# (\S+)$", side, re.MULTILINE)) for side in sides]
    words = [set(re.findall(r"kept\d\d", side)) for side in sides]
    assert not files[0] & files[1] and not words[0] & words[1]
    assert files[0] | files[1] == {f"package/module{i:02}.py" if i % 2 else f"module{i:02}.py" for i in range(20)}
    assert (corpus.description["train_documents"], corpus.description["valid_documents"]) == tuple(map(len, files))


def test_stdlib_does_not_depend_on_where_it_lies(fake_stdlib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_corpus("stdlib", 16)
    moved = fake_stdlib.parent / (fake_stdlib.name + "-moved")
    fake_stdlib.rename(moved)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(moved))
    assert_same(first, load_corpus("stdlib", 16))


# ---------------------------------------------------------------------------------------------------- files


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_a_file_is_mapped_and_split_in_order_whatever_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5 + b"\r\n\x00\xff"  # no valid UTF-8, zero bytes, both line ends
    corpus = load_corpus(write(tmp_path / "weights.bin", content), 8)
    assert isinstance(corpus.train, np.memmap) and isinstance(corpus.valid, np.memmap)
    assert corpus.train.dtype == corpus.valid.dtype == np.uint8
    assert corpus.train.tobytes() + corpus.valid.tobytes() == content
    assert corpus.train.size == len(content) * 9 // 10
    assert not corpus.train.flags.writeable
    assert corpus.description["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_file_beyond_4_gib_is_neither_read_nor_cut(tmp_path: Path) -> None:
    path = tmp_path / "sparse.bin"
    size = 6 << 30
    boundary = size * 9 // 10
    with open(path, "wb") as file:
        file.truncate(size)  # a hole: takes no room on the disk
        file.seek(boundary - 3)
        file.write(b"abc" + b"XYZ")
    corpus = load_corpus(str(path), 2)
    assert corpus.train.size + corpus.valid.size == size
    assert corpus.train[-3:].tobytes() == b"abc" and corpus.valid[:3].tobytes() == b"XYZ"

    class LastStart:
        """Stands in for a Generator: always the last start that integers(low, high) could return."""

        def integers(self, low: int, high: int, size: int) -> np.ndarray:
            return np.full(size, high - 1, np.int64)

    x, y = sample_batch(corpus.train, 1, 2, LastStart())  # type: ignore[arg-type]
    assert x.tolist() == [[*b"ab"]] and y.tolist() == [[*b"bc"]]


def test_a_large_file_is_fingerprinted_by_its_ends_and_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "FINGERPRINT_BLOCK", 16)  # 16 blocks of 16 bytes of 1,000
    content = bytearray(1000)

    def fingerprint() -> object:
        return load_corpus(write(tmp_path / "large.bin", bytes(content)), 8).description

    reference = fingerprint()
    noticed = set()
    for position in range(1000):
        content[position] = 1
        if fingerprint() != reference:
            noticed.add(position)
        content[position] = 0
    assert len(noticed) == 256
    assert noticed >= set(range(16)) | set(range(984, 1000))
    assert max(np.diff(sorted(noticed))) < 1000 / 15  # no stretch of the file is left out


@pytest.mark.parametrize("spec", ["pydoc", "stdlib", "file"])
def test_descriptions_are_json_and_name_no_folder(spec: str, tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", b"some words " * 100)
    corpus = load_corpus(path if spec == "file" else spec, 8)
    text = json.dumps(corpus.description, sort_keys=True)
    assert json.loads(text) == corpus.description
    assert "/" not in text and "\\" not in text
    assert corpus.name == corpus.description["name"] == ("text.txt" if spec == "file" else spec)
    sizes = corpus.description["train_bytes"], corpus.description["valid_bytes"]
    assert sizes == (corpus.train.size, corpus.valid.size)


def test_one_file_in_two_folders_has_one_description(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    content = b"some words " * 100
    first, second = (load_corpus(write(tmp_path / folder / "t.txt", content), 8) for folder in "ab")
    assert_same(first, second)


# ---------------------------------------------------------------------------------------------------- errors


def refusal(spec: str, block_size: int = 8, seed: int = 0) -> str:
    with pytest.raises(UsageError) as caught:
        load_corpus(spec, block_size, seed)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_files_that_cannot_be_used_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "missing.txt")
    assert refusal(missing) == f"no such file: {missing!r}; give 'pydoc', 'stdlib' or the path of a file"
    assert "is a directory; give one file" in refusal(str(tmp_path))
    assert "is empty; give a file" in refusal(write(tmp_path / "empty", b""))
    assert "cannot read 'zero\\x00byte'" in refusal("zero\x00byte")
    assert "no such file: ''" in refusal("")

    forbidden = write(tmp_path / "forbidden", b"x" * 100)

    def refuse(path: str, *args: object, **kwargs: object) -> np.ndarray:  # in place of chmod, which does not stop root
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(np, "memmap", refuse)
    assert refusal(forbidden) == f"cannot read {forbidden!r} (Permission denied); give a file that you may read"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes need a POSIX system")
def test_a_pipe_is_refused_without_waiting_on_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(str(tmp_path / "pipe"))


@pytest.mark.parametrize("block_size", [1, 2, 7, 8, 64])
def test_the_shortest_file_that_is_accepted_is_the_one_the_error_asks_for(block_size: int, tmp_path: Path) -> None:
    enough = 10 * block_size + 1
    message = refusal(write(tmp_path / "short.txt", b"x" * (enough - 1)), block_size)
    assert f"too short for block_size {block_size}:" in message
    assert f"{block_size} for validation, where each part needs at least {block_size + 1} bytes" in message
    assert f"give at least {enough} bytes" in message
    corpus = load_corpus(write(tmp_path / "enough.txt", b"x" * enough), block_size)
    assert sample_batch(corpus.valid, 1, block_size, np.random.default_rng(0))[0].shape == (1, block_size)


def test_other_wrong_input_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "block_size is 0: it must be at least 1" in refusal("pydoc", 0)
    assert "seed of a corpus is -1" in refusal("pydoc", 8, -1)
    assert "'pydoc' is too short for block_size 1000000" in refusal("pydoc", 1_000_000)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "without the sources of its standard library; give 'pydoc'" in refusal("stdlib")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # makes the import fail
    data._documentation.cache_clear()
    assert "without pydoc_data; give 'stdlib'" in refusal("pydoc")


@pytest.mark.parametrize(
    "size, batch, block, said", [(8, 1, 8, "at least 9"), (9, 0, 8, "batch_size is 0"), (9, 1, 0, "block_size 0")]
)
def test_batches_refuse_what_they_cannot_fill(size: int, batch: int, block: int, said: str) -> None:
    tokens = tokens_of(bytes(size))
    with pytest.raises(UsageError, match=said):
        sample_batch(tokens, batch, block, np.random.default_rng(0))
    with pytest.raises(UsageError, match=said):
        next(sequential_batches(tokens, batch, block))


# ---------------------------------------------------------------------------------------------------- batches


def test_y_is_x_shifted_by_one() -> None:
    tokens = tokens_of(bytes(range(200)))
    x, y = sample_batch(tokens, 16, 12, np.random.default_rng(0))
    assert x.shape == y.shape == (16, 12) and x.dtype == y.dtype == np.int64
    assert np.array_equal(y, x + 1)  # token i is i, so the next byte is one more
    assert np.array_equal(x, x[:, :1] + np.arange(12))
    assert len(set(x[:, 0].tolist())) > 8  # rows differ


def test_bytes_above_127_stay_positive() -> None:
    x, y = sample_batch(tokens_of(b"\xff" * 20), 2, 4, np.random.default_rng(0))
    assert (x == 255).all() and (y == 255).all()


def test_every_start_is_reachable_also_the_last() -> None:
    tokens = tokens_of(bytes(range(10)))
    x, y = sample_batch(tokens, 2000, 4, np.random.default_rng(0))
    starts = Counter(x[:, 0].tolist())
    assert set(starts) == {0, 1, 2, 3, 4, 5}  # 10 - 4 starts; the last one predicts the last byte
    assert y.max() == 9
    # Each count is binomial(2000, 1/6): mean 333, standard deviation 17; five of them for a fixed seed.
    assert all(abs(count - 2000 / 6) < 5 * 17 for count in starts.values())


def test_a_text_of_one_block_gives_that_block() -> None:
    x, y = sample_batch(tokens_of(b"abcde"), 3, 4, np.random.default_rng(0))
    assert x.tolist() == [[*b"abcd"]] * 3 and y.tolist() == [[*b"bcde"]] * 3


def test_the_generator_alone_decides_the_batch() -> None:
    tokens = load_corpus("pydoc", 64).train
    draw = [sample_batch(tokens, 4, 64, np.random.default_rng(seed))[0] for seed in (7, 7, 8)]
    assert np.array_equal(draw[0], draw[1]) and not np.array_equal(draw[0], draw[2])


@pytest.mark.parametrize("size", [5, 8, 9, 33, 34, 40])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_sequential_batches_predict_each_byte_once_up_to_the_tail(size: int, batch_size: int) -> None:
    tokens = tokens_of(bytes(range(size)))
    batches = list(sequential_batches(tokens, batch_size, 4))
    predicted = np.concatenate([y.ravel() for _, y in batches]).tolist()
    assert predicted == list(range(1, 1 + (size - 1) // 4 * 4))
    assert size - 1 - len(predicted) < 4  # the tail that is dropped is shorter than a block
    assert all(np.array_equal(y, x + 1) for x, y in batches)
    assert all(x.shape == (batch_size, 4) for x, _ in batches[:-1])
    assert 1 <= len(batches[-1][0]) <= batch_size


def test_the_limit_counts_blocks_whatever_the_batch_size() -> None:
    tokens = tokens_of(bytes(range(100)))
    for batch_size in (1, 3, 7, 50):
        rows = np.concatenate([x for x, _ in sequential_batches(tokens, batch_size, 4, limit=7)])
        assert rows[:, 0].tolist() == [0, 4, 8, 12, 16, 20, 24]
    assert list(sequential_batches(tokens, 2, 4, limit=0)) == []
    assert sum(len(x) for x, _ in sequential_batches(tokens, 5, 4, limit=1000)) == 24


# ---------------------------------------------------------------------------------------------------- n-grams


def brute_force_entropy(train: list[bytes], valid: list[bytes], n: int) -> float:
    """The definition, n-gram by n-gram, over separate stretches of text."""
    grams, contexts, losses = Counter[bytes](), Counter[bytes](), []
    for block in train:
        for i in range(len(block) - n + 1):
            grams[block[i : i + n]] += 1
            contexts[block[i : i + n - 1]] += 1
    for block in valid:
        for i in range(len(block) - n + 1):
            p = (grams[block[i : i + n]] + 0.01) / (contexts[block[i : i + n - 1]] + 2.56)
            losses.append(-math.log(p))
    return math.fsum(losses) / len(losses)


TEXT = b"the cat sat on the mat; the rat sat on the cat. \xff\xfe\x00 and that was that" * 3


@pytest.mark.parametrize("piece", [ngrams.PIECE, 7], ids=["one piece", "many pieces"])
def test_ngram_entropies_are_the_definition(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "PIECE", piece)  # no n-gram may be lost or counted twice where two pieces meet
    train, valid = TEXT, b"a rat that sat on that hat was the cat's\xff\xfe!"
    found = ngram_entropies(tokens_of(train), tokens_of(valid))
    assert (found.train_bytes, found.valid_bytes, found.sampled) == (len(train), len(valid), False)
    assert sorted(found.entropies) == [1, 2, 3]
    for n, entropy in found.entropies.items():
        # Sums of some 40 doubles: relative error below 40 * 2**-53, far under 1e-13.
        assert entropy == pytest.approx(brute_force_entropy([train], [valid], n), rel=1e-13, abs=0)


def test_large_parts_are_counted_in_evenly_spaced_blocks() -> None:
    rng = np.random.default_rng(0)
    train, valid = (rng.integers(97, 101, size, np.uint8) for size in (5000, 3000))
    train[-1] = 255  # the last block reaches the end
    found = ngram_entropies(train, valid, max_train_bytes=64 * 10, max_valid_bytes=64 * 5 + 63)
    assert (found.train_bytes, found.valid_bytes, found.sampled) == (640, 320, True)
    blocks = []
    for tokens, length in ((train, 10), (valid, 5)):
        starts = [(tokens.size - length) * i // 63 for i in range(64)]
        assert starts[-1] + length == tokens.size
        blocks.append([tokens[start : start + length].tobytes() for start in starts])
    for n, entropy in found.entropies.items():
        assert entropy == pytest.approx(brute_force_entropy(*blocks, n), rel=1e-12, abs=0)
    whole = ngram_entropies(train, valid)
    assert not whole.sampled and whole.entropies != found.entropies


def test_uniform_bytes_cost_ln_256() -> None:
    rng = np.random.default_rng(0)
    train, valid = (rng.integers(0, 256, 200_000, np.uint8) for _ in range(2))
    # The unigram model is 255 fitted parameters: an excess of about 255 / (2 * 200,000) = 6e-4 nats is expected.
    assert 0 < ngram_entropies(train, valid).entropies[1] - math.log(256) < 2 * 255 / (2 * 200_000)


def test_an_unseen_context_costs_ln_256_and_a_certain_one_nearly_nothing() -> None:
    unseen = ngram_entropies(tokens_of(b"ab" * 500), tokens_of(b"yz" * 10)).entropies
    assert unseen[2] == unseen[3] == pytest.approx(math.log(256))
    certain = ngram_entropies(tokens_of(b"ab" * 500), tokens_of(b"ab" * 10)).entropies
    assert certain[1] == pytest.approx(math.log(2), abs=0.01)
    assert 0 < certain[2] < 0.01 and 0 < certain[3] < 0.01


def test_an_n_that_has_no_whole_context_is_left_out() -> None:
    assert sorted(ngram_entropies(tokens_of(TEXT), tokens_of(b"ab")).entropies) == [1, 2]


def test_longer_contexts_predict_the_default_corpus_better() -> None:
    corpus = load_corpus("pydoc", 64)
    entropies = ngram_entropies(corpus.train, corpus.valid).entropies
    assert math.log(256) > entropies[1] > entropies[2] > entropies[3] > 0


def test_a_mapped_file_has_the_same_baselines_as_its_bytes(tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path / "t.txt", TEXT * 5), 8)
    copies = (tokens_of(part.tobytes()) for part in (corpus.train, corpus.valid))
    assert ngram_entropies(corpus.train, corpus.valid) == ngram_entropies(*copies)
