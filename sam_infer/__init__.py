"""Masks from prompts: geometry, intensity, engines, propagation and the MONAI Label tasks over them."""
