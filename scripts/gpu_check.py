"""Check the CuPy backend on your GPU, and print a report to paste into an issue.

`python scripts/gpu_check.py --help` shows how to use it; the code is refimpl/tools/commands/gpu_check.py.
"""

from refimpl.tools.commands.gpu_check import main

if __name__ == "__main__":
    main()
