"""Show what every cast of a training run did: how much it rounded, flushed to zero or overflowed, tensor by tensor.

`python scripts/inspect_precision.py --help` shows how to use it; the code is refimpl/tools/commands/inspect_precision.py.
"""

from refimpl.tools.commands.inspect_precision import main

if __name__ == "__main__":
    main()
