# SPDX-License-Identifier: Apache-2.0
"""The result files and the documents that quote them."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs/results").glob("*.json")}
README = (ROOT / "README.md").read_text()
QUALITY = (ROOT / "docs/quality.md").read_text()
PERFORMANCE = (ROOT / "docs/performance.md").read_text()
