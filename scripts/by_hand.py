"""The four steps of mixed-precision training by hand, for a linear layer with ten weights: python scripts/by_hand.py"""

import math
import sys
from typing import Any

import numpy as np

X = np.array([[1.0, 2e-4], [0.5, -3e-4]], np.float16)  # (B, K): the second input is small, and so are its gradients
W = np.array([[1.0, 0.5], [0.75, -1.0], [-0.5, 0.25], [0.3, 0.7], [-0.9, 0.0]], np.float32)  # (F, K): the ten weights
TARGET = np.array([[8.0, 0.25, -0.4, 0.3001, -0.9003], [5.0, 0.2, -0.2, 0.1501, -0.4502]], np.float32)  # (B, F)
LR, BETA1, BETA2, EPS, GROWTH_INTERVAL = 1e-4, 0.9, 0.999, 1e-8, 3


@np.errstate(over="ignore")  # an overflow is a result, which step 3 looks for
def forward_backward(w: Any, S: float) -> tuple[Any, Any]:
    """Return the loss, the mean of (X w^T - TARGET)^2, and the FP16 gradient of S * loss for FP16 weights w."""
    # FP16 is for storage. A product is summed in FP32 and rounded once, as tensor cores do: hence each pair of astype.
    y = (X.astype(np.float32) @ w.astype(np.float32).T).astype(np.float16)
    error = y.astype(np.float32) - TARGET  # the loss is computed in FP32
    dy = (S * (2 / error.size) * error).astype(np.float16)  # S comes in before the first rounding of backward
    dw = (dy.astype(np.float32).T @ X.astype(np.float32)).astype(np.float16)  # and is in all that backward computes
    return np.mean(error * error), dw


def train(steps: int, S: float = 2.0**16) -> Any:
    """Yield a dictionary of what happened, for each step."""
    master, m, v, t, good_steps = W.copy(), np.zeros_like(W), np.zeros_like(W), 0, 0
    for _ in range(steps):
        w = master.astype(np.float16)  # 1. FP32 masters -> 16-bit weights, anew in each step
        loss, dw = forward_backward(w, S)  # 2. forward and backward in 16 bits, from the scaled loss
        g = dw.astype(np.float32)  # 3. gradients to FP32, checked for Inf and NaN, and unscaled where FP32 can hold them
        skipped = not np.isfinite(g).all()
        g /= S
        if not skipped:  # 4. update the masters with Adam, or skip: one Inf or NaN would stay in m and v for good
            t += 1
            step_size, root = LR / (1 - BETA1**t), math.sqrt(1 - BETA2**t)  # Python's: NumPy's FP64 would make the rest FP64
            m += (1 - BETA1) * (g - m)
            v = v * BETA2 + (1 - BETA2) * g * g
            master -= step_size * m / (np.sqrt(v) / root + EPS)
        yield {"S": S, "loss": loss, "w": w, "dw": dw, "skipped": skipped, "master": master.copy(), "m": m.copy(), "v": v}
        good_steps += 1  # the scale adapts: it must grow from time to time, to find out whether a larger S fits
        if skipped or good_steps == GROWTH_INTERVAL:
            S, good_steps = S / 2 if skipped else S * 2, 0


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    if sys.argv[1:]:
        print(f"{sys.argv[0]} takes no arguments, not {sys.argv[1]!r}", file=sys.stderr)
        sys.exit(2)
    for scale in (1, 32768):
        zeros = np.sum(forward_backward(W.astype(np.float16), scale)[1] == 0)
        print(f"backward from {scale:5} * loss: {zeros} of the ten gradients are 0 in FP16")
    print("\nstep      S     loss  largest FP16 gradient   first master -> as an FP16 weight")
    for step, now in enumerate(train(8), 1):
        first, what = now["master"][0, 0], "inf: skipped, S halves" if now["skipped"] else f"{np.abs(now['dw']).max():g}"
        print(f"{step:4} {now['S']:6g} {now['loss']:8.5f}  {what:22}  {first:.6f} -> {np.float16(first):.6f}")
    print("\nFP16 has no number between 1 and 1.000977: only the master adds up the updates.")
