"""A training loop in PyTorch that writes down what it computes, for `scripts/trace.py diff`.

    python scripts/trace.py record --recipe amp-fp16-cpu --out ours.safetensors
    python scripts/pytorch_trace.py --like ours.safetensors --out theirs.safetensors
    python scripts/trace.py diff ours.safetensors theirs.safetensors

Copy the lines marked (trace) into a loop of your own. They need torch and safetensors only; the names are listed in
docs/traces.md, and you may leave out any of them. The loop is autocast with a GradScaler, as most people have it; start,
batches and settings come from a trace of refimpl. --unscale-late puts the classic mistake into it.
"""

from refimpl.cli import main

import json
from pathlib import Path
from typing import Any

from refimpl.arguments import Parser
from refimpl.compare_pytorch import import_torch
from refimpl.errors import UsageError


def train(like: Path, out: Path, unscale_late: bool) -> None:
    """The loop. Errors: UsageError without torch, or for a trace that it cannot follow."""
    torch = import_torch()
    from safetensors.torch import save_file

    from refimpl.config import Config
    from refimpl.pytorch_twin import GPT, Casts  # a GPT in torch.nn; yours will do as well, with its own names
    from refimpl.trace import load

    ours = load(like)
    config = Config.of(ours.config)
    low = {"amp-fp16-cpu": torch.float16, "amp-bf16-cpu": torch.bfloat16}.get(config.recipe)
    if low is None or config.model != "gpt" or config.grad_accum > 1 or config.optimizer != "adamw":
        raise UsageError(f"{like} must be of a gpt with adamw, recipe amp-fp16-cpu or amp-bf16-cpu, one micro-batch a step")
    if config.loss_scale not in ("dynamic", "none"):
        raise UsageError(f"{like} has the loss scale {config.loss_scale}: this loop has PyTorch's, dynamic, or none")
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

    trace: dict[str, Any] = {}  # (trace)

    def put(name: str, x: Any) -> None:  # (trace)
        trace[name] = torch.as_tensor(x).detach().clone().contiguous()

    for name, p in named.items():  # (trace) step 0 is the start
        put(f"0/4.master/{name}", p)

    for step in ours.steps:
        tokens, targets = (torch.from_numpy(ours.tensors[f"{step}/{point}"]) for point in ("0.tokens", "0.targets"))
        lr = float(ours.tensors[f"{step}/4.lr"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        put(f"{step}/0.tokens", tokens)  # (trace)
        put(f"{step}/0.targets", targets)  # (trace)
        put(f"{step}/2.loss_scale", scaler.get_scale())  # (trace)
        put(f"{step}/4.lr", torch.tensor(lr, dtype=torch.float64))  # (trace)
        for name, p in named.items():  # (trace)
            put(f"{step}/1.weights/{name}", p)
        casts.seen = {}  # (trace) this model keeps its outputs here; forward hooks do the same for any other
        with torch.autocast("cpu", dtype=low):
            loss = model(tokens, targets, casts)
        scaler.scale(loss).backward()
        put(f"{step}/2.loss", loss)  # (trace)
        for name, y in casts.seen.items():  # (trace) y.retain_grad() was called when it was made
            put(f"{step}/2.activations/{name}", y)
            put(f"{step}/2.activation_grads/{name}", y.grad)
        for name, p in named.items():  # (trace) before unscale_, which works in place
            put(f"{step}/2.grads/{name}", p.grad)

        if unscale_late:  # the mistake: clip what is still scaled
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        scaler.unscale_(optimizer)
        for name, p in named.items():  # (trace)
            put(f"{step}/3.unscaled/{name}", p.grad)
        if not unscale_late:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            put(f"{step}/3.norm", norm)  # (trace)
        scaler.step(optimizer)
        scaler.update()
        found_inf = any(not x.isfinite().all() for k, x in trace.items() if k.startswith(f"{step}/2.grads/"))
        put(f"{step}/3.found_inf", found_inf)  # (trace)
        for name, p in named.items():  # (trace)
            put(f"{step}/4.master/{name}", p)
            put(f"{step}/4.m/{name}", optimizer.state[p].get("exp_avg", torch.zeros_like(p)))
            put(f"{step}/4.v/{name}", optimizer.state[p].get("exp_avg_sq", torch.zeros_like(p)))
        put(f"{step}/4.scale", scaler.get_scale())  # (trace)
        print(f"step {step}: loss {loss.item():.6f}, scale {scaler.get_scale():g}")

    save_file(trace, out, metadata={"refimpl-trace": json.dumps({"version": 1, "order": list(trace)})})  # (trace)
    print(f"{out}: {len(ours.steps)} steps, {len(trace)} tensors")


def parser() -> Parser:
    """The flags of this script."""
    result = Parser(description=__doc__)
    result.add_argument("--like", type=Path, required=True, metavar="TRACE", help="a trace of refimpl to follow")
    result.add_argument("--out", type=Path, required=True)
    result.add_argument("--unscale-late", action="store_true", help="clip the gradients before they are unscaled")
    return result


if __name__ == "__main__":
    main(lambda: train(**vars(parser().parse_args())), goes_on=True)
