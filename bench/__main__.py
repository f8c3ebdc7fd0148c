"""python -m bench: measurements that print tables."""

import argparse
import signal
import sys

from bench import encoder, gallery, latency, propagation, soak, store
from bench.crash import command as crash
from bench.papers import command as papers
from bench.robustness import command as robustness

parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
commands = parser.add_subparsers(required=True)
latency.add_parser(commands)
propagation.add_parser(commands)
encoder.add_parser(commands)
gallery.add_parser(commands)
papers.add_parser(commands)
robustness.add_parser(commands)
soak.add_parser(commands)
store.add_parser(commands)
crash.add_parser(commands)
arguments = parser.parse_args()
# A measurement that is ended stops the processes that it started.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
sys.exit(arguments.func(arguments))
