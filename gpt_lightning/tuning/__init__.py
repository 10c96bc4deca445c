"""Search for the settings with the lowest validation loss; each trial is a child process ``fit``."""

SAMPLERS = ("tpe", "random", "grid")
