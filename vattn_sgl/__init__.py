"""SGLang plugin of vAttention: all that knows SGLang."""

__version__ = "0.1.0"
