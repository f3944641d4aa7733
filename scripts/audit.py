"""Audit a PyTorch training: judge every operation, and name known mistakes with their number and fix.

`python scripts/audit.py --help` shows how to use it; the code is refimpl/tools/commands/audit.py.
"""

from refimpl.tools.commands.audit import main

if __name__ == "__main__":
    main()
