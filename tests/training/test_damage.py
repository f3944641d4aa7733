"""Damaged files: each is refused with one line, or loaded with exactly the numbers that were saved.

What would turn this red: a checksum that leaves out the header or a tensor's name, type or shape; a reader that uses a
field before it has checked it; an error of any other kind than UsageError.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import hf_folders
import numpy as np
import pytest
from progress_bars import NoBar
from safetensors.numpy import save_file

from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.optim.state import State
from refimpl.parity import trace
from refimpl.parity.diff import diff_traces
from refimpl.parity.state_dict import import_, to_state_dict
from refimpl.precision.recipes import get_recipe
from refimpl.tools.precision_report.collect import from_checkpoint, from_trace
from refimpl.training import checkpoint
from refimpl.training.checkpoint_states import load_for_inference, load_initial_weights
from refimpl.training.config import Config
from refimpl.training.huggingface.weights import read_model
from refimpl.training.metrics import read_metrics
from refimpl.training.run_folder import CHECKPOINT, open_folder, prepare_folder, read_config
from refimpl.training.trainer import Trainer

TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "batch_size": 2, "steps": 3, "recipe": "fp8-delayed",
    "eval_every": 3, "eval_batches": 1, "sample_bytes": 0, "loss_scale": "deepspeed",
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests write thousands of files that need not outlive a power cut."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A finished run of 3 steps with everything in its checkpoint: FP8 scales, hysteresis, a generator."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "text").write_text("to be or not to be, that is the question; " * 40)
    config, out = prepare_folder({**TINY, "data": str(folder / "text")}, folder / "run", False, False)
    trainer = Trainer(config, out)
    open_folder(config, out)
    assert trainer.train(NoBar())
    return trainer


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes of a file after one accident: bits flipped, a run zeroed or overwritten or moved, a cut, bytes added."""
    while (result := _accident(data, rng)) == data:  # zeros over zeros
        pass
    return result


def small_trace(run: Trainer) -> trace.Trace:
    """One step of a smaller model."""
    small = {"model": "mlp", "n_layer": 1, "n_embd": 2, "block_size": 2, "batch_size": 2, "steps": 1}
    return trace.record(Config.of({**small, "data": run.config.data}))


def _accident(data: bytes, rng: np.random.Generator) -> bytes:
    result, n = bytearray(data), len(data)
    header = min(n, 8 + int.from_bytes(data[:8], "little"))
    start = int(rng.integers(0, header if rng.random() < 0.5 else n))  # the header is small, and half of the accidents hit it
    size = int(rng.integers(1, 64))
    kind = rng.integers(7)
    if kind <= 1:
        for _ in range(1 if kind == 0 else size):
            result[int(rng.integers(start, min(start + 64, n)))] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        result[start : start + size] = bytes(len(result[start : start + size]))
    elif kind == 3:
        result[start : start + size] = rng.bytes(len(result[start : start + size]))
    elif kind == 4:
        other = int(rng.integers(0, n - size))
        result[start : start + size] = data[other : other + len(result[start : start + size])]
    elif kind == 5:
        del result[start : start + size if rng.random() < 0.5 else n]
    else:
        place = start if rng.random() < 0.5 else n
        result[place:place] = rng.bytes(size)
    return bytes(result)


def put(path: Path, data: bytes) -> None:
    """Write a file over what was there: emptying it first takes most of the time of a test that writes thousands."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


def refused(read: Callable[[], Any]) -> bool:
    """Whether `read` refuses a file, in one line. Any other error is this test's failure."""
    try:
        with redirect_stderr(io.StringIO()):
            read()
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
        return True
    return False


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two files' tensors are equal to the bit."""
    return a.keys() == b.keys() and all(
        (a[k].dtype, a[k].shape, a[k].tobytes()) == (b[k].dtype, b[k].shape, b[k].tobytes()) for k in a
    )


def seeds(plain: int) -> pytest.MarkDecorator:
    """So many accidents in the plain tests, and the rest of 10,000 in the slow ones."""
    rest = pytest.param(range(plain, 10_000), marks=pytest.mark.slow)
    return pytest.mark.parametrize("seeds", [range(plain), rest], ids=len)


@seeds(500)
def test_damaged_checkpoints(run: Trainer, seeds: range, tmp_path: Path) -> None:
    whole, path = (run.folder / CHECKPOINT).read_bytes(), tmp_path / "c.safetensors"
    arrays, header = checkpoint.load(run.folder / CHECKPOINT)
    loaded = 0
    for seed in seeds:
        put(path, damaged(whole, np.random.default_rng(seed)))
        if not refused(lambda: checkpoint.load(path)):
            loaded += 1
            there, its_header = checkpoint.load(path)
            assert same(arrays, there) and its_header == header, seed
    print(f"{len(seeds)} damaged checkpoints: {len(seeds) - loaded} refused, {loaded} loaded with the saved numbers")
    assert loaded <= len(seeds) / 100  # what changed a byte, but nothing that it says


@seeds(200)
def test_damaged_traces(seeds: range, tmp_path: Path, run: Trainer) -> None:
    trace.save(tmp_path / "whole", small_trace(run))
    whole, there, path = (tmp_path / "whole").read_bytes(), trace.load(tmp_path / "whole"), tmp_path / "t.safetensors"
    loaded = 0
    for seed in seeds:
        put(path, damaged(whole, np.random.default_rng(seed)))
        if not refused(lambda: trace.load(path)):
            loaded += 1
            again = trace.load(path)
            assert same(there.tensors, again.tensors) and again.config == there.config, seed
    print(f"{len(seeds)} damaged traces: {len(seeds) - loaded} refused, {loaded} loaded with the saved numbers")
    assert loaded <= len(seeds) / 100


@seeds(300)
def test_damaged_folders_of_hugging_face(seeds: range, tmp_path: Path) -> None:
    """They have no checksums: each is refused, or all of its weights can be read in the shapes of the model."""
    folders = [hf_folders.write(tmp_path / table["model_type"], table, hf_folders.tensors_of(table), shards)
               for table, shards in ((hf_folders.LLAMA, 2), (hf_folders.GPT2, 1))]  # fmt: skip
    files = sorted(path for folder in folders for path in folder.iterdir())
    contents = {path: path.read_bytes() for path in files}
    read = 0
    for seed in seeds:
        path = files[seed % len(files)]
        put(path, damaged(contents[path], np.random.default_rng(seed)))
        if not refused(lambda folder=path.parent: dict(read_model(folder)[1])):  # NaN and Inf are seen when a weight is read
            read += 1
            model, weights, _ = read_model(path.parent)
            assert {name: weights[name].shape for name in weights} == {k: p.shape for k, p in model.parameters.items()}, seed
        put(path, contents[path])
    print(f"{len(seeds)} damaged folders: {len(seeds) - read} refused")
    assert 0 < read < len(seeds) / 2


@pytest.mark.parametrize("table", [hf_folders.LLAMA, hf_folders.GPT2], ids=["llama", "gpt2"])
def test_edited_config_json(table: dict[str, Any], tmp_path: Path) -> None:
    """Every key replaced by every thing that it is not, and keys added that change what is computed."""
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 32, "truncate": True}
    more = {"head_dim": 8, "rope_theta": 1e4, "rope_scaling": rope, "sliding_window": 64, "layer_types": ["full_attention"] * 2,
            "partial_rotary_factor": 1.0, "n_inner": 64, "tie_word_embeddings": False}  # fmt: skip
    full = {**table, **more, "tie_word_embeddings": table["model_type"] == "gpt2"}
    folder = hf_folders.write(tmp_path / "m", full, hf_folders.tensors_of(table))
    assert not refused(lambda: read_model(folder))
    outcomes = set()
    for _, edited in edits(full):
        (folder / "config.json").write_text(json.dumps(edited))
        outcomes.add(refused(lambda: read_model(folder)))
    assert outcomes == {True, False}


# -- headers that somebody edited, with a checksum to match, or in the form that had none ---------------------------------

INSTEAD = [float("inf"), float("nan"), -1, 2**70, 1.5, "x\ny", None, [], [1], {}, {"a": 1}, True, -(2**70), 0]


def edits(table: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(place, the table with another value there) for every place in a header, and for it left out."""
    for key, value in table.items():
        for other in (*INSTEAD, KeyError):
            edited = copy.deepcopy(table)
            if other is KeyError:
                del edited[key]
            else:
                edited[key] = other
            yield (*place, key), edited
        if isinstance(value, dict):
            for where, inner in edits(value, (key,)):
                yield (*place, *where), {**table, key: inner}


def write_old(path: Path, arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
    """A checkpoint as version 1 wrote it, without a checksum."""
    save_file(arrays, path, metadata={"refimpl": json.dumps({**header, "version": 1})})


def readers(run: Trainer, path: Path) -> list[Callable[[], Any]]:
    """Everything that reads a checkpoint at `path`, the one in the folder of `run`."""
    state = State(run.model, get_recipe("fp16").state_encodings(), NUMPY)
    return [
        run.load_checkpoint,
        lambda: load_for_inference(path),
        lambda: to_state_dict(path),
        lambda: load_initial_weights(path, run.model, state),
    ]


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_edited_headers(run: Trainer, every: int) -> None:
    """Every field replaced by every thing that it is not: no reader raises anything but UsageError."""
    path = run.folder / CHECKPOINT
    whole = path.read_bytes()
    arrays, header = checkpoint.load(path)
    tried = 0
    needed = {"progress", "generator", "loss_scale", "t", "corpus", "config"}
    try:
        for i, (place, edited) in enumerate(edits(header)):
            if i % every:
                continue
            tried += 1
            (checkpoint.save if i % 2 else write_old)(path, arrays, edited)
            results = [refused(read) for read in readers(run, path)]
            if place[0] in needed and len(place) == 1 and place[0] != "t":
                assert results[0], (place, edited.get(place[0]))  # resuming
            if place[0] in ("model", "sizes") and edited.get(place[0]) != header[place[0]]:
                assert all(results[1:]), (place, edited.get(place[0]))
            if place[:1] == ("sizes",) and len(place) > 1 and {**header["sizes"], **edited["sizes"]} != header["sizes"]:
                assert results[0], (place, edited["sizes"])
    finally:
        path.write_bytes(whole)
    run.load_checkpoint()
    print(f"{tried} edited headers, each read in four ways")


@pytest.mark.parametrize("field, value", [
    ("t", float("inf")), ("t", 2**70), ("t", -1), ("t", 4), ("t", [3]), ("progress", {"step": 3, "skipped": 0}),
    ("progress", {"step": 3, "skipped": 4, "skipped_in_a_row": 0}), ("progress", [1, 2, 3]), ("recipe", ["fp16"]),
    ("loss_scale", {"scale": float("nan")}), ("loss_scale", "dynamic"), ("generator", {"bit_generator": "MT19937"}),
    ("generator", None), ("delayed_scales", 1), ("delayed_scales", "many"), ("corpus", "another"), ("config", 3),
])  # fmt: skip
def test_a_run_does_not_go_on_from_it(run: Trainer, field: str, value: Any) -> None:
    path = run.folder / CHECKPOINT
    whole = path.read_bytes()
    arrays, header = checkpoint.load(path)
    try:
        for write in (checkpoint.save, write_old):
            write(path, arrays, {**header, field: value})
            assert refused(run.load_checkpoint) and refused(lambda: from_checkpoint(run.folder, 1))
    finally:
        path.write_bytes(whole)


def test_an_edited_header_is_noticed_where_the_checksum_was_left(run: Trainer, tmp_path: Path) -> None:
    """Also an edit that makes good sense."""
    arrays, header = checkpoint.load(run.folder / CHECKPOINT)
    text = checkpoint.sealed({**header, "version": 2}, arrays)
    for edited in (text.replace('"seed":0', '"seed":1'), text.replace('"sha256":', '"sha257":')):
        assert edited != text
        save_file(arrays, tmp_path / "c", metadata={"refimpl": edited})
        with pytest.raises(UsageError, match="is damaged"):
            checkpoint.load(tmp_path / "c")
    name = "m.transformer.wpe.weight"
    x = arrays.pop(name)
    for other in ({f"{name}s": x}, {name: x.reshape(-1)}, {name: x.view(np.int32)}, {name: x, "more": x}, {}):
        save_file({**arrays, **other}, tmp_path / "c", metadata={"refimpl": text})
        with pytest.raises(UsageError, match="is damaged"):
            checkpoint.load(tmp_path / "c")
    save_file({**arrays, name: x}, tmp_path / "c", metadata={"refimpl": text})
    checkpoint.load(tmp_path / "c")


# -- other files of a run, and of others ---------------------------------------------------------------------------------


def test_edited_configurations(run: Trainer) -> None:
    path = run.folder / "config.json"
    whole = path.read_text()
    try:
        for i, (_, edited) in enumerate(edits(json.loads(whole))):
            if i % 23 == 0:
                path.write_text(json.dumps(edited))
                refused(lambda: prepare_folder({}, run.folder, True, False))
        for name in ("steps", "lr", "recipe", "seed", "n_layer", "clip"):
            for value in (float("nan"), float("inf"), -1, -1.5, 2**70, "x", [], {}, [1], True):
                if (name, value) != ("lr", 2**70) and (name, value) != ("clip", 2**70):  # large, but numbers
                    path.write_text(json.dumps({**json.loads(whole), name: value}))
                    assert refused(lambda: prepare_folder({}, run.folder, True, False)), (name, value)
        for text in ("", "[]", "3", "[" * 100_000, '{"steps": 1' + "0" * 5000 + "}", "\udcff"):
            path.write_bytes(text.encode("utf-8", "surrogateescape"))
            assert refused(lambda: Config.of(read_config(run.folder))), text[:20]
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("text", ["{}", '{"steps": null}', '{"nothing": 1}'])
def test_a_configuration_without_steps_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config.json is damaged: the number of steps is missing"):
        read_config(tmp_path)


def test_metrics_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_metrics(tmp_path)


def test_damaged_metrics(run: Trainer, tmp_path: Path) -> None:
    """An unfinished last line is what a killed run leaves; anything else is said."""
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "loss": 2.5, "loss_scale": 1.0, "skipped": false}\n{"step": 1, "val_loss": null}\n'
    path.write_text(good + '{"step": 2, "lo')
    assert [len(rows) for rows in read_metrics(tmp_path)] == [1, 1]
    path.write_text(good.rstrip("\n"))
    assert [len(rows) for rows in read_metrics(tmp_path)] == [1, 1]
    bad = [
        "3", "[]", "{}", "{\0", "\udcff", "[" * 100_000, '{"step": "1", "loss": 1}', '{"step": 1e999, "loss": 1}',
        '{"step": 1, "loss": [1]}', '{"step": 1}', '{"step": 2, "val_loss": NaN}', '{"step": -1, "val_loss": 1}',
        '{"step": 1, "loss": 1, "skipped": 2}', '{"step": 1' + "0" * 5000 + "}",
    ]  # fmt: skip
    for line in bad:
        path.write_bytes((line + "\n" + good).encode("utf-8", "surrogateescape"))
        assert refused(lambda: read_metrics(tmp_path)), line[:40]


def test_edited_trace_headers(run: Trainer, tmp_path: Path) -> None:
    made = small_trace(run)
    path = tmp_path / "t"
    header = {"version": 1, "config": made.config, "order": list(made.tensors)}
    for i, (_, edited) in enumerate(edits(header)):
        if i % 59 == 0:
            if i % 2:
                save_file(made.tensors, path, metadata={"refimpl-trace": json.dumps(edited)})
            else:
                checkpoint.write_tensors(path, made.tensors, {"refimpl-trace": checkpoint.sealed(edited, made.tensors)})
            refused(lambda: from_trace(path))
            with redirect_stdout(io.StringIO()):
                refused(lambda: diff_traces(trace.load(path), made))
    for part, value in (("order", [1]), ("order", "all"), ("config", []), ("version", "1"), ("version", 2**70)):
        save_file(made.tensors, path, metadata={"refimpl-trace": json.dumps({**header, part: value})})
        assert refused(lambda: trace.load(path)), (part, value)


def test_a_trace_that_another_program_rewrote_is_read(run: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People change tensors of a trace and keep its metadata; that is no damage, and is told from it."""
    made = small_trace(run)
    trace.save(tmp_path / "ours", made)
    trace.load(tmp_path / "ours")
    assert capsys.readouterr().err == ""
    tensors, metadata = checkpoint.read_tensors(tmp_path / "ours", "trace")
    save_file({**tensors, "1/2.loss": np.asarray(tensors["1/2.loss"] * 2)}, tmp_path / "theirs", metadata=metadata)
    assert trace.load(tmp_path / "theirs").tensors["1/2.loss"] == made.tensors["1/2.loss"] * 2
    assert "rewritten by another program" in capsys.readouterr().err
    save_file(tensors, tmp_path / "foreign", metadata={"refimpl-trace": '{"version": 1}'})
    trace.load(tmp_path / "foreign")
    assert capsys.readouterr().err == ""
    checkpoint.write_tensors(tmp_path / "ours", {**tensors, "1/2.loss": np.asarray(tensors["1/2.loss"] * 2)}, metadata)
    with pytest.raises(UsageError, match="is damaged"):
        trace.load(tmp_path / "ours")


def test_damaged_files_of_pytorch_people(tmp_path: Path) -> None:
    weights = {"transformer.wte.weight": np.ones((256, 4), np.float32), "a": np.ones(3, np.float32)}
    save_file(weights, tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    for seed in range(40):
        (tmp_path / "w").write_bytes(damaged(whole, np.random.default_rng(seed)))
        assert refused(lambda: import_(tmp_path / "w", tmp_path / "out", 1)), seed


def test_an_older_checkpoint_is_read_with_a_note(run: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, header = checkpoint.load(run.folder / CHECKPOINT)
    assert capsys.readouterr().err == ""
    write_old(tmp_path / "c", arrays, header)
    there, its_header = checkpoint.load(tmp_path / "c")
    assert same(arrays, there) and its_header["progress"] == header["progress"]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("note: ") and "before files had a checksum" in err
