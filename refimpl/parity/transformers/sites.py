"""Where transformers makes the number that one of our roundings makes: our sites, and the results of its operations.

A rounding of ours has a site, `place:operation.site` (`OpPrecision.round_to`). Each function below belongs to one of our
operations: it returns, for one place, the results of a recording under our sites, with the elements in our order. A site at
which our operation rounds several times in a row, as each half of a head in RoPE, has as many results.

Which result it is follows from the module that it belongs to, the operation that made it, and the storages that it reads: a
linear layer's dx is the product of backward that reads the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from refimpl.nn.models.model import Model
from refimpl.parity.transformers.recording import Module, Recording, Result, is_of_parameter


class Counterpart(NamedTuple):
    """A result of transformers, with its elements in our order; the shape may be another."""

    array: np.ndarray
    result: Result


Sites = dict[str, list[Counterpart]]
CAST = "_to_copy"


class Sizes(NamedTuple):
    """What shapes are made of: batch, positions, heads, heads of keys and values."""

    B: int
    T: int
    H: int
    K: int


def sizes_of(model: Model, tokens: np.ndarray) -> Sizes:
    """Return the sizes of a batch."""
    n_head = int(model.config["n_head"])
    B, T = tokens.shape
    return Sizes(B, T, n_head, int(model.config.get("n_kv_head", n_head)))


class Finder:
    """Finds counterparts. Each place is looked up once; sums of gradients are counted, since both sides form them in order."""

    def __init__(self, recording: Recording, sizes: Sizes) -> None:
        self.recording, self.sizes = recording, sizes
        self._known: dict[tuple[str, str], Sites] = {}
        inside = (".self_attn", ".attn", ".act")
        self._sums = iter([s for s in _low(recording.sums) if not (s.operation.module or "").endswith(inside)])

    def find(self, place: str, operation: str, site: str, count: int) -> Counterpart | None:
        """Return the counterpart of a rounding, None if there is none. count: how often the site was asked for before.

        operation: the operation of the place, a key of FAMILIES. site: with the operation's name before it.
        """
        if operation == "fan_in":
            result = next(self._sums, None)
            return None if result is None else Counterpart(result.values, result)
        if (place, operation) not in self._known:
            family = FAMILIES.get(operation)
            try:
                self._known[place, operation] = family(self.recording, place, self.sizes) if family is not None else {}
            except (LookupError, ValueError):  # the module has no such result, or several
                self._known[place, operation] = {}
        found = self._known[place, operation].get(site)
        return found[count % len(found)] if found else None


def _low(results: list[Result]) -> list[Result]:
    return [result for result in results if result.array is not None]


def _one(result: Result, array: np.ndarray | None = None) -> list[Counterpart]:
    return [Counterpart(result.values if array is None else array, result)]


def _reading(results: list[Result], storage: int | None, argument: str = "") -> Result:
    """Return the first result that reads a storage. Errors: LookupError if none does."""
    for result in results:
        if storage in ({result.read(argument)} if argument else result.reads):
            return result
    raise LookupError(f"nothing reads storage {storage}")


def _writer(results: list[Result], storage: int | None) -> Result:
    """Return the last result in a storage. Errors: LookupError if none is there."""
    for result in reversed(results):
        if result.facts.storage == storage:
            return result
    raise LookupError(f"nothing is in storage {storage}")


def _other(results: list[Result], name: str, one: Result) -> Result:
    """Return the result of an operation of that name which is not the one given. Errors: LookupError if there is none."""
    for result in results:
        if result.is_a(name) and result is not one:
            return result
    raise LookupError(f"there is one {name}, not two")


def _outer(place: str) -> str:
    return place.rpartition(".")[0]


# -- one function per operation --------------------------------------------------------------------------------------------


def linear(r: Recording, place: str, sizes: Sizes) -> Sites:
    """y is the one product of forward; dx reads the weight, dw does not. A transposed dw begins with x."""
    m = r.module(place)
    (y,) = m.of("mm", "addmm")
    x_storage, w_storage = y.read("mat1") if y.is_a("addmm") else y.read("self"), y.read("mat2")
    sites = {"linear.y.y": _one(y)}
    casts = [c for c in _low(m.of(CAST)) if not is_of_parameter(c)]
    if casts:
        sites["linear.y.x"] = _one(casts[0])
    for result in m.after(y):
        if result.is_a("sum"):
            sites["linear.db.db"] = _one(result)
        elif result.is_a("mm") and w_storage in result.reads:
            sites["linear.dx.dx"] = _one(result)
        elif result.is_a("mm"):
            sites["linear.dw.dw"] = _one(result, result.values.T if result.read("self") == x_storage else result.values)
    return sites


def parameter(r: Recording, place: str, sizes: Sizes) -> Sites:
    """Autocast's copy of a parameter, whose place is its name and the format."""
    name = _outer(place)
    cast = r.casts_of(name)[0]
    kernel = cast.values
    return {"cast.w": _one(cast, kernel.T if _is_conv(r, _outer(name)) and kernel.ndim == 2 else kernel)}


def _is_conv(r: Recording, module: str) -> bool:
    """Return whether a linear layer is GPT-2's Conv1D, whose weight is (n_in, n_out): addmm reads it as it is."""
    products = r.module(module).of("addmm")
    return bool(products) and module.endswith(("c_attn", "c_proj", "c_fc"))


def llama_rmsnorm(r: Recording, place: str, sizes: Sizes) -> Sites:
    """n is the cast before the product with the weight; dn and dy_n are the two products of its derivative."""
    m = r.module(place)
    y = m.of("mul")[-1]
    sites: Sites = {"llama_rmsnorm.y": _one(y)} if y.array is not None else {}
    casts = _low(m.of(CAST))
    if casts:
        sites["llama_rmsnorm.n"] = _one(casts[-1])
    after = m.after(y)
    dw = next(result for result in after if result.is_a("sum"))
    dyn = _writer(m.backward, dw.read("self"))
    dn = _reading([each for each in after if each.is_a("mul")], y.read("self"), "other")
    if dyn.array is not None:
        sites |= {"llama_rmsnorm.dy_n": _one(dyn), "llama_rmsnorm.dw": _one(dw)}
    if casts:
        dn = dn if dn.array is not None else _reading(_low(m.of(CAST, phase="backward")), dn.facts.storage)
        sites |= {"llama_rmsnorm.dn": _one(dn), "llama_rmsnorm.dx": _one(_low(m.of(CAST, phase="backward"))[-1])}
    return sites


def _halves(result: Result, signs: tuple[int, int] = (1, 1), swapped: bool = False) -> list[Counterpart]:
    """Return the halves of each head, (B, N, T, D) -> (B, T, N, D/2)."""
    array = result.values.swapaxes(1, 2)
    half = array.shape[-1] // 2
    parts = [array[..., :half], array[..., half:]]
    parts = parts[::-1] if swapped else parts
    return [Counterpart(part if sign > 0 else -part, result) for part, sign in zip(parts, signs, strict=True)]


def rope(r: Recording, place: str, sizes: Sizes) -> Sites:
    """Queries come first, then keys: for each a product with cos, one with sin, and their sum."""
    m = r.module(_outer(place))
    at = 0 if place.endswith("q_rope") else 1
    by_cos, by_sin = m.of("mul")[2 * at : 2 * at + 2]
    y, first = m.of("add")[at], r.module("model.rotary_emb").of(CAST)
    sites: Sites = {}
    for name, angles in zip(("cos", "sin"), _low(first)[-2:], strict=False):
        sites[f"rope.{name}"] = _one(angles, angles.values[0, :, : angles.values.shape[-1] // 2])
    if y.array is not None:
        sites |= {"rope.x_cos": _halves(by_cos), "rope.x_sin": _halves(by_sin), "rope.y": _halves(y)}
    d_cos, d_sin = (_low(m.after(product))[-1] for product in (by_cos, by_sin))
    dx = [s for s in m.sums if s.operation.sequence == by_cos.operation.sequence][-1]
    return sites | {
        "rope.dy_cos": _halves(d_cos), "rope.dy_sin": _halves(d_sin, (1, -1), swapped=True), "rope.dx": _halves(dx),
    }  # fmt: skip


def attention(r: Recording, place: str, sizes: Sizes) -> Sites:
    """The two batched products of forward are S and O; of the four of backward, two read what O reads and two what S reads."""
    m = r.module(place)
    fused = m.of("_scaled_dot_product_flash_attention_for_cpu")
    if fused:
        return {f"attention.{name}": found for name, found in _operand_casts(m, fused[0], ("query", "key"), sizes).items()}
    S, O = m.of("bmm")  # noqa: E741
    scale, softmax = _reading(m.of("mul"), S.facts.storage), m.of("_softmax")[0]
    sites = {"scores.S": _one(S), "scale.S": _one(scale), "values.O": _one(O)} | _operand_casts(m, S, ("self", "mat2"), sizes)
    if softmax.array is not None:
        sites["softmax.P"] = _one(softmax)
    else:
        sites["values.P"] = _one(_reading(m.of(CAST), softmax.facts.storage))
    d_scale = m.after(scale)[0]
    dS = _one(_writer(m.backward, d_scale.read("self")))
    sites |= {"scale.dS": _one(d_scale), "softmax.dS": dS, "softmax.dS.stored": dS, "wide_softmax.dS.stored": dS}
    dv, dk = (_reading(m.after(product), product.read("self"), "self") for product in (O, S))
    dP, dq = (_other(m.after(product), "bmm", d) for product, d in ((O, dv), (S, dk)))
    sites |= {"values.dP": _one(dP), "values.dv": _one(dv), "scores.dq": _one(dq)}
    sites["scores.dk"] = _one(dk, dk.values.swapaxes(-1, -2))
    for name, gradient in (("dk", dk), ("dv", dv)):
        groups = [each for each in m.of("sum", phase="backward") if gradient.facts.storage in each.reads]
        if groups:
            sites[name] = _one(groups[0])
    return {f"attention.{name}": found for name, found in sites.items()}


def _operand_casts(m: Module, product: Result, names: tuple[str, str], sizes: Sizes) -> Sites:
    """Autocast's casts of q and k before an operation reads them under these names, perhaps after a copy.

    By then the heads of keys may be repeated for their group, and a product reads k^T.
    """
    casts = [each for each in _low(m.of(CAST)) if m.forward.index(each) < m.forward.index(product)]
    if not casts:
        return {}
    k = next(each for each in casts if each.facts.storage == product.read(names[1]))
    (q,) = (each for each in casts if each is not k)
    heads = k.values[:, :: k.values.shape[1] // sizes.K]
    return {"scores.q": _one(q), "scores.k": _one(k, heads.swapaxes(-1, -2) if product.is_a("bmm") else heads)}


def swiglu(r: Recording, place: str, sizes: Sizes) -> Sites:
    """The product of backward that reads silu(gate) makes dup, the other one ds."""
    m, act = r.module(_outer(place)), r.module(f"{_outer(place)}.act_fn")
    (silu,), (y,), (dgate,) = act.of("silu"), m.of("mul"), act.of("silu_backward", phase="backward")
    dup = _reading(m.after(y), silu.facts.storage)
    ds = _other(m.after(y), "mul", dup)
    found = {"silu": silu, "y": y, "dup": dup, "ds": ds, "dgate": dgate}
    return {f"swiglu.{name}": _one(result) for name, result in found.items()}


def add(r: Recording, place: str, sizes: Sizes) -> Sites:
    """A layer has two sums, of which the second is named residual_2; autocast rounds the gradient of the 16-bit addend."""
    m = r.module(_outer(place))
    y = [each for each in m.of("add") if each.facts.dtype.startswith(("float", "bfloat"))][place.endswith("residual_2")]
    sites: Sites = {"add.y": _one(y)} if y.array is not None else {}
    for result in _low(m.after(y)):
        sites["add.db"] = _one(result)
    return sites


def embedding(r: Recording, place: str, sizes: Sizes) -> Sites:
    """The gradient of the table."""
    (dw,) = r.module(place).of("embedding_dense_backward", phase="backward")
    return {"embedding.dw": _one(dw)}


def cross_entropy(r: Recording, place: str, sizes: Sizes) -> Sites:
    """The gradient of the logits is rounded where that of `logits.float()` is."""
    (dlogits,) = _low(r.module("").of(CAST, phase="backward"))
    return {"cross_entropy.dlogits.stored": _one(dlogits)}


def layernorm(r: Recording, place: str, sizes: Sizes) -> Sites:
    """One kernel forward, which keeps mean and rstd in the format of x, and one backward."""
    m = r.module(place)
    names = ("y", "mean", "rstd"), ("dx", "dw", "db")
    kernels = m.of("native_layer_norm"), m.of("native_layer_norm_backward", phase="backward")
    pairs = [pair for part, results in zip(names, kernels, strict=True) for pair in zip(part, results, strict=True)]
    return {f"layernorm.{name}": _one(result) for name, result in pairs if result.array is not None}


def gelu_tanh(r: Recording, place: str, sizes: Sizes) -> Sites:
    """One kernel forward and one backward."""
    m = r.module(f"{_outer(place)}.act")
    (y,), (dx,) = m.of("gelu"), m.of("gelu_backward", phase="backward")
    return {"gelu_tanh.y": _one(y), "gelu_tanh.dx": _one(dx)}


GELU_NEW = ("half", "x3", "cubic", "inner", "scaled", "tanh", "outer", "y")
GELU_NEW_BACKWARD = ("douter", "dhalf", "dtanh", "dinner", "dcubic", "x2", "3x2", "dx.x3", "dx.half")


def gelu_new(r: Recording, place: str, sizes: Sizes) -> Sites:
    """Eight operations forward, the gradients of each backward, and the two sums of x's three gradients.

    The gradient dhalf has no site: it is halved, which is exact, and ours rounds after that. In BF16 x^3 = R(R(x x) x) is one
    operation, which does not show R(x x): it is x2, the factor of its derivative.
    """
    m = r.module(f"{_outer(place)}.act")
    backward = [each for each in _low(m.backward) if not each.is_a("clone")]
    pairs = [*zip(GELU_NEW, _low(m.forward), strict=True), *zip(GELU_NEW_BACKWARD, backward, strict=True)]
    found = dict([*pairs, *zip(("dx.sum", "dx"), _low(m.sums), strict=True)])
    found["dx.inner"] = found["dinner"]
    return {f"gelu_new.{name}": _one(result) for name, result in found.items()}


FAMILIES: Mapping[str, Callable[[Recording, str, Sizes], Sites]] = {
    "linear": linear, "cast": parameter, "llama_rmsnorm": llama_rmsnorm, "rope": rope, "attention": attention, "swiglu": swiglu,
    "add": add, "embedding": embedding, "cross_entropy": cross_entropy, "layernorm": layernorm, "gelu_tanh": gelu_tanh,
    "gelu_new": gelu_new,
}  # fmt: skip
"""The first word of our sites -> the function that finds their counterparts."""
