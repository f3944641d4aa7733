"""A training loop in PyTorch that records what it computes, for `scripts/trace.py diff`.

    python scripts/trace.py record --recipe amp-fp16-cpu --out ours.safetensors
    python scripts/pytorch_trace.py --like ours.safetensors --out theirs.safetensors
    python scripts/trace.py diff ours.safetensors theirs.safetensors

Copy the lines marked (trace) into your own loop. They need only torch and safetensors; docs/traces.md lists the names, and any
of them may be left out. The loop uses autocast and a GradScaler; initial weights, batches and settings come from a trace of
refimpl. --unscale-late makes a common mistake: gradients are clipped before they are unscaled.
"""

from refimpl.training.cli import main

import json
import math
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError, unknown
from refimpl.parity.pytorch import import_torch
from refimpl.parity.trace import load
from refimpl.precision.policy_variants import ATTENTION
from refimpl.training.arguments import Parser
from refimpl.training.config import Config

LOW = {"amp-fp16-cpu": "float16", "amp-bf16-cpu": "bfloat16"}
STATED = ("beta1", "beta2", "eps", "weight_decay", "clip", "lr", "min_lr", "warmup", "schedule", "attention", "ignore_index")


def train(like: Path, out: Path, unscale_late: bool = False, attention: str | None = None) -> None:
    """Train and write the trace. Errors: UsageError without torch, or for a trace that the loop cannot follow."""
    torch = import_torch()
    from safetensors.torch import save

    from refimpl.parity.pytorch_model import GPT, Casts

    ours = load(like)
    config = settings_of(ours.config, like, attention)
    schedule = config.make_schedule()  # number of updates made -> learning rate
    torch.set_num_threads(1)
    model, casts = GPT(config), Casts()
    casts.ignore_index = config.ignore_index
    model.load_state_dict({n: torch.from_numpy(w) for n, w in ours.at(0, "4.master").items()}, strict=False)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    scaler = torch.amp.GradScaler(
        "cpu", config.init_scale, config.growth_factor or 2.0, config.backoff_factor or 0.5, config.growth_interval,
        enabled=config.loss_scale == "dynamic",
    )  # fmt: skip
    updates = 0

    trace: dict[str, Any] = {}  # (trace)

    def put(name: str, x: Any) -> None:  # (trace)
        trace[name] = torch.as_tensor(x).detach().clone().contiguous()

    for name, p in named.items():  # (trace) step 0 holds the initial weights
        put(f"0/4.master/{name}", p)

    for step in ours.steps:
        batch = [torch.from_numpy(ours.tensors[f"{step}/{point}"]) for point in ("0.tokens", "0.targets")]
        micro_batches = [tuple(batch)] if batch[0].dim() == 2 else list(zip(*batch, strict=True))
        counts = [int((targets != config.ignore_index).sum()) for _, targets in micro_batches]
        lr = schedule(updates)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        put(f"{step}/0.tokens", batch[0])  # (trace)
        put(f"{step}/0.targets", batch[1])  # (trace)
        put(f"{step}/2.loss_scale", scaler.get_scale())  # (trace)
        put(f"{step}/4.lr", torch.tensor(lr, dtype=torch.float64))  # (trace)
        for name, p in named.items():  # (trace)
            put(f"{step}/1.weights/{name}", p)

        loss = 0.0
        for i, (tokens, targets) in enumerate(micro_batches, 1):
            casts.seen = {}  # (trace) this model collects its outputs here; use forward hooks for other models
            with torch.autocast("cpu", dtype=getattr(torch, LOW[config.recipe])):
                part = model(tokens, targets, casts) / (sum(counts) / counts[i - 1])  # the mean over all counted targets
            scaler.scale(part).backward()
            loss += part.detach()
            for name, y in casts.seen.items():  # (trace) y.retain_grad() was called when y was computed
                place = name if i == 1 else f"{i}:{name}"  # (trace) 2:lm_head is lm_head in the second micro-batch
                put(f"{step}/2.activations/{place}", y)
                put(f"{step}/2.activation_grads/{place}", y.grad)
        put(f"{step}/2.loss", loss)  # (trace)
        for name, p in named.items():  # (trace) before unscale_, which works in place
            put(f"{step}/2.grads/{name}", p.grad)

        if unscale_late:  # the mistake: these gradients are still scaled
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        scaler.unscale_(optimizer)
        for name, p in named.items():  # (trace)
            put(f"{step}/3.unscaled/{name}", p.grad)
        if not unscale_late:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
            put(f"{step}/3.norm", norm)  # (trace)
        scaler.step(optimizer)
        scaler.update()
        found_inf = any(not x.isfinite().all() for k, x in trace.items() if k.startswith(f"{step}/2.grads/"))
        updates += not found_inf  # a skipped step does not advance the schedule
        put(f"{step}/3.found_inf", found_inf)  # (trace)
        for name, p in named.items():  # (trace)
            put(f"{step}/4.master/{name}", p)
            put(f"{step}/4.m/{name}", optimizer.state[p].get("exp_avg", torch.zeros_like(p)))
            put(f"{step}/4.v/{name}", optimizer.state[p].get("exp_avg_sq", torch.zeros_like(p)))
        put(f"{step}/4.scale", scaler.get_scale())  # (trace)
        put(f"{step}/4.t", updates)  # (trace)
        print(f"step {step}: loss {loss:.6f}, scale {scaler.get_scale():g}")

    settings = {name: getattr(config, name) for name in STATED}  # (trace) the settings of this loop
    header = {"version": 1, "settings": settings, "order": list(trace)}  # (trace)
    out.write_bytes(save(trace, {"refimpl-trace": json.dumps(header)}))  # (trace)
    print(f"{out}: {len(ours.steps)} steps, {len(trace)} tensors")


def settings_of(given: dict[str, Any], like: Path, attention: str | None) -> Config:
    """Return the configuration of the trace to follow, with another attention if one is given. Errors: UsageError."""
    if attention not in (None, *ATTENTION):
        raise UsageError(unknown("attention", attention, ATTENTION))
    config = Config.of({**given, "attention": attention} if attention else given)
    if config.recipe not in LOW or config.model != "gpt" or config.optimizer != "adamw":
        raise UsageError(f"{like} must be of a gpt with adamw, recipe amp-fp16-cpu or amp-bf16-cpu")
    if config.loss_scale not in ("dynamic", "none"):
        raise UsageError(f"{like} has the loss scale {config.loss_scale}: this loop has only PyTorch's (dynamic) or none")
    return config


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    result.add_argument("--like", type=Path, required=True, metavar="TRACE", help="a trace of refimpl to follow")
    result.add_argument("--out", type=Path, required=True, metavar="FILE", help="the trace to write")
    result.add_argument("--unscale-late", action="store_true", help="clip the gradients before they are unscaled")
    result.add_argument("--attention", metavar="NAME", help=f"{', '.join(ATTENTION)} (default: as in TRACE)")
    return result


if __name__ == "__main__":
    main(lambda: train(**vars(parser().parse_args())), goes_on=True)
