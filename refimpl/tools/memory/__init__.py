"""Memory of model states and activations, predicted and measured."""
