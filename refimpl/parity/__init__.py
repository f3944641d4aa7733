"""Comparison with other people's training: traces, the judge, a PyTorch model, weights in and out.

    trace.py               traces: what a run computed, as named tensors in a file
    trace_checks.py, trace_settings.py    malformed traces refused; the settings that a trace states
    judge.py               replays each step of a trace from the trace's own values and compares
    operations.py, replay_start.py        what each tensor can be judged by; where a replay begins
    findings.py, coverage.py              one tensor's comparison; which tensors were judged
    tolerances.py          derived bounds: how far a correct run may differ from ours
    other_kernels.py       fused attention as another correct kernel computes it
    diff.py                compares two traces and prints the verdict
    mistakes.py            known mistakes, to be injected into a run; mistakes_forward.py, mistakes_update.py define them
    known_mistake.py, hooks.py            the class of a mistake; an optimizer that observes or changes the updates of another
    mistake_table.py       which known mistakes the judge finds, as a table
    pytorch.py             trains with PyTorch and with refimpl side by side; pytorch_model.py is PyTorch's side
    fused_optimizers.py    AdamW and SGD, equal to PyTorch's fused CPU kernels to the last bit
    state_dict.py          weights to and from PyTorch
    transformers/          transformers' model of a folder beside ours, with the same weights
    audit/                 what any PyTorch loop computes: recorded, judged, and searched for known mistakes
"""
