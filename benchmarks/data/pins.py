"""The peers of this part of the line; their environment takes 1 to 2 minutes and 1.6 GB."""

PINS = {
    "datatrove": ("datatrove==0.10.1", "spacy==3.8.18", "xxhash==3.6.0", "orjson==3.11.4", "tokenizers==0.23.3"),
    "text-dedup": ("text-dedup==0.4.0",),
    "rensa": ("rensa==0.5.0",),
    "datasketch": ("datasketch==2.0.0",),
    "tokenizers": ("tokenizers==0.23.3",),
    "tiktoken": ("tiktoken==0.14.0",),
}
"""What each peer needs beside pip's own resolution."""
