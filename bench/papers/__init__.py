"""Published methods' tables on small sets: SAM prompted by networks and by annotators, and tuned."""
