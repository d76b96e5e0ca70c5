"""Operators: a reference, fast backends and torch.library registration for each."""

from .harmonic_merge import harmonic_merge
from .latent_attention import attention_weights, latent_attention
from .slerp import slerp

__all__ = ["attention_weights", "harmonic_merge", "latent_attention", "slerp"]
