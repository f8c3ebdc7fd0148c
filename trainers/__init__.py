"""Models from accepted masks: loop, split, publish gate; and the pre-training of the bundled model."""
