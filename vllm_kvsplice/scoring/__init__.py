# SPDX-License-Identifier: Apache-2.0
"""What a projector costs and saves: simulated in transformers, or served by vLLM."""
