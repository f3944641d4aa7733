"""Follow a loss scale step by step through a pattern of overflows, by the rules of a given project.

`python scripts/loss_scale.py --help` shows how to use it; the code is refimpl/tools/commands/loss_scale.py.
"""

from refimpl.tools.commands.loss_scale import main

if __name__ == "__main__":
    main()
