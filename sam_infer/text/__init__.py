"""What is said about an object in words, and how the words become numbers."""
