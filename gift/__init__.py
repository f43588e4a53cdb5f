"""Guided fine-tuning: annotate with the instruct model, train on the base model, merge back."""

__version__ = "0.2.0"
