"""What kill -9 leaves of a store that saves, of a server, and of a training."""
