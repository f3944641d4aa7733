"""Every mistake of the audit's catalogue that is injected into a Hugging Face model's loop, by code.

Each group of the catalogue has a file of its own, which is imported here; hf_loop.py says how a mistake is written.
"""

from __future__ import annotations

import injected_operations
import injected_scale
import injected_sums
import injected_weights
from hf_loop import MISTAKES as MISTAKES

FILES = (injected_weights, injected_scale, injected_sums, injected_operations)
