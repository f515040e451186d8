"""The app of a replica under plain uvicorn: what the API costs without Ray. Ends when its stdin does."""

import os
import sys
import threading
from argparse import ArgumentParser
from pathlib import Path

import uvicorn

from raymill.stages.serve import Config, Replica


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(options.folder / "metrics")
    config = Config(replicas=1, max_slots=options.slots)
    api = {"model_name": "benchmark", "quantization": "int8", "stream_interval_ms": config.stream_interval_ms}
    keys = str(options.folder / "keys.json")
    replica = Replica(config.model_dump(mode="json"), str(options.model), keys, api, options.threads, "cpu")
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    uvicorn.run(
        replica.__serve_build_asgi_app__(), host="127.0.0.1", port=options.port, log_level="warning", access_log=False
    )


main()
