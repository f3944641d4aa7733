"""Mistakes C, of sums of gradients, in a Hugging Face model's loop."""
