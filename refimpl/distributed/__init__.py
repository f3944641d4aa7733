"""Several ranks: how they exchange arrays, and ZeRO, which divides the model states among them.

    collectives.py           Comm, six calls; Serial, one rank
    threads.py, mpi.py, nccl.py    ranks as threads of one process, as MPI processes, as GPUs
    zero.py                  ZeRO's stages 0 to 3
"""
