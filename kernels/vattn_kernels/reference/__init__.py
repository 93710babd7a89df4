"""The truth: float64, one request and head at a time, readable beside ``algorithm.md``."""

from __future__ import annotations

from vattn_kernels.reference.decode import decode
from vattn_kernels.reference.quest import encode_pages
from vattn_kernels.reference.signature import encode_signature
from vattn_kernels.reference.sketch import encode

__all__ = ["decode", "encode", "encode_pages", "encode_signature"]
