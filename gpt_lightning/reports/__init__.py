"""What a trained model does, in tables and figures."""
