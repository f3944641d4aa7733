"""List the known mistakes that `--mistake` switches into a run.

    python scripts/mistakes.py
    python scripts/train.py --mistake scale-never-backs-off --init-scale 1e9 --steps 50
"""


from refimpl.cli import main

from refimpl.arguments import Parser
from refimpl.mistakes import listing


def run() -> None:
    """Print the list."""
    Parser(description=__doc__).parse_args()
    print(listing())


if __name__ == "__main__":
    main(run)
