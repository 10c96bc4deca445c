"""Model weights: read from files, written to files, downloaded."""
