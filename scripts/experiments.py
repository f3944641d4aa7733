"""Run toy experiments on training in 16 bits: each answers one question in seconds, with a table and a picture.

`python scripts/experiments.py --help` shows how to use it; the code is refimpl/tools/commands/experiments.py.
"""

from refimpl.tools.commands.experiments import main

if __name__ == "__main__":
    main()
