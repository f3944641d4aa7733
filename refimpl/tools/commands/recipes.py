"""Print the recipes and policies: which formats each uses, and where.

    python scripts/recipes.py
    python scripts/recipes.py --recipe amp-fp16
    python scripts/recipes.py --recipe amp-fp16 --rows       the formats of every operation, and the key of its row
    python scripts/recipes.py --json
"""

from refimpl.training.cli import main as run_program

from refimpl.precision.recipes import RECIPES
from refimpl.tools.recipes_table import show_recipes
from refimpl.training.arguments import Parser, one_of


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    result.add_argument("--recipe", type=one_of(RECIPES), metavar="NAME", dest="name", help="print one recipe in detail")
    result.add_argument("--rows", action="store_true", help="print the row of the policy that applies to each operation")
    result.add_argument("--json", action="store_true", dest="as_json", help="print the data as JSON")
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: show_recipes(**vars(parser().parse_args())))
