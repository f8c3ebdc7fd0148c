"""python -m bench: measurements that print tables."""

import argparse
import sys

from bench import latency, propagation

parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
commands = parser.add_subparsers(required=True)
latency.add_parsers(commands)
propagation.add_parser(commands)
arguments = parser.parse_args()
sys.exit(arguments.func(arguments))
