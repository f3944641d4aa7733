"""List the known mistakes that `--mistake` switches into a run.

    python scripts/mistakes.py
    python scripts/train.py --mistake scale-never-backs-off --init-scale 1e9 --steps 50
"""


from refimpl.arguments import Parser
from refimpl.cli import main
from refimpl.mistakes import listing

if __name__ == "__main__":
    Parser(description=__doc__).parse_args()
    main(lambda: print(listing()))
