"""Train with refimpl and with PyTorch side by side, and report whether and where they differ.

`python scripts/compare_pytorch.py --help` shows how to use it; the code is refimpl/tools/commands/compare_pytorch.py.
"""

from refimpl.tools.commands.compare_pytorch import main

if __name__ == "__main__":
    main()
