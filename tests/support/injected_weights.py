"""Mistakes A, of weights and optimizers, in a Hugging Face model's loop."""
