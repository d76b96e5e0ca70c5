"""Operators: a reference, fast backends and torch.library registration for each."""

# An operator and its folder share a name. Python binds the folder to the name once, when it first
# loads the folder. The imports below do that, and then bind the name to the function, for good.
from .absorbed_attention.operator import absorbed_attention
from .context_kv.operator import context_kv
from .harmonic_merge.operator import harmonic_merge
from .latent_attention.operator import attention_weights, latent_attention
from .plan import Plan, plan
from .row_statistics.operator import row_statistics
from .slerp.operator import slerp

__all__ = [
    "Plan",
    "absorbed_attention",
    "attention_weights",
    "context_kv",
    "harmonic_merge",
    "latent_attention",
    "plan",
    "row_statistics",
    "slerp",
]
