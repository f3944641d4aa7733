"""Draw the logs of one run or several in one picture, or write them as a table.

`python scripts/plot.py --help` shows how to use it; the code is refimpl/tools/commands/plot.py.
"""

from refimpl.tools.commands.plot import main

if __name__ == "__main__":
    main()
