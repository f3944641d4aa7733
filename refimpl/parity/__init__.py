"""Comparison with other people's training: traces, the judge, a PyTorch model, weights in and out.

    trace.py               what a run computed, as named tensors in a file
    judge.py               each step of a trace taken again from the trace's own values
    tolerances.py          how far a correct run may be from ours: derived bounds
    diff.py                two traces compared, and the verdict in words
    pytorch.py             a PyTorch training beside ours; pytorch_model.py is its model
    fused_optimizers.py    AdamW and SGD to the bit as PyTorch's fused CPU kernels compute them
    state_dict.py          weights to and from PyTorch
"""
