"""GPT's formula, and a layer of it beside the published one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from refimpl.nn.models.gpt import GPTConfig
from refimpl.precision.recipes import Recipe
from refimpl.training.activation_memory.terms import Flow, Line, Term, check_sizes, itemsize, loss_lines, made_by, terms_of


@dataclass(frozen=True)
class Row:
    """A tensor of a layer: its bytes by the paper's formula, its bytes on our tape, and why they differ."""

    tensor: str
    paper: int
    ours: int
    why: str


def gpt_activations(config: GPTConfig, recipe: Recipe, batch_size: int, block_size: int) -> list[Term]:
    """Return what the tape of `models.gpt` stores between forward and backward, for tokens (B, T).

    The sum over a layer, with 2 bytes per value and 4 per statistic (recipes fp16 and bf16):

        32 B T C + 2 B H T^2 + 16 B T

    `block_size` is T, at most the model's own. Errors: UsageError for sizes that the model does not support.
    """
    check_sizes(batch_size, block_size, config.block_size)
    sizes = {"L": config.n_layer, "B": batch_size, "T": block_size, "C": config.n_embd, "H": config.n_head}
    f = Flow(recipe)
    x = f.stream
    top = f.out("layernorm", x)
    lines: list[Line] = [
        ("tokens", "B T", "int64", "transformer.wte", "the batch itself"),
        ("positions", "T", "int64", "transformer.wpe", "0, 1, ..."),
        *_attention_lines(f, x),
        *_mlp_lines(f, x, config.activation),
        *_norm_lines(f, "ln_f", "", "transformer.ln_f", x),
        ("lm_head input", "B T C", f.saved_by_linear(top), "lm_head", made_by("ln_f", top, f.saved_by_linear(top))),
        *loss_lines(f, "B T", f.linear(top), "the batch itself"),
    ]
    return terms_of(lines, sizes | {"V": config.vocab_size})


def _attention_lines(f: Flow, x: str) -> list[Line]:
    """Return the first half of a block: ln_1, c_attn, attention, c_proj. x: the format of the residual stream."""
    place, h = "transformer.h.i", f.out("layernorm", x)
    kept, qkv = f.saved_by_linear(h), f.linear(h)
    P = f.probabilities(qkv)
    O = f.out("attention.values", P, qkv)  # noqa: E741
    kept_O = f.saved_by_linear(O)
    return [
        *_norm_lines(f, "h.i ln_1", "L ", f"{place}.ln_1", x),
        ("h.i attn.c_attn input", "L B T C", kept, f"{place}.attn.c_attn", made_by("ln_1", h, kept)),
        ("h.i attention qkv", "L B T 3C", qkv, f"{place}.attn", "the output of attn.c_attn; q, k and v are views of it"),
        *(_fused_lines(f, O, f"{place}.attn") if f.fused_attention else [
            ("h.i attention P", "L B H T T", P, f"{place}.attn", "the softmax output, masked half included")]),
        *([] if f.fused_attention and kept_O == O else [
            ("h.i attn.c_proj input", "L B T C", kept_O, f"{place}.attn.c_proj", made_by("attention", O, kept_O))]),
    ]  # fmt: skip


def _fused_lines(f: Flow, O: str, place: str) -> list[Line]:  # noqa: E741
    """Return what fused attention saves: its output and a number per row, and no T x T array."""
    return [
        ("h.i attention O", "L B T C", O, place, "its output, which attn.c_proj reads: the same memory, unless that casts it"),
        ("h.i attention log(sum(exp S))", "L B H T", f.row("attention.softmax").acc, place, "a value per row"),
    ]


def _mlp_lines(f: Flow, x: str, gelu: str) -> list[Line]:
    """Return the second half of a block: ln_2, c_fc, gelu, c_proj. x: the format of the residual stream."""
    place, h = "transformer.h.i", f.out("layernorm", x)
    kept, u = f.saved_by_linear(h), f.linear(h)
    g = f.out(gelu, u)
    kept_g = f.saved_by_linear(g)
    return [
        *_norm_lines(f, "h.i ln_2", "L ", f"{place}.ln_2", x),
        ("h.i mlp.c_fc input", "L B T C", kept, f"{place}.mlp.c_fc", made_by("ln_2", h, kept)),
        ("h.i mlp.gelu input", "L B T 4C", f.cast(gelu, "x", u), f"{place}.mlp.gelu", "the output of mlp.c_fc"),
        ("h.i mlp.c_proj input", "L B T 4C", kept_g, f"{place}.mlp.c_proj", made_by("mlp.gelu", g, kept_g)),
    ]


def _norm_lines(f: Flow, name: str, each: str, place: str, x: str) -> list[Line]:
    """Return what a layer norm saves: its input and two statistics per row. each: 'L ' if every layer has one."""
    return [
        (f"{name} input", f"{each}B T C", f.cast("layernorm", "x", x), place, "the residual stream; additions do not save it"),
        (f"{name} mean and rstd", f"2 {each}B T", f.row("layernorm").acc, place, "a value per row, in the accumulation format"),
    ]


def against_paper(config: GPTConfig, recipe: Recipe, batch_size: int, block_size: int) -> list[Row]:
    """Return the tensors of a GPT layer, with bytes by the published formula and by ours.

        paper   34 s b h + 5 a s^2 b      s = T, b = B, h = C, a = H; values have 2 bytes, dropout masks 1

    The paper's model has dropout, ours has none; the paper leaves out statistics, which are small. Its column sums to its
    formula; ours to the `h.i` terms of `gpt_activations`, for one layer.
    Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.1.
    """
    terms = gpt_activations(replace(config, n_layer=1), recipe, batch_size, block_size)
    layer = {term.name.removeprefix("h.i "): term for term in terms}
    sbh, as2b = block_size * batch_size * config.n_embd, config.n_head * block_size**2 * batch_size
    qkv, P, O = layer["attention qkv"], layer.get("attention P"), layer.get("attention O")  # noqa: E741
    norm_bytes = layer["ln_1 input"].nbytes + layer["ln_2 input"].nbytes
    statistics = layer["ln_1 mean and rstd"].nbytes + layer["ln_2 mean and rstd"].nbytes

    def both(tensor: str, paper: int, term: Term, ours: int | None = None) -> Row:
        ours, size = term.nbytes if ours is None else ours, itemsize(term.fmt)
        return Row(tensor, paper, ours, "the same" if ours == paper else f"here in {term.fmt}: {size} bytes per value, not 2")

    return [
        both("input of Q, K, V", 2 * sbh, layer["attn.c_attn input"]),
        both("Q and K", 4 * sbh, qkv, qkv.nbytes * 2 // 3),
        both("softmax output", 2 * as2b, P) if P else Row("softmax output", 2 * as2b, 0, "fused attention: computed again"),
        Row("softmax dropout mask", as2b, 0, "no dropout"),
        Row("softmax dropout output", 2 * as2b, 0, "no dropout: attention reads the softmax output itself"),
        both("V", 2 * sbh, qkv, qkv.nbytes // 3),
        both("input of the output projection", 2 * sbh, O or layer["attn.c_proj input"]),
        Row("attention dropout mask", sbh, 0, "no dropout"),
        both("input of the first MLP linear", 2 * sbh, layer["mlp.c_fc input"]),
        both("GELU input", 8 * sbh, layer["mlp.gelu input"]),
        both("input of the second MLP linear", 8 * sbh, layer["mlp.c_proj input"]),
        Row("MLP dropout mask", sbh, 0, "no dropout"),
        both("inputs of two layer norms", 4 * sbh, layer["ln_1 input"], norm_bytes),
        Row("mean and rstd of two layer norms", 0, statistics, f"saved, in {layer['ln_1 mean and rstd'].fmt}; small"),
    ]
