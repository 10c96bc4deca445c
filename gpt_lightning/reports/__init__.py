"""Measurements of trained models: the chapter's exercises as data, figures and pages."""
