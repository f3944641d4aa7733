"""The audit of a PyTorch training loop. What is there: the recorder, which sees every operation of a step.

    recorder.py            `Recorder`, a context manager around the user's step, sees its operations from forward to optimizer;
                           `UncompiledRecorder` is the same for programs that torch.compile compiles
    operation.py           `Operation`: what is kept of one operation; `Keep`: how much of it
    place.py               where an operation was called: its phase, module and source line, from the Python frames
    nodes.py               which forward operation a node of the autograd graph belongs to, by sequence numbers
    roles.py               which tensor is what: parameter, gradient, optimizer state, buffer, EMA

The recorder judges nothing and changes nothing: parameters, random numbers and outputs of a recorded step have the bits of
an unrecorded one. recorder.py and roles.py need torch; this package does not import them.
"""
