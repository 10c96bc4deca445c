"""What runs under Lightning."""
