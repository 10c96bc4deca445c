"""Weights from files, whatever their form."""
