"""Network architectures that both trainers and inferers build."""
