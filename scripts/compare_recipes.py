"""Train the same model from the same weights on the same batches under several recipes, and compare them.

`python scripts/compare_recipes.py --help` shows how to use it; the code is refimpl/tools/commands/compare_recipes.py.
"""

from refimpl.tools.commands.compare_recipes import main

if __name__ == "__main__":
    main()
