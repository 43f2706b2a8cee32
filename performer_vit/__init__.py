"""Performer attention for vision, in JAX and Flax."""

from performer_vit.favor import FavorAttention, favor_attention, make_attention_fn
from performer_vit.vit import VisionTransformer

__version__ = '0.1.0'
__all__ = ['FavorAttention', 'VisionTransformer', 'favor_attention', 'make_attention_fn']
