"""Follow one weight through one training step: its values, formats and bits, and the functions that compute them.

`python scripts/inspect_step.py --help` shows how to use it; the code is refimpl/tools/commands/inspect_step.py.
"""

from refimpl.tools.commands.inspect_step import main

if __name__ == "__main__":
    main()
