"""Record what a training run computes, and find where another run departs from it, and why.

`python scripts/trace.py --help` shows how to use it; the code is refimpl/tools/commands/trace.py.
"""

from refimpl.tools.commands.trace import main

if __name__ == "__main__":
    main()
