"""Print the recipes and policies: which formats each uses, and where.

`python scripts/recipes.py --help` shows how to use it; the code is refimpl/tools/commands/recipes.py.
"""

from refimpl.tools.commands.recipes import main

if __name__ == "__main__":
    main()
