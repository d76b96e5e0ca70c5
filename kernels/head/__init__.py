"""The mean of the latents, a LayerNorm and a linear layer: from latents to logits."""
