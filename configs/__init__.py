# SPDX-License-Identifier: Apache-2.0
"""Presets as TOML files; the import name is ``kvsplice_configs``. Read by ``vllm_kvsplice.presets``."""
