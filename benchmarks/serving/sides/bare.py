"""A process with no engine: Python, or with `--ray` what Ray's worker has imported."""

import json
import sys

from timing import age_s

if "--ray" in sys.argv:
    import ray  # noqa: F401

print(json.dumps({"start_s": age_s()}))
