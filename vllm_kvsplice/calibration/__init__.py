# SPDX-License-Identifier: Apache-2.0
"""Text through a model, moments out of its attention, bases out of the moments: how a projector file is made."""
