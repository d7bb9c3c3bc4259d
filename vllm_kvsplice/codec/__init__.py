# SPDX-License-Identifier: Apache-2.0
"""What a latent is: byte layout, bases, the reference of every operation, and the projector file. Knows no vLLM and no Triton."""
