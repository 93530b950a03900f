"""relook."""
