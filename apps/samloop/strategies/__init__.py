"""Which case comes next."""

from apps.samloop.strategies.disagreement import Disagreement
from apps.samloop.strategies.diverse import Diverse
from apps.samloop.strategies.order import First, RandomCase
from apps.samloop.strategies.uncertainty import Uncertainty

__all__ = ["Disagreement", "Diverse", "First", "RandomCase", "Uncertainty"]
