"""The GPT model and its loss, in plain PyTorch."""
