"""Time training steps: against PyTorch, against their own matrix products, by operation, and as sizes grow.

`python scripts/bench.py --help` shows how to use it; the code is refimpl/tools/commands/bench.py.
"""

from refimpl.tools.commands.bench import main

if __name__ == "__main__":
    main()
