"""Training of the bundled promptable model from scratch: ``python -m trainers.pretrain``."""
