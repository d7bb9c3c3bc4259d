# SPDX-License-Identifier: Apache-2.0
"""The codec laboratory: published KV cache codecs and our own, scored side by side by ``kvsplice compare``."""
