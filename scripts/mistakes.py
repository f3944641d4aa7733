"""List the known mistakes that `--mistake` switches into a run.

    python scripts/mistakes.py
    python scripts/train.py --mistake scale-never-backs-off --init-scale 1e9 --steps 50
"""

import argparse

from refimpl.cli import main
from refimpl.mistakes import listing

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main(lambda: print(listing()))
