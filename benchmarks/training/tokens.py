"""Text for the rows that only need some: this Python's standard library as token shards, made once and kept.

8,192 ids learned from the text itself; 95 of 100 files are train, the others val. 30 seconds on first use. The race to a
loss makes its own tokens by the product's own stages; here no Ray is started.
"""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
from pathlib import Path

import numpy as np

VOCAB_SIZE = 8192
SEQ_LEN = 256
_TEXT_BYTES = 12_000_000
_LEARN_BYTES = 6_000_000


def tokens_folder(cache: Path) -> Path:
    """A tokens folder as training reads it."""
    from raymill.dataset.shards import INDEX, ShardIndex, id_dtype
    from raymill.tokenizer.tokenizer import Tokenizer

    texts = standard_library()
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=4).hexdigest()
    folder = cache / f"tokens-{digest}-{VOCAB_SIZE}"
    if folder.exists():
        return folder
    aside = folder.with_suffix(".aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    average = sum(map(len, texts)) // len(texts)
    tokenizer = Tokenizer.train(texts[: _LEARN_BYTES // average], VOCAB_SIZE)
    tokenizer.save(aside / "tokenizer.json")
    entries = []
    for split, chosen in (("train", [t for n, t in enumerate(texts) if n % 20]), ("val", texts[::20])):
        ids, counts = tokenizer.encode_flat(chosen, close=True)
        entries.append(_write(aside, split, np.asarray(ids), np.asarray(counts), sum(len(t.encode()) for t in chosen)))
    index = ShardIndex(
        dtype=id_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        end_of_document_id=tokenizer.end_id,
        shards=tuple(entries),
    )
    (aside / INDEX).write_text(index.model_dump_json())
    aside.rename(folder)
    return folder


def rows_file(tokens: Path) -> Path:
    """The train split as rows of SEQ_LEN + 1 ids in the order of training, for sides that do not know our shards."""
    from raymill.dataset.loader import Loader
    from raymill.dataset.shards import TokenStream

    path = tokens / f"rows-{SEQ_LEN}.npy"
    if not path.exists():
        loader = Loader(TokenStream(tokens, "train"), seq_len=SEQ_LEN, global_batch_size=1, seed=0)
        batches = [loader.batch(step, 0, 1) for step in range(loader.num_sequences)]
        rows = [np.append(batch.inputs_BT.numpy()[0], batch.targets_BT.numpy()[0, -1]) for batch in batches]
        aside = path.with_suffix(".aside.npy")
        np.save(aside, np.array(rows, np.uint16))
        aside.rename(path)
    return path


def _write(folder: Path, split: str, ids: np.ndarray, counts: np.ndarray, text_bytes: int) -> object:
    from raymill.dataset.shards import ShardEntry, lengths_name

    name = f"{split}-00000.bin"
    ids.astype("<u2").tofile(folder / name)
    np.save(folder / lengths_name(name), counts.astype(np.uint32))
    sizes = {"documents": len(counts), "tokens": len(ids), "text_bytes": text_bytes}
    return ShardEntry(path=name, split=split, **sizes)


def standard_library() -> list[str]:
    """Sources of the standard library in an order that is the same on every run, about 12 MB of them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path for path in root.rglob("*.py") if "site-packages" not in path.parts and "test" not in path.parts
    )
    paths.sort(key=lambda path: hashlib.blake2b(str(path.relative_to(root)).encode(), digest_size=8).digest())
    texts: list[str] = []
    size = 0
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            texts.append(text)
            size += len(text)
        if size > _TEXT_BYTES:
            break
    return texts
