"""Operators: a reference, fast backends and torch.library registration for each."""

from .absorbed_attention import absorbed_attention
from .context_kv import context_kv
from .harmonic_merge import harmonic_merge
from .latent_attention import attention_weights, latent_attention
from .plan import Plan, plan
from .slerp import slerp

__all__ = [
    "Plan",
    "absorbed_attention",
    "attention_weights",
    "context_kv",
    "harmonic_merge",
    "latent_attention",
    "plan",
    "slerp",
]
