"""What `compare_pytorch.py --hf` prints."""

from __future__ import annotations

import math

from refimpl.parity.pytorch import report as report_of_steps
from refimpl.parity.transformers.comparison import Result
from refimpl.parity.transformers.distances import FACTOR, middle
from refimpl.parity.transformers.following import ENOUGH, Compared
from refimpl.parity.transformers.kernels import PROPERTIES
from refimpl.training.columns import table

SHOWN = 5
"""How many of a kind are named."""


def report(result: Result) -> str:
    """Return the printed report: its three parts, and the verdict."""
    parts = [_heading(result), _from_fp64(result), _by_operation(result)]
    if result.steps is not None:
        parts.append(f"3. {len(result.steps.rows)} steps of both\n{_norms(result)}\n{report_of_steps(result.steps)}")
    config = result.ours.config
    verdict = "AGREES" if result.agrees else "DEPARTS"
    return "\n\n".join([*parts, f"{verdict}: recipe {config.recipe}, {result.ours.attention} attention"])


def _heading(result: Result) -> str:
    config = result.ours.config
    what = f"{config.model}, recipe {config.recipe}, {result.ours.attention} attention"
    what += f", {config.batch_size} x {config.block_size} tokens"
    return "\n".join([what, *result.ours.notes])


def _from_fp64(result: Result) -> str:
    farthest = max(result.gradients, key=lambda d: d.theirs)
    rows = [
        [d.name, *(f"{x:.1e}" for x in (d.ours, d.kernel, d.theirs, d.between)), f"{d.identical:.1%}"]
        for d in (result.logits, middle(result.gradients), farthest)
    ]
    lines = ["1. Distance from FP64, relative L2", table(["", "ours", "with kernels", "theirs", "between", "identical"], rows)]
    lines.append("loss: ours {:.7g}, theirs {:.7g}, FP64 {:.7g}".format(*result.losses))
    lines += [f"  far: {d.name}: ours {d.ours:.2e}, theirs {d.theirs:.2e}" for d in result.far[:SHOWN]]
    says = f"{len(result.far)} are" if result.far else "none is"
    factors = f"{FACTOR:g} times"
    if result.spread is not None:
        spread = f"PyTorch's passes with sums in other orders differ by up to {result.spread:.3g}"
        factors += f" ({FACTOR * result.spread:.3g} times, a single gradient: {spread})"
    return "\n".join([*lines, f"{says} more than {factors} as far from FP64 on one side as on the other"])


def _by_operation(result: Result) -> str:
    lines = ["2. Operation by operation, from transformers' own numbers"]
    if result.compared:
        lines += _roundings(result)
    else:
        lines.append("no result has 16 bits in this recipe")
    return "\n".join([*lines, *_tensors(result)])


def _roundings(result: Result) -> list[str]:
    by_site: dict[str, list[Compared]] = {}
    for each in result.compared:
        by_site.setdefault(each.site, []).append(each)
    lines = [table(["rounding", "results", "identical", "ulps", "verdict"], [_site(*pair) for pair in by_site.items()])]
    share = _share(sum(each.differ for each in result.compared), result.results)
    lines.append(f"{result.results:,} results of 16 bits, {share} identical (at least {ENOUGH:.1%})")
    lines += [f"  apart: {_where(each)}" for each in result.apart[:SHOWN]]
    lines += [f"  theirs alone: {name}: {n:,} results" for name, n in result.alone.most_common(SHOWN)]
    lines += [f"  ours alone: {each.place}, {each.site}" for each in result.unseen[:SHOWN]]
    lines += [f"  {name} as PyTorch's kernel has it: {PROPERTIES[name]}" for name in result.kernels]
    apart = result.disagreements
    says = f"disagree on {len(apart)}:" if apart else "agree on all of them"
    lines.append(f"the audit has judged {result.both} of these operations, too: the two judges {says}")
    return [*lines, *(f"  {sentence}" for sentence in apart[:SHOWN])]


def _site(site: str, here: list[Compared]) -> list[str]:
    seen = [each for each in here if each.result is not None]
    if not seen:
        return [site, "-", "-", "-", "inside a kernel" if site.startswith("attention.") else "not found"]
    n, differ = sum(each.elements for each in seen), sum(each.differ for each in seen)
    verdict = "DEPARTS" if any(each.departs for each in seen) else "rounding" if differ else "same"
    return [site, f"{n:,}", _share(differ, n), str(max(each.ulps for each in seen)), verdict]


def _share(differ: int, of: int) -> str:
    """Return the share of those that do not differ, 100 % only of all."""
    return f"{math.floor(1e6 * (1 - differ / of)) / 1e4:.4f}%" if differ else "100.0000%"


def _tensors(result: Result) -> list[str]:
    """Return lines on the tensors of the pass that were held to bounds."""
    worst = max(result.findings, key=lambda finding: finding.error)
    elements = sum(finding.elements for finding in result.findings)
    same = sum(finding.identical * finding.elements for finding in result.findings) / elements
    others = "other " if result.compared else ""
    what = f"{len(result.findings)} {others}outputs and gradients, {same:.2%} of {elements:,} elements identical"
    lines = [f"{what}: closest to its bound is {worst.where}, at {worst.error:.2f} of it"]
    return lines + [f"  outside its bound: {finding.where}, {finding.error:.3g} times" for finding in result.outside[:SHOWN]]


def _where(each: Compared) -> str:
    size = f"by up to {each.largest:.3g} ulps of the largest, L2 norm {each.norm:.3g} of its bound"
    what = each.note or f"{each.differ} of {each.elements} differ, {size}"
    return f"{each.place}, {each.site}: {what}"


def _norms(result: Result) -> str:
    """Return a table of the norms of the gradients before clipping."""
    assert result.steps is not None
    rows = [[str(r["step"]), f"{r['grad_norm']:.5g}", f"{r['grad_norm_torch']:.5g}"] for r in result.steps.rows]
    return table(["step", "norm", "norm torch"], [row for i, row in enumerate(rows) if i == 0 or (i + 1) % 5 == 0])
