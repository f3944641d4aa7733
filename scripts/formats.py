"""Show the floating-point formats, and how each stores a given number.

`python scripts/formats.py --help` shows how to use it; the code is refimpl/tools/commands/formats.py.
"""

from refimpl.tools.commands.formats import main

if __name__ == "__main__":
    main()
