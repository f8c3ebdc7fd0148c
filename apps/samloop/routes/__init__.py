"""The routes that are samloop's own; all others are MONAI Label's, run in threads."""
