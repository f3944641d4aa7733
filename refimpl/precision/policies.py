"""The policies that recipes are made of: tables of the formats inside every operation, each made by a short function."""

from __future__ import annotations

from refimpl.precision.policy import EVERY_OTHER, SAME, Policy, Precision

ATTENTION = ("unfused", "fused", "math")
"""Ways to compute attention: operation by operation as the policy's own rows say, or as one operation (`with_attention`)."""


def uniform(fmt: str, acc: str) -> Policy:
    """Every tensor in one format, sums in `acc`; the loss in `acc` too, from logits cast up to it."""
    return Policy(fmt, {EVERY_OTHER: Precision(fmt, acc, fmt), "cross_entropy": Precision(acc, acc, acc)})


def autocast_cuda(low: str) -> Policy:
    """The op lists of torch.autocast('cuda'): products low, normalization, softmax and losses FP32, others as they come."""
    product, high = Precision(low, "fp32", low), Precision("fp32", "fp32", "fp32")
    return Policy(
        f"autocast-cuda-{low}",
        {
            "linear": product,
            "matmul": product,
            "attention.scores": product,
            "attention.values": product,
            "attention.softmax": high,
            "softmax": high,
            "layernorm": high,
            "rmsnorm": high,
            "cross_entropy": high,
            EVERY_OTHER: Precision(SAME, "fp32", SAME),
        },
    )


def autocast_cpu(low: str) -> Policy:
    """The op lists of torch.autocast('cpu'): products low, losses FP32; softmax and layernorm stay in the input's format."""
    product, high = Precision(low, "fp32", low), Precision("fp32", "fp32", "fp32")
    return Policy(
        f"autocast-cpu-{low}",
        {
            "linear": product,
            "matmul": product,
            "attention.scores": product,
            "attention.values": product,
            "cross_entropy": high,
            EVERY_OTHER: Precision(SAME, "fp32", SAME),
        },
    )


def with_attention(policy: Policy, kind: str) -> Policy:
    """The policy with attention as PyTorch's F.scaled_dot_product_attention computes it. kind: one of ATTENTION.

    Both read q, k and v in 16 bits and store neither S nor P. 'fused', SDPBackend.FLASH_ATTENTION, the default where there are
    neither masks nor dropout: the products read 16 bits, so exp(S - max) and, backward, P and dS are rounded to them.
    'math', SDPBackend.MATH on the CPU: all of it in FP32, with one rounding at the end.
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
    rows = {"scores": scores, "scale": inside, "softmax": inside, "values": values}
    named = {f"attention.{part}": row for part, row in rows.items()}
    return Policy(f"{policy.name}, {kind} attention", {**policy.rows, **named}, fused_attention=kind == "fused")


def with_sums(name: str, acc: str) -> Policy:
    """FP16 everywhere, the products of linear layers in another accumulator; db is no product, its sum is in FP32."""
    products = ("linear.y", "linear.dx", "linear.dw")
    return Policy(name, {**uniform("fp16", "fp32").rows, **dict.fromkeys(products, Precision("fp16", acc, "fp16"))})


def low_products(
    name: str, x: str, w: str = "", dy: str = "", *, dw: tuple[str, str] | None = None, acc: str = "fp32"
) -> Policy:
    """All linear layers but the last quantize the operands of their products; everything else is in BF16.

    x, w, dy: a scheme of `quantize.SCHEMES` for each; w and dy as x unless given. dw: those of dy and x in dw = dy^T x, if
    they are others. acc: the accumulator of these products.
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
            "cross_entropy": Precision("fp32", "fp32", "fp32"),
            EVERY_OTHER: Precision("bf16", "fp32", "bf16"),
        },
    )
