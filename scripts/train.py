"""Train a model on real text in mixed precision.

`python scripts/train.py --help` shows how to use it; the code is refimpl/tools/commands/train.py.
"""

from refimpl.tools.commands.train import main

if __name__ == "__main__":
    main()
