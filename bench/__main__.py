"""python -m bench: measurements that print tables."""

import argparse
import sys

from bench import encoder, latency, propagation

parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
commands = parser.add_subparsers(required=True)
latency.add_parser(commands)
propagation.add_parser(commands)
encoder.add_parser(commands)
arguments = parser.parse_args()
sys.exit(arguments.func(arguments))
