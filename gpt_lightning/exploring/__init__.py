"""The page that looks into a model: next token, surprisal, logit lens, attention, checkpoints of a run. Lightning is not imported."""
