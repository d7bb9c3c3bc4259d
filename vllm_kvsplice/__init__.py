# SPDX-License-Identifier: Apache-2.0
"""KVSplice: keys and values as calibrated low-rank, low-bit latents in vLLM's paged cache."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of ``vllm.general_plugins``: make ``--attention-backend kvsplice`` known to vLLM.

    vLLM calls it in every process, more than once, in every environment that has this package, and an exception here
    would stop vLLM for users who never chose kvsplice: so it imports late, is idempotent and never raises.
    """
    try:
        from vllm_kvsplice.serving.registration import register_with_vllm

        register_with_vllm()
    except Exception as error:
        import logging

        logging.getLogger("vllm.kvsplice").warning(
            "kvsplice is installed but was not registered with vLLM (%s: %s); vLLM goes on without it.",
            type(error).__name__,
            error,
        )
