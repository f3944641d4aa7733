"""The formula of the Llama family."""

from __future__ import annotations

from refimpl.nn.models.llama import LlamaConfig
from refimpl.precision.recipes import Recipe
from refimpl.training.activation_memory.terms import Flow, Line, Term, check_sizes, loss_lines, made_by, terms_of

NORM = "llama_rmsnorm"
LAYER, ATTENTION, MLP = "model.layers.i", "model.layers.i.self_attn", "model.layers.i.mlp"


def llama_activations(config: LlamaConfig, recipe: Recipe, batch_size: int, block_size: int) -> list[Term]:
    """Return what the tape of `models.llama` stores between forward and backward, for tokens (B, T).

    The sum over a layer, with 2 bytes per value, and 4 per statistic and probability (recipes fp16 and bf16):

        8 B T C + 4 B T (H + K) D + 6 B T F + 4 B H T^2 + 8 B T
        with qk_norm also     2 B T (H + K) D + 4 B T (H + K)

    Each product that casts its input saves a copy of its own: under autocast the FP32 output of a norm is saved as three 16-bit
    copies for q, k and v, and as two for gate and up. Biases save nothing.
    `block_size` is T, at most the model's own. Errors: UsageError for sizes that the model does not support.
    """
    check_sizes(batch_size, block_size, config.block_size)
    f, c = Flow(recipe), config
    x, top = f.stream, f.out(NORM, f.stream, f.stored)
    lines: list[Line] = [
        ("tokens", "B T", "int64", "model.embed_tokens", "the batch itself"),
        *_attention_lines(f, x, c.qk_norm),
        *_mlp_lines(f, x),
        *_norm_lines(f, "norm", "B T C", "B T", "model.norm", x, "the residual stream"),
        ("lm_head input", "B T C", f.saved_by_linear(top), "lm_head", made_by("norm", top, f.saved_by_linear(top))),
        *loss_lines(f, "B T", f.linear(top), "the batch itself"),
    ]
    sizes = {"L": c.n_layer, "B": batch_size, "T": block_size, "C": c.n_embd, "H": c.n_head, "K": c.n_kv_head}
    return terms_of(lines, sizes | {"D": c.head_dim, "F": c.ffn_dim, "V": c.vocab_size})


def _attention_lines(f: Flow, x: str, qk_norm: bool) -> list[Line]:
    """Return the first half of a block: norm, q, k, v, their norms, RoPE, attention, o_proj. x: format of the stream."""
    h = f.out(NORM, x, f.stored)
    v = made = f.linear(h)
    lines = _norm_lines(f, "layers.i input_layernorm", "L B T C", "L B T", f"{LAYER}.input_layernorm", x, "the residual stream")
    lines += _linear_lines(f, "self_attn", ("q_proj", "k_proj", "v_proj"), "input_layernorm", h)
    if qk_norm:
        made = f.out(NORM, v, f.stored)
        for name, n in (("q", "H"), ("k", "K")):
            norm, what = f"{name}_norm", f"the output of {name}_proj"
            lines += _norm_lines(f, f"layers.i {norm}", f"L B T {n} D", f"L B T {n}", f"{ATTENTION}.{norm}", v, what)
    qk = f.out("rope", made, "fp32")
    P = f.probabilities(qk, "attention.wide_softmax")
    O = f.out("attention.values", P, v)  # noqa: E741
    kept_O = f.saved_by_linear(O)
    lines += [
        ("cos and sin", "T D", "fp32", f"{ATTENTION}.q_rope", "T D/2 each, which all layers share"),
        ("layers.i attention q", "L B T H D", qk, ATTENTION, "the output of RoPE"),
        ("layers.i attention k", "L B T K D", qk, ATTENTION, "the output of RoPE"),
        ("layers.i attention v", "L B T K D", v, ATTENTION, "the output of v_proj"),
    ]
    if f.fused_attention:
        acc, same = f.row("attention.softmax").acc, "the same memory as the input of o_proj, unless that casts it"
        lines.append(("layers.i attention O", "L B T H D", O, ATTENTION, f"its output: {same}"))
        lines.append(("layers.i attention log(sum(exp S))", "L B H T", acc, ATTENTION, "a value per row"))
    else:
        lines.append(("layers.i attention P", "L B H T T", P, ATTENTION, "the softmax output, masked half included"))
    if not f.fused_attention or kept_O != O:
        note = made_by("attention", O, kept_O)
        lines.append(("layers.i o_proj input", "L B T H D", kept_O, f"{ATTENTION}.o_proj", note))
    return lines


def _mlp_lines(f: Flow, x: str) -> list[Line]:
    """Return the second half of a block: norm, gate_proj, up_proj, swiglu, down_proj. x: the format of the residual stream."""
    name, h = "post_attention_layernorm", f.out(NORM, x, f.stored)
    u = f.linear(h)
    y = f.out("swiglu", u, u)
    kept = f.saved_by_linear(y)
    lines = _norm_lines(f, f"layers.i {name}", "L B T C", "L B T", f"{LAYER}.{name}", x, "the residual stream")
    lines += _linear_lines(f, "mlp", ("gate_proj", "up_proj"), name, h)
    for operand in ("gate", "up"):
        made = f"the output of {operand}_proj"
        lines.append((f"layers.i swiglu {operand}", "L B T F", f.cast("swiglu", operand, u), f"{MLP}.act", made))
    return [*lines, ("layers.i down_proj input", "L B T F", kept, f"{MLP}.down_proj", made_by("swiglu", y, kept))]


def _norm_lines(f: Flow, name: str, values: str, rows: str, place: str, x: str, what: str) -> list[Line]:
    """Return what an RMSNorm saves: its input, and 1 / sqrt(mean square) per row. x: the format of the input."""
    return [
        (f"{name} input", values, f.cast(NORM, "x", x), place, what),
        (f"{name} rrms", rows, f.row(NORM).acc, place, "a value per row, in the accumulation format"),
    ]


def _linear_lines(f: Flow, part: str, layers: tuple[str, ...], source: str, h: str) -> list[Line]:
    """Return what linear layers with one input save: the input itself once, or a copy each if they cast it. h: its format."""
    kept = f.saved_by_linear(h)
    note = made_by(source, h, kept)
    if kept == h:
        note += f"; {' and '.join(layers[1:])} read it too"
        layers = layers[:1]
    return [(f"layers.i {layer} input", "L B T C", kept, f"{LAYER}.{part}.{layer}", note) for layer in layers]
