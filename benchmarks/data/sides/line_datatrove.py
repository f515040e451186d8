"""datatrove's local pipeline on two workers: jsonl -> Gopher and C4 filters -> MinHash in four steps -> token shards.

Run by path with the folder of the input (two jsonl files), the tokenizer.json and a folder for everything it writes.
Signatures are made in the same pass as the filters, which saves datatrove one reading.
"""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter

WORKERS = 2


def main(source: str, tokenizer: str, goal: Path) -> None:
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    kept, signatures, buckets, removed = (str(goal / name) for name in ("kept", "signatures", "buckets", "removed"))
    steps = [
        (
            [
                JsonlReader(source),
                GopherRepetitionFilter(),
                GopherQualityFilter(),
                C4QualityFilter(),
                JsonlWriter(kept, output_filename="${rank}.jsonl", compression=None),
                MinhashDedupSignature(signatures, config),
            ],
            WORKERS,
        ),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        ([MinhashDedupCluster(buckets, removed, config=config)], 1),
        (
            [
                JsonlReader(kept),
                MinhashDedupFilter(removed),
                DocumentTokenizer(str(goal / "tokens"), tokenizer, eos_token="<|endoftext|>", shuffle_documents=False),
            ],
            WORKERS,
        ),
    ]
    for number, (pipeline, tasks) in enumerate(steps):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=WORKERS, logging_dir=str(goal / f"logs{number}")).run()
    if not list((goal / "tokens").glob("*.ds")):
        raise SystemExit("datatrove wrote no token shard")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
