"""Text generation: from logits to probabilities, token ids and text."""
