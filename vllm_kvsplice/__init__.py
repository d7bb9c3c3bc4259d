# SPDX-License-Identifier: Apache-2.0
"""KVSplice: keys and values as calibrated low-rank, low-bit latents in vLLM's paged cache."""

__version__ = "0.1.0"
