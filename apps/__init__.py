"""Applications served by MONAI Label."""
