"""Sample text from a checkpoint, or measure the loss of a file under it.

`python scripts/generate.py --help` shows how to use it; the code is refimpl/tools/commands/generate.py.
"""

from refimpl.tools.commands.generate import main

if __name__ == "__main__":
    main()
