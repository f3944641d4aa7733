"""Which recipes a test runs over, where all of them would say the same thing many times."""

from __future__ import annotations

BASIC = ("fp64", "fp32", "fp16", "bf16", "amp-fp16", "amp-bf16", "amp-fp16-cpu", "amp-bf16-cpu", "pure-fp16", "pure-bf16")
"""The recipes that PyTorch has a twin of. Others keep their states otherwise, or quantise: that has tests of its own."""
