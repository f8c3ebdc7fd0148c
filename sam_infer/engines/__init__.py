"""What turns prompts into masks."""
