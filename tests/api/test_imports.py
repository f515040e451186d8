"""What a replica need not load: memory and start time are goals."""

import subprocess
import sys

ASK = """
import sys
import raymill.api.routes
from raymill.api.openapi import openapi_document
openapi_document(["tiny"], 128, 300, 8)
print(*sorted({"torch", "numba", "ray", "transformers", "llguidance", "scipy", "pandas"} & sys.modules.keys()))
"""


def test_the_api_loads_neither_torch_nor_numba_nor_ray():
    made = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True, timeout=60)
    assert made.stdout.split() == []
