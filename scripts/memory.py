"""Count the memory of training: model states, activations, and each rank's share of them under ZeRO.

`python scripts/memory.py --help` shows how to use it; the code is refimpl/tools/commands/memory.py.
"""

from refimpl.tools.commands.memory import main

if __name__ == "__main__":
    main()
