# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of mixed precision
#
# What a number format can hold, one cast by hand, the four steps of a training in FP16, a loss scale that collapses and
# recovers, and what masters are for: with [refimpl](../README.md), in NumPy, in half a minute. It needs `pip install
# '.[docs]'`. [library.md](library.md) describes the same names. The numbers in the text are those that the cells
# print.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np

import refimpl as rf
from refimpl.numerics.formats import FORMATS
from refimpl.optim.gradients import check_and_measure, clip_coefficient, inverse_of
from refimpl.training.palette import BLUE, FORMAT_COLORS, GRAY, GREEN, RED

plt.rcParams.update({"figure.figsize": (8, 3), "figure.dpi": 72, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.5})
COLORS = {name: FORMAT_COLORS[name] for name in ("fp32", "fp16", "bf16", "e4m3", "e5m2")}

# %% [markdown]
# ## 1. Formats
#
# A format is described by a few numbers, above all how many bits are exponent and how many are fraction. The exponent
# bits give the range, the fraction bits the precision.

# %%
for name in COLORS:
    f = FORMATS[name]
    print(f"{name}: {f.exponent_bits} + {f.fraction_bits} bits, largest {f.max:g}, eps 2^{math.log2(f.eps):g}", end=", ")
    print(f"normal from 2^{math.log2(f.smallest_normal):g}, smallest 2^{math.log2(f.smallest_subnormal):g}")

# %% [markdown]
# FP16 ends at `65504`; below `2^-14` it loses precision bit by bit, and below half of `2^-24` everything becomes zero.
# BF16 has the range of FP32, and 8 times the error of FP16. The figure shows the largest relative error of `cast`, for
# random numbers between consecutive powers of two.

# %%
rng = np.random.default_rng(0)
exponents = np.arange(-30, 21)
figure, axes = plt.subplots()
for name, color in COLORS.items():
    x = np.ldexp(rng.uniform(1, 2, (len(exponents), 500)), exponents[:, None]).astype(np.float32)
    narrow = {"overflow": "inf"} if FORMATS[name].bits == 8 else {}
    y = rf.widen(rf.cast(x, name, **narrow), "fp32")
    error = np.where(np.isfinite(y), np.abs(y - x) / x, np.nan).max(1)
    if name != "fp32":  # a cast from FP32 to FP32 has no error
        axes.semilogy(exponents, np.where(error > 0, error, np.nan), ".-", base=2, color=color, label=name)
axes.set(xlabel="log2 of the number", ylabel="largest relative error", title="1: it became zero. No line: it overflowed")
axes.legend(loc="center left")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 2. One cast by hand
#
# 0.1 lies between 2^-4 and 2^-3. There, two FP16 numbers are 2^-4 / 2^10 apart, since FP16 has 10 fraction bits. In
# this unit (*ulp*, unit in the last place) 0.1 is `1638.4`, and the nearest whole number is `1638`. So the FP16 number
# is 1638 units, `0.0999755859375`.

# %%
x = 0.1
ulp = 2.0 ** (math.floor(math.log2(x)) - FORMATS["fp16"].fraction_bits)
print(f"{x} = {x / ulp:.1f} ulp, rounded: {round(x / ulp)} ulp = {round(x / ulp) * ulp}")
print("cast:", rf.cast(np.float32(x), "fp16").astype(float))


def cast_by_hand(x: np.ndarray) -> np.ndarray:
    """Round FP32 numbers to FP16: to whole multiples of an ulp, and a half to the even one."""
    exponent = np.maximum(np.floor(np.log2(np.abs(x))), -14)  # below 2^-14 the ulp stays the same: subnormal numbers
    ulp = 2.0 ** (exponent - 10)
    rounded = np.rint(x / ulp) * ulp  # rint: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2
    return np.where(np.abs(rounded) > 65504, np.copysign(np.inf, x), rounded).astype(np.float32)


codes = rng.integers(1, 0x7F800000, 1_000_000, dtype=np.uint32) | rng.integers(0, 2, 1_000_000, dtype=np.uint32) << 31
numbers = codes.view(np.float32)  # any sign, any exponent, any fraction
with np.errstate(over="ignore"):
    equal = cast_by_hand(numbers) == rf.widen(rf.cast(numbers, "fp16"), "fp32")
print(f"{equal.sum()} of {equal.size} random FP32 numbers: equal to cast")

# %% [markdown]
# A function of four lines rounds as `cast` does in `1000000` of `1000000` cases. (A test compares `cast` with PyTorch
# for every FP32 number.) The staircase below shows ties: `2049` lies midway between two FP16 numbers and becomes
# `2048`, whose last fraction bit is even; `2051` becomes `2052`.

# %%
x = np.linspace(2044, 2064, 2001, dtype=np.float32)
ties = np.array([2049, 2051, 2053, 2055], np.float32)
print(ties, "->", rf.widen(rf.cast(ties, "fp16"), "fp32"))

figure, axes = plt.subplots()
axes.plot(x, x, color=GRAY, lw=0.8)
axes.plot(ties, rf.widen(rf.cast(ties, "fp16"), "fp32"), "o", color=COLORS["fp16"], ms=4)
for name in ("fp16", "bf16"):
    axes.step(x, rf.widen(rf.cast(x, name), "fp32"), where="mid", color=COLORS[name], label=name)
axes.set(xlabel="x", ylabel="cast(x)", title="Around 2048: FP16 has every second integer from there on, BF16 every 16th")
axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 3. The four steps
#
# A small GPT learns a few lines of text. `make_training` returns all that a step needs: FP32 masters, FP16 weights and
# gradients, Adam's moments, and a loss scale S. A step can be made by hand:

# %%
TEXT = b"""Masters are kept in FP32. Each step rounds them to 16-bit weights, runs forward and backward in 16 bits, widens the
gradients to FP32, and updates the masters. An update is often too small for a 16-bit weight; the master adds such updates up.
The loss is multiplied by S, so that small gradients do not become zero. If S is too large, a gradient is infinite: then the
step is skipped, and S is halved. After many good steps S is doubled again.
"""
text = np.frombuffer(TEXT, np.uint8)
model = rf.gpt_model(rf.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16))


def start(recipe, lr=3e-3, **more):
    """A training of 300 steps at one learning rate."""
    return rf.make_training(model, recipe, rf.Schedule(lr=lr, min_lr=lr, warmup=0, steps=300, shape="constant"), **more)


def batches(text=text, seed=0):
    """8 random blocks of 16 bytes of a text, and the bytes that follow, again and again."""
    rng = np.random.default_rng(seed)
    while True:
        yield rf.sample_batch(text, 8, 16, rng)


print(f"{model.n_params} parameters, {start('fp16').state.nbytes / model.n_params:g} bytes each")

# %%
training, batch = start("fp16"), next(batches())
state, S, name = training.state, training.loss_scale.scale, "transformer.h.0.mlp.c_proj.weight"
print("master          ", state.views("master")[name][0, 0])

state.weights_down()  # 1. FP32 masters -> FP16 weights
print("weight          ", state.weight_views[name][0, 0])

loss = rf.forward_backward(model, [batch], state, S, training.run)  # 2. in FP16, from S times the loss
print("gradient times S", state.grad_views[name][0, 0], " S =", S)

found_inf, norm = check_and_measure(state, inverse_of(S))  # 3. gradients in FP32, divided by S: is any Inf or NaN?
print("gradient        ", np.float32(state.grad_views[name][0, 0]) / S, " norm", norm, " Inf or NaN:", found_inf)

training.optimizer.update(state, inverse_of(S), clip_coefficient(norm, 1.0), found_inf)  # 4. update, or skip
training.loss_scale.update(found_inf)
print("master, updated ", state.views("master")[name][0, 0])

same = start("fp16")
same.step([batch])
equal = [state.buffers[kind].tobytes() == same.state.buffers[kind].tobytes() for kind in state.buffers]
print("the bits of training.step:", all(equal))

# %% [markdown]
# `training.step` computes the same four steps, to the bit: `True`. Why is S needed? The figure shows the gradients of one
# batch, computed from S times the loss. If S is too small, some that are not zero in FP32 become zero in FP16; if S is
# too large, some become infinite. Between the two is a window.

# %%
figure, axes = plt.subplots()
scales = np.arange(-12, 21, 2)
for rows, style in ((8, "-"), (64, "--")):
    batch = rf.sample_batch(text, rows, 16, np.random.default_rng(1))
    exact, fp16 = start("fp32"), start("fp16")
    rf.forward_backward(model, [batch], exact.state, np.float32(1), exact.run)
    zero, infinite = [], []
    for S in 2.0**scales:
        with np.errstate(over="ignore", invalid="ignore"):
            rf.forward_backward(model, [batch], fp16.state, np.float32(S), fp16.run)
        zero.append(np.mean(fp16.state.grads[exact.state.grads != 0] == 0))
        infinite.append(not np.isfinite(fp16.state.grads).all())
    first, zero = infinite.index(True), np.array(zero)
    axes.semilogy(scales[:first], np.maximum(zero, 1e-5)[:first], style, color=COLORS["fp16"], label=f"{rows} rows of 16 bytes")
    axes.plot(scales[first:], np.full(len(scales) - first, 1e-5), "x", color=RED, label="Inf or NaN" if rows == 8 else None)
    print(f"{rows:2} rows: zero at S = 2^-12: {zero[0]:.0%}, at S = 1: {zero[6]:.2%}, at S = 2^10: {zero[11]:.2%}", end=", ")
    print(f"overflow from about S = 2^{scales[first]}")
axes.set(xlabel="log2 of S", ylabel="share of zeros (at least 1e-5)", title="Gradients that become zero, or infinite, in FP16")
axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# This model is easy: even S = 1 loses little. Where the window begins depends on the smallest gradients, and they become
# smaller as a batch grows, since the loss is a mean over its tokens. The window is not known beforehand. So a *dynamic*
# scale starts high, halves at each overflow, which costs a step, and doubles from time to time.

# %% [markdown]
# ## 4. A loss scale that collapses, and recovers
#
# The scale halves when a gradient overflows, since then S is too large; usually one step is lost. But if the *forward*
# pass overflows, S is not the reason: every step is skipped, the weights never change, and S halves until it reaches
# zero. Here the weight of the last norm is set to 60000 after 40 steps, as a spike of the learning rate or a bad
# checkpoint might do, and set back 20 steps later. S doubles after 5 good steps here, not after PyTorch's 2000, so that
# the picture shows the recovery.

# %%
training = start("fp16", loss_scale=rf.make_loss_scale("dynamic", init_scale=2.0**6, growth_interval=5))
last_norm = training.state.views("master")["transformer.ln_f.weight"]
results, stream = [], batches()
for step in range(200):
    if step == 40:
        good = last_norm.copy()
        last_norm[:] = 60000
    if step == 60:
        last_norm[:] = good
    results.append(training.step([next(stream)]))

scale = np.array([float(r.loss_scale) for r in results])
skipped = np.array([bool(r.skipped) for r in results])
before, lowest = scale[40], scale[60]
back = np.flatnonzero(scale[60:] == before)[0]
print(f"S before: 2^{math.log2(before):g}, lowest: 2^{math.log2(lowest):g}, skipped: {skipped[40:60].sum()} of 20 steps")
print(f"{back} good steps until S is back: {back / 5:g} doublings")

figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 4.5))
top.plot([float(r.loss) for r in results], color=BLUE)
top.set(ylabel="loss", title="The forward pass overflows in steps 40 to 59")
bottom.semilogy(scale, base=2, color=GREEN, drawstyle="steps-post")
bottom.plot(np.flatnonzero(skipped), scale[skipped], "x", color=RED, label="skipped")
bottom.set(ylabel="loss scale S", xlabel="step")
bottom.legend(loc="lower right")
figure.tight_layout()
plt.show()

# %% [markdown]
# All `20` steps were skipped, and S fell by as many factors of two. Falling takes one step per factor of two, and the
# `20` doublings take `100` steps; with PyTorch's interval of 2000 they would take 40000. So a scale that has collapsed
# is a symptom, not the cause: look for what was infinite before backward. [loss_scaling.md](loss_scaling.md) has the
# rules of eight projects, and a command that applies them to the skipped steps of your log.

# %% [markdown]
# ## 5. Masters on and off
#
# BF16 keeps 8 bits of a weight. An update smaller than half the distance to the next BF16 number is lost, unless an
# FP32 master adds such updates up. In a new model, updates are large and little is lost. But now the model that has
# learned the text above is trained on a batch of another text, with a small learning rate:

# %%
OTHER = b"""The scale is a power of two, thus multiplying by it rounds nothing. Rounding to nearest loses every update below
half a step; rounding at random keeps them on average. BF16 has the range of FP32 and eight bits of precision, FP16 has eleven
bits and a narrow range. Which of both is better depends on what is rounded: weights need precision, gradients need range.
"""
trained, stream = start("fp32"), batches()
for _ in range(200):
    trained.step([next(stream)])

batch = rf.sample_batch(np.frombuffer(OTHER, np.uint8), 16, 16, np.random.default_rng(0))
figure, axes = plt.subplots()
for recipe, style in {"fp32": "-", "bf16": "-", "bf16-no-master": ":", "bf16-sr": "o"}.items():
    training = start(recipe, lr=6e-5)
    training.state.load_weights(trained.state.views("weights"))
    losses, changed = [], []
    for _ in range(100):
        before = training.state.weights.copy()
        losses.append(float(training.step([batch]).loss))
        changed.append(np.mean(training.state.weights != before))
    axes.plot(losses, style, color=COLORS[recipe[:4]], lw=5 if recipe == "fp32" else 2, markevery=10, label=recipe)
    print(f"{recipe:15} loss {losses[0]:.2f} -> {losses[-1]:.2f}, an update changes {np.mean(changed):.0%} of the weights")
axes.set(xlabel="step", ylabel="loss", title="Fine-tuning with a learning rate of 6e-5")
axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# With masters, BF16 follows FP32, although most updates do not change the BF16 weight at once: the master accumulates
# them until they do. Without masters, the same optimizer learns less than half as much. Stochastic rounding (`bf16-sr`)
# needs no masters either: a small update is kept with a small probability. [low_precision.md](low_precision.md) has more
# methods, with fewer bits.
#
# Continue with [library.md](library.md) for a training of your own, [algorithm.md](algorithm.md) for the step line by
# line, and `python scripts/by_hand.py` for the same without a library.
