"""Let a model continue a text, or measure its loss on a file.

`python scripts/generate.py --help` shows how to use it; the code is refimpl/tools/commands/generate.py.
"""

from refimpl.tools.commands.generate import main

if __name__ == "__main__":
    main()
