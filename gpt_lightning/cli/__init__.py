"""Command line: verbs to functions. The only package that parses arguments and ends a process."""
