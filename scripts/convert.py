"""Convert weights to and from PyTorch and Hugging Face.

`python scripts/convert.py --help` shows how to use it; the code is refimpl/tools/commands/convert.py.
"""

from refimpl.tools.commands.convert import main

if __name__ == "__main__":
    main()
