"""Logits to probabilities to ids to text."""
