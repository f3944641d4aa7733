"""Print the recipes and the policies: which formats each way to train uses, and where.

    python scripts/recipes.py
    python scripts/recipes.py --recipe amp-fp16
    python scripts/recipes.py --json
"""

from refimpl.training.cli import main as run_program

from refimpl.tools.recipes_table import show_recipes
from refimpl.training.arguments import Parser


def parser() -> Parser:
    """The flags of this script."""
    result = Parser(description=__doc__)
    result.add_argument("--recipe", metavar="NAME", dest="name", help="only this one, in detail")
    result.add_argument("--json", action="store_true", dest="as_json", help="print it as data")
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: show_recipes(**vars(parser().parse_args())))
