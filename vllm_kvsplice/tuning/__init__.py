# SPDX-License-Identifier: Apache-2.0
"""Chooses the tiers of every layer, K and V apart, for a budget of loss or of bytes: ``kvsplice tune``."""
