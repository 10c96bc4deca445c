"""Text to token ids to windows."""
