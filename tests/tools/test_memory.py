"""The ledger: every published figure, ZeRO's shards, and what the script says of bad arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT, SCRIPTS
from script_loader import load_script, run_here

from refimpl.distributed.zero import per_rank
from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.llama import LlamaConfig, llama_model
from refimpl.optim.state import State
from refimpl.precision.policy_variants import with_attention
from refimpl.precision.recipes import RECIPES, get_recipe
from refimpl.tools.memory.choice import choose
from refimpl.tools.memory.report import ledger, ledger_data, ledger_text, own_activations, published
from refimpl.tools.memory.states import (
    CONVENTIONS,
    FLAGS,
    GB,
    PRESETS,
    Architecture,
    published_activations,
    zero_table,
)
from refimpl.training.activation_memory import gpt_activations, llama_activations, moments, nbytes
from refimpl.training.config import Config
from refimpl.training.huggingface.config_json import read_config
from refimpl.training.memory_limits import GIB

SCRIPT = SCRIPTS / "memory.py"


def run(*words: str) -> int:
    module = load_script("memory")
    code: int = module.run(vars(module.parser().parse_args(words)))
    return code


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "published"),
    [("gpt2-xl", 1_557_611_200), ("llama-7b", 6_738_415_616), ("mistral-7b", 7_241_732_096), ("llama-3.2-1b", 1_235_814_400),
     ("llama-3.1-8b", 8_030_261_248), ("qwen3-0.6b", 596_049_920), ("smollm2-135m", 134_515_008)],
)
def test_presets_have_the_published_number_of_parameters(preset: str, published: int) -> None:
    assert PRESETS[preset].n_params == published


def test_gpt3_is_called_175b() -> None:
    assert round(PRESETS["gpt3-175b"].n_params / 1e9) == 175


@pytest.mark.parametrize("sizes", [(1, 1, 8, 4, 11), (4, 4, 128, 64, 256), (3, 2, 20, 7, 50)])
def test_the_formula_counts_our_own_activations(sizes: tuple[int, int, int, int, int]) -> None:
    L, H, C, T, V = sizes
    architecture = Architecture("ours", L, H, C, T, V, "")
    assert architecture.n_params == gpt_model(GPTConfig(L, H, C, T, V)).n_params


@pytest.mark.parametrize("flags", [{}, *({name: name != "tied"} for name in FLAGS)])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 8, 4, 10, 4, 11), (3, 6, 2, 20, 4, 30, 7, 50)])
def test_the_formula_counts_our_own_llama(sizes: tuple[int, ...], flags: dict[str, bool]) -> None:
    config = LlamaConfig(*sizes, **flags)  # type: ignore[arg-type]
    architecture = Architecture.of("ours", config, "")
    assert architecture.n_params == llama_model(config).n_params and architecture.sizes == config


@pytest.mark.parametrize("preset", PRESETS)
def test_our_models_have_the_sizes_of_the_presets(preset: str) -> None:
    a = PRESETS[preset]
    assert a.sizes is not None and Architecture.of(a.name, a.sizes, a.source) in (a, replace(a, n_ff=0))
    one, two = (replace(a, n_layer=n).sizes for n in (1, 2))
    made = [gpt_model(c) if isinstance(c, GPTConfig) else llama_model(c) for c in (one, two) if c]
    assert made[0].n_params + (a.n_layer - 1) * (made[1].n_params - made[0].n_params) == a.n_params


# -- model states ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total"),
    [("zero", 16), ("llm.c-no-master", 12), ("torch-amp", 16), ("fp32", 16), ("megatron-bf16", 18), ("megatron-fp16", 20),
     ("apex-o2", 20), ("pure-bf16", 8), ("bf16-kahan", 10), ("bf16-fp32-moments", 12), ("adam-8bit", 6.03125),
     ("ms-amp-o2", 6)],
)  # fmt: skip
def test_conventions(name: str, total: float) -> None:
    assert CONVENTIONS[name].total == total and CONVENTIONS[name].source


def test_no_convention_is_left_untested() -> None:
    assert len(CONVENTIONS) == 12


@pytest.mark.parametrize("N", [1, 4, 64])
def test_megatrons_distributed_formulas(N: int) -> None:
    """6 + 12/N for BF16, 4 + 16/N for FP16, 8 + 8/N for FP32: the weights and the gradients that backward writes stay whole."""
    n = 64 * 1000
    bf16, fp16, fp32 = (
        sum(per_rank(n, CONVENTIONS[name].states, 1, N).values()) for name in ("megatron-bf16", "megatron-fp16", "fp32")
    )
    assert (bf16 / n, fp16 / n, fp32 / n) == (6 + 12 / N, 4 + 16 / N, 8 + 8 / N)


@pytest.mark.parametrize(
    ("convention", "recipe"),
    [("zero", "fp16"), ("zero", "bf16"), ("llm.c-no-master", "bf16-sr"), ("torch-amp", "amp-fp16"), ("fp32", "fp32"),
     ("megatron-bf16", "megatron-bf16"), ("megatron-fp16", "apex-o2"), ("apex-o2", "apex-o2"), ("pure-bf16", "pure-bf16"),
     ("bf16-kahan", "bf16-kahan"), ("bf16-fp32-moments", "bf16-no-master"), ("adam-8bit", "adam-8bit")],
)  # fmt: skip
def test_conventions_that_are_recipes_too(convention: str, recipe: str) -> None:
    """All but one, buffer by buffer; MS-AMP is counted only."""
    assert get_recipe(recipe).bytes_by_buffer() == CONVENTIONS[convention].states


def test_scales_are_whole_numbers() -> None:
    """An FP32 scale for each 256 values of m, and of v, and one for the rest."""
    states = get_recipe("adam-8bit").bytes_by_buffer()

    def scales(n: int, ranks: int = 1) -> tuple[int, int, int]:
        bytes_of = per_rank(n, states, 1, ranks)
        assert bytes_of["m_scales"] == bytes_of["v_scales"]
        return bytes_of["weights"], bytes_of["m"], bytes_of["m_scales"]

    assert scales(1) == (2, 1, 4) and scales(256) == (512, 256, 4) and scales(257) == (514, 257, 8)
    assert scales(1000) == (2000, 1000, 16) and scales(1000, 3) == (2000, 334, 8)
    assert sum(per_rank(256 * 1000, states).values()) == 6.03125 * 256 * 1000


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_recipes_ledger_is_what_its_state_takes(recipe: str, grad_accum: int) -> None:
    config = Config.of({"recipe": recipe, "grad_accum": grad_accum, "n_layer": 1, "n_embd": 8, "n_head": 1, "block_size": 4})
    chosen, model, moments = config.make_recipe(), config.make_model(), config.make_rule().moments
    state = State(model, chosen.state_encodings(moments, grad_accum), config.make_backend())
    states = chosen.bytes_by_buffer(moments, grad_accum, state.layout.embeddings, model.n_params)
    predicted = per_rank(model.n_params, states)
    assert predicted == {kind: buffer.nbytes for kind, buffer in state.buffers.items()}


def test_the_notes_figures() -> None:
    adam = sum(per_rank(7 * 10**9, get_recipe("fp16").bytes_by_buffer()).values())
    assert adam == 112 * GB and round(adam / GIB, 1) == 104.3
    assert round(14 * GB / GIB, 2) == 13.04
    assert sum(per_rank(1_500_000_000, CONVENTIONS["zero"].states).values()) == 24 * GB


ZERO = """
7.5   1     120       120       120
7.5   4     52.5      41.25     30
7.5   16    35.625    21.5625   7.5
7.5   64    31.406    16.641    1.875
7.5   256   30.352    15.410    0.469
7.5   1024  30.088    15.103    0.117
128   4     896       704       512
128   16    608       368       128
128   64    536       284       32
128   256   518       263       8
128   1024  513.5     257.75    2
1000  4     7000      5500      4000
1000  64    4187.5    2218.75   250
1000  1024  4011.7    2013.7    15.6
"""


@pytest.mark.parametrize("line", ZERO.strip().splitlines())
def test_zeros_table(line: str) -> None:
    billions, ranks, *gigabytes = line.split()
    computed = zero_table()[int(float(billions) * 1e9)][int(ranks)]
    for value, text in zip(computed, gigabytes, strict=True):
        assert round(value, len(text.partition(".")[2])) == float(text)


def test_shards_are_rounded_up() -> None:
    states = get_recipe("fp16").bytes_by_buffer()
    assert per_rank(10, states, 1, 3) == {"weights": 20, "grads": 20, "master": 16, "m": 16, "v": 16}
    assert per_rank(10, states, 2, 3)["grads"] == 8 and per_rank(10, states, 3, 3)["weights"] == 8
    assert per_rank(10, get_recipe("fp32").bytes_by_buffer(), 1, 2) == {"weights": 40, "grads": 40, "m": 20, "v": 20}


# -- activations -------------------------------------------------------------------------------------------------------


def layer_bytes(a: Architecture, b: int, s: int, checkpointing: str) -> int:
    return sum(term.nbytes for term in published_activations(a, b, s, checkpointing)[:-3])


def test_the_papers_formulas_for_a_layer() -> None:
    """s b h (34 + 5 a s / h), 34 s b h and 2 s b h."""
    a, b, s = PRESETS["gpt3-175b"], 3, 2048
    sbh = s * b * a.n_embd
    assert layer_bytes(a, b, s, "none") == sbh * 34 + 5 * a.n_head * s * s * b
    assert layer_bytes(a, b, s, "selective") == 34 * sbh
    assert layer_bytes(a, b, s, "full") == 2 * sbh


def test_the_papers_figures() -> None:
    """5 a s / h is 80 for GPT-3 and 64 for the 530B model; selective recomputation saves 70 % and 65 % of a layer."""
    large = Architecture("530b", 105, 128, 20480, 2048, 51200, "Smith et al. 2022, arXiv 2201.11990")
    for a, ratio, saved in ((PRESETS["gpt3-175b"], 80, 0.70), (large, 64, 0.65)):
        whole, kept = layer_bytes(a, 1, 2048, "none"), layer_bytes(a, 1, 2048, "selective")
        assert (whole - kept) / (2048 * a.n_embd) == ratio
        assert round(1 - kept / whole, 2) == saved
    assert round(layer_bytes(PRESETS["gpt3-175b"], 1, 2048, "none") / GB, 3) == 2.869
    assert round(layer_bytes(PRESETS["gpt3-175b"], 1, 2048, "selective") / GB, 3) == 0.856


def test_the_ends_and_the_number_of_layers() -> None:
    """s b h + 4 s b h (1 + V / h), and every term of a layer counts L times."""
    a = PRESETS["gpt2-xl"]
    terms = published_activations(a, 2, 1024)
    assert sum(t.nbytes for t in terms[-3:]) == 1024 * 2 * (5 * a.n_embd + 4 * a.vocab_size)
    assert [t.count for t in terms] == [48] * 4 + [1] * 3


def test_an_mlp_of_another_width_is_counted_as_megatron_does() -> None:
    """s b h (18 + 4 F / h) a layer, less the (s, s) matrices."""
    a = Architecture("wide", 1, 2, 16, 8, 10, "", n_ff=24)
    assert layer_bytes(a, 1, 8, "selective") == 8 * 16 * 18 + 4 * 24 * 8


def test_heads_in_groups_store_fewer_keys_and_values() -> None:
    """2 bytes for each of: the layers' input, queries, keys, values, the output layer's input; and one for its mask."""
    a = Architecture("grouped", 1, 6, 16, 8, 10, "", n_kv_head=2, head_dim=4, n_ff=24, gpt=False)
    assert layer_bytes(a, 3, 8, "selective") == 8 * 3 * (2 * (16 + 24 + 8 + 8 + 24) + 16 + 3 * 16 + 6 * 24 + 4 * 16)
    assert layer_bytes(a, 3, 8, "none") - layer_bytes(a, 3, 8, "selective") == 5 * 6 * 8 * 8 * 3


def test_a_preset_with_a_recipe_is_counted_as_we_train_it() -> None:
    flags: dict[str, Any] = {"preset": "smollm2-135m", "batch_size": 2, "block_size": 512}
    for attention in ("unfused", "fused"):
        recipe = replace(get_recipe("bf16"), policy=with_attention(get_recipe("bf16").policy, attention))
        sizes = LlamaConfig(30, 9, 3, 576, 64, 1536, 8192, 49152)
        choice = choose(**flags, recipe="bf16", attention=attention)
        assert sum(line.nbytes for line in own_activations(choice)) == nbytes(llama_activations(sizes, recipe, 2, 512))
        assert "this project's llama by its own formula" in ledger_text(choice)
    for more in ({}, {"convention": "fp32"}, {"recipe": "bf16", "checkpointing": "selective"}):
        choice = choose(**flags, **more)
        assert own_activations(choice) == [] and published(choice)
        assert ("Give --recipe" in ledger_text(choice)) == ("recipe" not in more)


def test_the_table_of_the_docs() -> None:
    """Its rows are those of --preset NAME --recipe bf16 --block-size 2048."""
    text = (ROOT / "docs/memory.md").read_text(encoding="utf-8")

    def gigabytes(nbytes: int) -> float:
        return float(f"{nbytes / GB:.3g}")

    for name in ("smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b"):
        more: list[dict[str, str]] = [{}, {"attention": "fused"}, {"checkpointing": "full"}]
        choices = [choose(preset=name, recipe="bf16", block_size=2048, **flags) for flags in more]
        lines = [own_activations(choice) for choice in choices]
        activations = [gigabytes(sum(line.nbytes for line in some)) for some in lines]
        logits = next(line.nbytes for line in lines[0] if line.name == "logits")
        states = sum(line.nbytes for line in ledger(choices[0]))
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |")).strip("| ").split(" | ")
        assert int(row[1].replace(",", "")) == choices[0].n_params
        assert [float(cell) for cell in row[2:]] == [gigabytes(states), *activations, gigabytes(logits)]


def config_json(folder: Path, **more: Any) -> Path:
    table = {"model_type": "mistral", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 30,
             "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
             "sliding_window": 16}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(table | more), encoding="utf-8")
    return folder


def test_sizes_from_a_folder_of_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_json(tmp_path)
    outputs = []
    for path in (folder, folder / "config.json"):
        assert run("--hf", str(path)) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].startswith(f"{folder.name}, ")
    choice = choose(hf=str(folder))
    sizes = LlamaConfig(3, 4, 2, 24, 6, 30, 16, 50, tied=False)
    assert choice.n_params == llama_model(sizes).n_params
    assert sum(line.nbytes for line in own_activations(choice)) == nbytes(llama_activations(sizes, get_recipe("fp16"), 1, 16))
    assert "a sliding window of 16 tokens" in ledger_text(choice)
    assert choice.own == LlamaConfig(**read_config(folder).sizes)  # all of them, also those that no formula reads
    with pytest.raises(UsageError, match="model_type 'bert': the supported models are"):
        choose(hf=str(config_json(tmp_path, model_type="bert")))


def test_our_own_gpt_is_counted_by_its_own_formula() -> None:
    choice = choose(model="gpt", recipe="amp-bf16", batch_size=3)
    terms = gpt_activations(GPTConfig(), get_recipe("amp-bf16"), 3, 64)
    lines = own_activations(choice)
    assert sum(line.nbytes for line in lines if line.group != "buffers") == sum(term.nbytes for term in terms)
    copies = [line for line in lines if line.group == "buffers"]
    assert copies and ledger_data(choice)["total_bytes"] == sum(line.nbytes for line in [*ledger(choice), *lines])
    assert own_activations(choose(preset="gpt2-xl")) == []


def test_full_checkpointing_makes_one_layer_again() -> None:
    choice = choose(preset="gpt2-xl", checkpointing="full")
    again = next(line for line in published(choice) if line.name == "one layer, recomputed")
    assert again.nbytes == layer_bytes(PRESETS["gpt2-xl"], 1, 1024, "none") - layer_bytes(PRESETS["gpt2-xl"], 1, 1024, "full")


@pytest.mark.parametrize(("n_embd", "vocab_size"), [(128, 256), (16, 50257)])
def test_our_own_gpt_with_checkpointing_is_counted_at_the_larger_of_two_moments(n_embd: int, vocab_size: int) -> None:
    """A block's activations in backward, or the logits after forward."""
    sizes = {"n_embd": n_embd, "vocab_size": vocab_size}
    choice = choose(model="gpt", sizes=sizes, recipe="fp16", batch_size=3, checkpointing="full")
    both = [nbytes(terms) for terms in moments(GPTConfig(**sizes), get_recipe("fp16"), 3, 64, "full")]
    assert sum(line.nbytes for line in own_activations(choice)) == max(both)
    assert (both[1] > both[0]) == (n_embd == 128)
    more = next(line for line in own_activations(choice) if line.group == "buffers")
    assert f"{both[1]:,} bytes" in more.remark and "more in backward" in ledger_text(choice)
    assert own_activations(choose(model="gpt", checkpointing="selective")) == []  # ours cannot train so


# -- the script --------------------------------------------------------------------------------------------------------


def test_without_arguments_it_is_the_notes_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    text = capsys.readouterr().out
    assert "7,000,000,000 parameters" in text and "2 + 2 + 4 + 4 + 4 = 16 bytes per parameter" in text
    assert "112        104.3" in text and "14         13.04" in text and "24 GB" in text


def test_every_line_of_the_ledger_is_printed_with_its_sum() -> None:
    choice = choose(preset="llama-7b", zero=1, ranks=16, batch_size=2, block_size=512)
    text = ledger_text(choice)
    for line in [*ledger(choice), *published(choice)]:
        assert line.name in text and f"{line.nbytes:,}" in text
    assert f"{sum(line.nbytes for line in ledger(choice)):,}" in text
    assert "on each of 16 ranks, ZeRO stage 1" in text and "about 2 elements" in text


@pytest.mark.parametrize("words", [[], ["--preset", "gpt2-xl", "--checkpointing", "full"], ["--model", "gpt"],
                                   ["--conventions"], ["--zero-table"]])  # fmt: skip
def test_json_holds_the_same(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    if words == ["--conventions"]:
        assert data["megatron-bf16"]["total"] == 18
    elif words == ["--zero-table"]:
        assert data["7500000000"]["4"]["2"] == 41.25
    else:
        lines = data["model_states"] + (data["own_activations"] or data["published_activations"])
        assert data["total_bytes"] == sum(line["nbytes"] for line in lines)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_recipe_and_optimizer(recipe: str, optimizer: str) -> None:
    choice = choose(params=1000, recipe=recipe, optimizer=optimizer)
    moments = ("m", "v") if optimizer == "adamw" else ("m",)
    assert ledger_data(choice)["bytes_per_parameter"] == get_recipe(recipe).bytes_per_parameter(moments)


def test_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--conventions") == 0 and run("--zero-table") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in CONVENTIONS) and "41.25" in text and "16,000" in text


BAD = [
    (["--params", "0"], "--params is 0"),
    (["--params", "-1"], "--params is -1"),
    (["--params", "nan"], "--params is nan"),
    (["--params", "inf"], "--params is inf"),
    (["--params", "1e9", "--preset", "gpt2-xl"], "--params and --preset contradict"),
    (["--preset", "gpt5"], "unknown preset 'gpt5': choose one of gpt2-xl"),
    (["--model", "mlp"], "--model is 'mlp'"),
    (["--n-layer", "3"], "--n-layer is a size of --model gpt or llama: add --model"),
    (["--qk-norm"], "--qk-norm is a size of --model llama: add --model"),
    (["--model", "gpt", "--n-kv-head", "2"], "--n-kv-head is for --model llama"),
    (["--model", "llama", "--n-kv-head", "3"], "n_head 4 is not a multiple of n_kv_head 3"),
    (["--hf", "nowhere"], "there is no nowhere"),
    (["--hf", "nowhere", "--preset", "gpt2-xl"], "--preset and --hf contradict"),
    (["--measure", "--hf", "nowhere"], "--hf does not apply"),
    (["--preset", "gpt2-xl", "--attention", "fused"], "--attention is for the activations of this project's own tape"),
    (["--model", "gpt", "--attention", "flash"], "unknown attention 'flash'"),
    (["--model", "gpt", "--n-embd", "10", "--n-head", "3"], "n_embd 10 is not a multiple of n_head 3"),
    (["--ranks", "0"], "--ranks is 0"),
    (["--zero", "4", "--ranks", "2"], "--zero is 4"),
    (["--zero", "2"], "--zero 2 divides states among ranks: give their number with --ranks"),
    (["--preset", "llama-8b"], "; did you mean llama-7b or llama-3.1-8b?"),
    (["--batch-size", "0"], "--batch-size is 0"),
    (["--preset", "gpt2-xl", "--block-size", "2000"], "--block-size is 2000: gpt2-xl takes 1 to 1024"),
    (["--preset", "gpt2-xl", "--checkpointing", "half"], "unknown checkpointing 'half': choose one of none, selective, full"),
    (["--model", "gpt", "--checkpointing", "half"], "unknown checkpointing 'half': choose one of none, selective, full"),
    (["--measure", "--checkpointing", "selective"], "unknown checkpointing 'selective': choose one of none, full"),
    (["--recipe", "fp7"], "unknown recipe 'fp7'"),
    (["--convention", "zero", "--recipe", "fp16"], "--convention and --recipe contradict"),
    (["--convention", "mine"], "unknown convention 'mine'"),
    (["--optimizer", "lion"], "unknown optimizer 'lion'"),
    (["--grad-accum", "0"], "--grad-accum is 0"),
    (["--conventions", "--zero-table"], "give one"),
    (["--conventions", "--ranks", "2"], "takes no other flag"),
    (["--measure", "--preset", "gpt2-xl"], "--preset does not apply"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_arguments_are_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_script_itself() -> None:
    good = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert good.returncode == 0 and "104.3" in good.stdout
    bad = run_here("memory", "--ranks", "0")
    assert bad.returncode == 2 and bad.stderr == "error: --ranks is 0: it must be at least 1\n"
