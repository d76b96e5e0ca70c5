"""The head of a model, from latents to logits: their mean, a LayerNorm and a linear layer."""
