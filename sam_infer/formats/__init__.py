"""What image files hold, and where it lies: one module per family of formats."""
