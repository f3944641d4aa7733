"""Print what setup.cfg requires, each at its lower bound: `python .ci/lower_bounds.py EXTRA ...` gives lines for pip."""

import configparser
import sys

config = configparser.ConfigParser()
config.read("setup.cfg")
required = config["options"]["install_requires"].split()
for extra in sys.argv[1:]:
    required += config["options.extras_require"][extra].split()
print("\n".join(line.replace(">=", "==") for line in required))
