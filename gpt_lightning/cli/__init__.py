"""Command line: parses a command's arguments, runs its function and returns the exit code."""
