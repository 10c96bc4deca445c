"""Training with Lightning: settings, module, callbacks, checkpoints, resuming."""
