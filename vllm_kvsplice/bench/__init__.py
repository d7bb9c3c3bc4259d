# SPDX-License-Identifier: Apache-2.0
"""`kvsplice bench`: kernels (``kernels``) and serving (``serve``) timed against what vLLM has without us."""
