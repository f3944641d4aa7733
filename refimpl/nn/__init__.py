"""Autograd, operations and models.

    autograd.py     the tape: it records operations and replays them backwards; it does no arithmetic
    op.py           what an operation is: a pair of plain functions
    ops.py          the table of all operations
    linear.py, attention.py, norm.py, elementwise.py, embedding.py, loss.py, shape.py    operations, forward beside backward
    models/         GPT-2 and an MLP, one line per operation
"""
