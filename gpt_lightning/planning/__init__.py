"""Memory, disk and time of a run, by formula."""
