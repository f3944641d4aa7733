"""The judge of operations: each result beside the same operation in FP64 on the same inputs, within a derived bound.

    table.py               which function judges which of PyTorch's operations; what is not arithmetic and need not be judged
    judge.py               `Judge`: judges operations as they run, and counts what it judged and what it could not
    (one file per family)  functions from `Values` to `Twin`s: the operation in FP64, and the derivation of its bound
"""
