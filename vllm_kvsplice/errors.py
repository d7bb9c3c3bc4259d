# SPDX-License-Identifier: Apache-2.0
"""The one exception that users are meant to see: a sentence that says what was given, what was expected and what to do."""


class KVSpliceError(ValueError):
    """A request, a file or a model that KVSplice cannot serve; the message is one sentence for the user."""
