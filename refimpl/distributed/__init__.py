"""Training on several ranks: how they exchange arrays, and ZeRO, which divides the model states among them.

    collectives.py                 Comm, the calls of one rank; Serial, a single rank
    threads.py, mpi.py, nccl.py    ranks as threads of one process, as MPI processes, with a GPU each
    zero.py                        ZeRO stages 0 to 3
"""
