"""Thin MONAI Label inference tasks over the functional core."""
