# SPDX-License-Identifier: Apache-2.0
"""`kvsplice demo`: the bundled model calibrated, scored and served with and without the plugin."""
