"""Policies made from others or for fewer bits: attention by other kernels, other accumulators, quantized products."""

from __future__ import annotations

from refimpl.precision.policy import EVERY_OTHER, PRODUCTS, WIDE_OPS, Policy, Precision, uniform

ATTENTION = ("unfused", "fused", "math")
"""Ways to compute attention: operation by operation in the policy's own rows, or as `with_attention` describes."""


def with_attention(policy: Policy, kind: str) -> Policy:
    """Return the policy with attention of another kind, one of ATTENTION. 'unfused' returns the policy unchanged.

    The other two compute what PyTorch's F.scaled_dot_product_attention does: both read q, k and v in the policy's format and
    store neither S nor P.
    'fused': SDPBackend.FLASH_ATTENTION, PyTorch's default without masks and dropout. Products read 16 bits, so exp(S - max)
      and, in backward, P and dS are rounded.
    'math': SDPBackend.MATH on the CPU. Everything is computed in FP32, with one rounding at the end.
    """
    if kind == "unfused":
        return policy
    values = policy.row("attention.values")
    low, acc = values.input("v"), values.acc
    inside = Precision(acc, acc, acc)
    if kind == "math":
        scores, values = inside, Precision(acc, acc, low)
    else:
        scores, values = Precision(low, acc, acc), Precision(low, acc, low)
    rows = {"scores": scores, "scale": inside, "softmax": inside, "wide_softmax": inside, "values": values}
    named = {f"attention.{part}": row for part, row in rows.items()}
    return Policy(f"{policy.name}, {kind} attention", {**policy.rows, **named}, fused_attention=kind == "fused")


def with_sums(name: str, acc: str) -> Policy:
    """Return `uniform("fp16", "fp32")` with the products of linear layers summed in `acc`.

    The bias gradient db is not a product: its sum is in FP32.
    """
    return Policy(name, {**uniform("fp16", "fp32").rows, **dict.fromkeys(PRODUCTS, Precision("fp16", acc, "fp16"))})


def low_products(
    name: str, x: str, w: str = "", dy: str = "", *, dw: tuple[str, str] | None = None, acc: str = "fp32"
) -> Policy:
    """Return a BF16 policy in which all linear layers but the last quantize the operands of their products.

    x, w, dy: the scheme of each operand, a name of `quantization.registry.SCHEMES`; w and dy are as x unless given.
    dw: the schemes of dy and x in dw = dy^T x, where they differ. acc: the accumulator of these products.
    """
    w, dy = w or x, dy or x
    dy_dw, x_dw = dw or (dy, x)
    return Policy(
        name,
        {
            "linear.y": Precision({"x": x, "w": w}, acc, "bf16"),
            "linear.dx": Precision({"dy": dy, "w": w}, acc, "bf16"),
            "linear.dw": Precision({"dy": dy_dw, "x": x_dw}, acc, "bf16"),
            "linear.db": Precision("bf16", "fp32", "bf16"),
            "lm_head:linear": Precision("bf16", "fp32", "bf16"),
            **dict.fromkeys(WIDE_OPS, Precision("fp32", "fp32", "fp32")),
            EVERY_OTHER: Precision("bf16", "fp32", "bf16"),
        },
    )
