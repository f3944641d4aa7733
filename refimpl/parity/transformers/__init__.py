"""transformers' model of a folder beside ours, with the same weights: `scripts/compare_pytorch.py --hf DIR`.

    comparison.py    all of it: distances from FP64, operation by operation, a short training, and the verdict
    printed.py       the report that is printed
    ours.py          our side: the sizes and weights of a folder, and the batches
    training.py      their side: `TransformersTraining`, the model of the folder with PyTorch's optimizer and scaler
    places.py        hooks that see the outputs which our operations have too
    distances.py     logits and gradients of both against an FP64 reference
    spread.py        gradients of theirs with sums in other orders: how far apart they are by chance
    recording.py     one pass of theirs: every operation, with its 16-bit results and the audit's verdicts
    sites.py         which of these results is the one that a rounding of ours makes
    following.py     our definitions on their numbers, rounding by rounding
    kernels.py       operations as PyTorch's kernels for the CPU compute them, where they round more often

It needs torch and transformers, which are imported here alone.
"""
