"""Follow a loss scale: what a project's rules make of a pattern of overflows, step by step.

`python scripts/loss_scale.py --help` shows how to use it; the code is refimpl/tools/commands/loss_scale.py.
"""

from refimpl.tools.commands.loss_scale import main

if __name__ == "__main__":
    main()
