"""How to call an endpoint, as lines to print: a curl line and a Python snippet that work as they stand."""

from __future__ import annotations

import json
import shlex

KEY_VARIABLE = "RAYMILL_API_KEY"
_PROMPT, _MAX_TOKENS = "The ", 32


def usage_snippets(url: str, model: str, key: str | None) -> list[str]:
    """For the API at `url` (ending in /v1). Without the key, both read it from the environment variable."""
    body = json.dumps({"model": model, "prompt": _PROMPT, "max_tokens": _MAX_TOKENS})
    bearer = f"Authorization: Bearer {key or '$' + KEY_VARIABLE}"
    python_key = f'"{key}"' if key else f'os.environ["{KEY_VARIABLE}"]'
    return [
        f"curl -s {url}/completions -H 'Content-Type: application/json' -H \"{bearer}\" -d {shlex.quote(body)}",
        "",
        *([] if key else ["import os"]),
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{url}", api_key={python_key})',
        f"answer = client.completions.create(model={model!r}, prompt={_PROMPT!r}, max_tokens={_MAX_TOKENS})",
        "print(answer.choices[0].text)",
    ]
