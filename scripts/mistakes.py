"""List the known mistakes that `--mistake` injects into a run.

`python scripts/mistakes.py --help` shows how to use it; the code is refimpl/tools/commands/mistakes.py.
"""

from refimpl.tools.commands.mistakes import main

if __name__ == "__main__":
    main()
