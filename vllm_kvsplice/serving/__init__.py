# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: registration, the attention backend, and its torch and Triton paths."""
