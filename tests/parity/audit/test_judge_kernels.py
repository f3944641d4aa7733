"""What single kernels of PyTorch do at the edges, which the judge must not call wrong, and results beside them that are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from judged import FORMATS, forged, moved, recorded, the, unjudged, verdicts
from torch import Tensor

from refimpl.parity.audit.judge.again import gamma
from refimpl.parity.audit.judge.judge import Judge
from refimpl.parity.audit.origins import nonfinite
from refimpl.parity.audit.values import CannotJudge, Values

ATEN = torch.ops.aten
LOW = (torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def level(values: Values, result: str = "out", change: Callable[[Tensor], Tensor] | None = None) -> str:
    """Return the verdict on a result, or on another one in its place."""
    return verdicts(values if change is None else forged(values, result, change))[result].level


def is_good(values: Values) -> bool:
    return all(verdict.level in ("fine", "note") for verdict in verdicts(values).values())


# ------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize(("groups", "dilation", "size"), [(1, 1, 8), (1, 2, 8), (2, 2, 17)])
def test_gradients_of_a_dilated_convolution_are_added_in_16_bits(
    dtype: torch.dtype, scale: float, groups: int, dilation: int, size: int
) -> None:
    x, w = draw(8, 4, size, size, dtype=dtype), draw(4, 4 // groups, 2, 2, dtype=dtype)
    places = [[1, 1], [1, 1], [dilation, dilation], False, [0, 0], groups]
    y = ATEN.convolution(x, w, None, *places)
    for gradient in (draw(*y.shape, dtype=dtype, scale=scale), draw(*y.shape, dtype=dtype, scale=scale).abs()):
        values = the(
            "aten.convolution_backward",
            lambda gradient=gradient: ATEN.convolution_backward(gradient, x, w, [4], *places, [True] * 3),
        )
        assert is_good(values)
        size = gradient.abs().sum((0, 2, 3))
        assert level(values, "out.2", lambda db, size=size: db + size / 10) == "wrong"


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (0.3, 0.7), (1, 0.1), (0, 0.3)])
@pytest.mark.parametrize("K", [0, 1, 2, 70])
def test_products_with_alpha_and_beta_are_judged_with_any_number_of_terms(
    dtype: torch.dtype, alpha: float, beta: float, K: int
) -> None:
    rows, columns, x = draw(100, K, dtype=dtype), draw(K, 100, dtype=dtype).t(), draw(K, dtype=dtype)
    for a in (rows, columns):
        bias = draw(100, dtype=dtype)
        values = the("aten.addmv", lambda a=a, bias=bias: torch.addmv(bias, a, x, alpha=alpha, beta=beta))
        if alpha == 0 and torch.equal(torch.addmv(bias, a, x, alpha=alpha, beta=beta), bias):
            # PyTorch 2.13 forgets beta there, in BF16 on processors with instructions for it: the judge is right
            assert level(values) == "wrong"
            continue
        assert is_good(values) and level(values, "out", lambda y: moved(y, 600)) == "wrong"
    values = the("aten.addmm", lambda: torch.addmm(draw(100, 1, dtype=dtype), rows, x[:, None], alpha=alpha, beta=beta))
    assert is_good(values) and level(values, "out", lambda y: moved(y, 600 if dtype == torch.float32 else 4)) == "wrong"


# ------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("size", "scale"), [((16, 16), 1.7), ((33, 20), 0.37), ((100, 64), 3.3), ((7, 1), 2.0)])
def test_positions_in_fp32_move_a_little_between_the_points(
    align: bool, given: bool, size: tuple[int, int], scale: float
) -> None:
    x, out = draw(2, 3, *size) + 100, [int(scale * n) for n in size]
    scales = (scale, scale) if given else (None, None)
    values = the("aten.upsample_bilinear2d", lambda: ATEN.upsample_bilinear2d(x, out, align, *scales))
    assert level(values) == "fine"
    assert level(values, "out", lambda y: y + 1.0) == "wrong"
    assert level(values, "out", lambda y: ATEN.upsample_bilinear2d(x, out, not align, *scales)) == "wrong" or size == (7, 1)
    gradient = draw(2, 3, *out)
    values = the(
        "aten.upsample_bilinear2d_backward",
        lambda: ATEN.upsample_bilinear2d_backward(gradient, out, [2, 3, *size], align, *scales),
    )
    assert level(values) == "fine" and level(values, "out", lambda dx: dx * 1.001) == "wrong"


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("mode", "size"), [("linear", (9,)), ("bilinear", (9, 5)), ("trilinear", (9, 5, 4))])
@pytest.mark.parametrize("scale", [2.0, 1.7, 0.6])
def test_linear_upsampling_on_any_axes_is_judged(dtype: torch.dtype, mode: str, size: tuple[int, ...], scale: float) -> None:
    def run() -> None:
        y = F.interpolate(draw(2, 3, *size, dtype=dtype).requires_grad_(), scale_factor=scale, mode=mode)
        y.backward(draw(*y.shape, dtype=dtype))

    seen = [values for values in recorded(run) if "upsample" in values.operation.name]
    assert len(seen) == 2
    for values in seen:
        assert is_good(values) and level(values, "out", lambda y: y.flip(-1)) == "wrong"
        assert level(values, "out", lambda y: y + y.abs().max() / 4) == "wrong"


def test_sums_of_many_terms_are_judged_as_sums_of_parts() -> None:
    assert gamma(2**22) > 0.3 > gamma(2**22 + 1) > 2**18 * 2.0**-24 and gamma(2**26) < 1
    with pytest.raises(CannotJudge, match=r"more than 2\^27 terms"):
        gamma(2**28)
    x = torch.ones(1).expand(2**23 + 2**10)
    values = the("aten.sum", x.sum)
    assert level(values) == "fine" and level(values, "out", lambda y: y * 0.5) == "wrong"


COPIES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "im2col": (lambda x: F.unfold(x, 3), (2, 3, 8, 8)),
    "col2im": (lambda x: F.fold(x, (8, 8), 3), (2, 27, 36)),
    "unfold_backward": (lambda x: x.unfold(2, 3, 1), (2, 3, 8)),
    "reflection_pad2d": (lambda x: F.pad(x, (2, 2, 1, 1), mode="reflect"), (2, 3, 8, 8)),
    "replication_pad2d": (lambda x: F.pad(x, (2, 2, 3, 3), mode="replicate"), (2, 3, 8, 8)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 3), (2, 3, 8, 8)),
    "upsample_nearest1d": (lambda x: F.interpolate(x, scale_factor=2.3), (2, 3, 7)),
    "upsample_nearest2d": (lambda x: F.interpolate(x, size=(16, 4)), (2, 3, 8, 8)),
    "_upsample_nearest_exact2d": (lambda x: F.interpolate(x, scale_factor=3, mode="nearest-exact"), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", COPIES)
def test_what_copies_elements_and_adds_their_gradients_is_judged(dtype: torch.dtype, name: str) -> None:
    function, shape = COPIES[name]

    def run() -> None:
        y = function(draw(*shape, dtype=dtype).requires_grad_())
        y.backward(draw(*y.shape, dtype=dtype))

    names = {f"aten.{name}", f"aten.{name}_backward", "aten.im2col", "aten.col2im"}
    seen = [values for values in recorded(run) if values.operation.name.rpartition(".")[0] in names]
    assert len(seen) == (1 if name == "unfold_backward" else 2)
    for values in seen:
        result = next(name for name, tensor in values.results() if tensor.is_floating_point())
        assert is_good(values) and level(values, result, lambda y: y + y.abs().max() / 4) == "wrong"
        assert level(values, result, lambda y: y.flip(-1)) == "wrong"


def test_a_position_that_fp32_takes_for_the_next_point_is_not_judged() -> None:
    x = torch.tensor([[[1.0, 2.0]]])
    values = the("aten.upsample_nearest1d", lambda: F.interpolate(x, size=82))
    assert int(values.output.eq(2).sum()) == 40  # 41 (2 / 82) is 1, and a little less in FP32
    assert unjudged(values).startswith("positions that FP32")
    values = the("aten.upsample_nearest1d", lambda: F.interpolate(x, size=8))
    assert level(values, "out", lambda y: y.roll(1)) == "wrong"


# ------------------------------------------------------------------------------------------------- Inf, NaN, FP8


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("exponent", [0.5, -0.5])
def test_the_root_of_negative_infinity_is_what_a_kernel_makes_of_it(dtype: torch.dtype, exponent: float) -> None:
    x = torch.tensor([-INF, INF, 0.0, 4.0, NAN] * 9, dtype=dtype)
    values = the("aten.pow", lambda: x**exponent)
    assert is_good(values)
    for right in (NAN, INF if exponent > 0 else 0.0):
        assert level(values, "out", lambda y, right=right: y.masked_fill(x == -INF, right)) in ("fine", "note")
    assert level(values, "out", lambda y: y.masked_fill(x == -INF, 1.0)) == "wrong"


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bad", [INF, -INF, NAN, 3e38])
def test_rows_of_a_norm_that_overflow_are_not_called_wrong(dtype: torch.dtype, bad: float) -> None:
    x, w = draw(6, 24, dtype=dtype), draw(24)
    x[0, 3] = bad
    values = the("aten.native_layer_norm", lambda: F.layer_norm(x, (24,), w.to(dtype)))
    assert is_good(values)
    assert level(values, "out.0", lambda y: y.index_fill(0, torch.tensor(2), NAN)) == "wrong"  # another row
    y, mean, rstd = values.output
    backward = the(
        "aten.native_layer_norm_backward",
        lambda: ATEN.native_layer_norm_backward(y.nan_to_num(), x, [24], mean, rstd, w.to(dtype), None, [True, True, False]),
    )
    assert is_good(backward)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("rows", [1, 2, 50, 300])
def test_fp32_weights_of_a_norm_have_gradients_rounded_to_the_inputs_16_bits(dtype: torch.dtype, rows: int) -> None:
    x, w, b = draw(rows, 24, dtype=dtype), draw(24), draw(24)
    y, mean, rstd = ATEN.native_layer_norm(x, [24], w, b, 1e-5)
    values = the(
        "aten.native_layer_norm_backward",
        lambda: ATEN.native_layer_norm_backward(y.flip(1), x, [24], mean, rstd, w, b, [True] * 3),
    )
    found = verdicts(values)
    assert found["out.1"].dtype == found["out.2"].dtype == "float32" and is_good(values)
    assert level(values, "out.1", lambda dw: dw + dw.abs().max() * (rows + 1)) == "wrong"


def fp8_formats() -> list[torch.dtype]:
    names = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    return [getattr(torch, name) for name in names if hasattr(torch, name)]


@pytest.mark.parametrize("dtype", fp8_formats(), ids=str)
def test_infinities_and_nan_of_fp8_are_counted(dtype: torch.dtype) -> None:
    (plain,) = [v for v in recorded(lambda: torch.ones(3).to(dtype)) if "_to_copy" in v.operation.name]
    assert nonfinite(plain) is None
    x = torch.tensor([1.0, NAN, 2.0])
    found = nonfinite(the("aten._to_copy", lambda: x.to(dtype)))
    assert found is not None and found.results["out"].nan == 1 and found.position == (1,) and not found.born


# ------------------------------------------------------------------------------------------------- indices


def scattered(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    index = torch.tensor([[0, 1, 1, 3], [3, 3, 3, 0], [1, 1, 0, 1]])
    x, source, one = draw(3, 5, dtype=dtype), draw(3, 4, dtype=dtype), index[0]
    warnings.filterwarnings("ignore", "The reduce argument of torch.scatter with Tensor src is deprecated", UserWarning)
    warnings.filterwarnings("ignore", r"index_reduce\(\) is in beta", UserWarning)
    return {
        "scatter_add": lambda: x.scatter_add(1, index, source),
        "scatter_add_": lambda: x.clone().scatter_add_(1, index, source),
        "scatter.reduce": lambda: x.scatter(1, index, source, reduce="add"),
        "scatter_.value_reduce": lambda: x.clone().scatter_(1, index, -3, reduce="add"),
        "scatter.reduce product": lambda: x.scatter(1, index, source, reduce="multiply"),
        **{
            f"scatter_reduce {how} {itself}": lambda how=how, itself=itself: x.scatter_reduce(
                1, index, source, how, include_self=itself
            )
            for how in ("sum", "mean", "prod", "amax", "amin") for itself in (True, False)
        },
        "index_add": lambda: x.index_add(1, one, source, alpha=-2),
        "index_add half": lambda: x.index_add(1, one, source, alpha=0.3),
        "index_reduce": lambda: x.index_reduce(1, one, source, "mean"),
        "index_put": lambda: x.index_put((torch.tensor([0, 2, 2, 0]), one), source[0], accumulate=True),
        "put": lambda: x.put(one, source[0], accumulate=True),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", scattered(torch.float32))
def test_sums_at_indices_are_judged(dtype: torch.dtype, name: str) -> None:
    overload = "aten." + name.split()[0].split(".")[0]
    values = next(v for v in recorded(scattered(dtype)[name]) if v.operation.name.rpartition(".")[0] == overload)
    (result,) = verdicts(values)
    assert is_good(values) and verdicts(values)[result].judged == 15

    def spoiled(y: Tensor) -> Tensor:
        return y + y.abs().max()

    assert level(values, result, spoiled) == "wrong"
    assert level(values, result, lambda y: torch.cat([y[:, :4], moved(y[:, 4:], 1)], 1)) == "wrong"  # receives nothing


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_gradients_of_indexing_are_judged(dtype: torch.dtype) -> None:
    x = draw(9, 5, dtype=dtype).requires_grad_()
    at = torch.tensor([0, 3, 3, 3, 8, 0])
    columns = at[:, None].expand(-1, 5)
    for function in (lambda: x[at], lambda: x.index_select(0, at), lambda: x.gather(0, columns), lambda: x[x.detach() > 0]):
        judge = Judge()
        seen = recorded(lambda function=function: function().square().sum().backward())
        with torch.no_grad():
            found = [verdict for values in seen for verdict in judge(values)]
        assert not judge.unjudged and {verdict.level for verdict in found} <= {"fine", "note"}


def test_a_sum_of_many_in_16_bits_at_one_index_is_a_note() -> None:
    index, ones = torch.zeros(1000, dtype=torch.int64), torch.ones(1000, dtype=torch.bfloat16)
    values = the("aten.scatter_add", lambda: torch.zeros(2, dtype=torch.bfloat16).scatter_add(0, index, ones))
    assert level(values) == "fine"
    (verdict,) = verdicts(forged(values, "out", lambda y: y.clamp(max=256))).values()  # 256 + 1 is 256
    assert verdict.level == "note" and verdict.equal == 0.5 and "rounds each time" in verdict.reason


def test_one_of_several_numbers_put_at_an_index_may_stay() -> None:
    index, x = torch.tensor([1, 1, 2]), torch.arange(4.0)
    values = the("aten.index_put", lambda: x.index_put((index,), torch.tensor([5.0, 6.0, 7.0])))
    assert level(values) == "fine" and float(values.output[1]) == 6
    other = forged(values, "out", lambda y: y.index_fill(0, torch.tensor([1]), 5.0))
    assert unjudged(other).startswith("several numbers are written to one index")
    values = the("aten.index_put", lambda: x.index_put((index[1:],), torch.tensor([6.0, 7.0])))
    assert level(values, "out", lambda y: y.index_fill(0, torch.tensor([1]), 5.0)) == "wrong"


def test_views_made_in_place_are_no_arithmetic() -> None:
    judge = Judge()
    seen = recorded(lambda: draw(3, 4).unsqueeze_(0).squeeze_(0).t_().transpose_(0, 1))
    names = {values.operation.name.split(".")[1] for values in seen for _ in judge(values)}
    assert len(seen) >= 4 and not judge.unjudged and not names & {"unsqueeze_", "squeeze_", "t_", "transpose_"}
