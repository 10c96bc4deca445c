"""The model, in plain torch."""
