"""Stock MONAI Label and samloop under the same bad conditions, side by side."""
