"""pydoc's table of Python's language documentation, one document per topic: parsed as a literal, never run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from raymill.corpus.document import Document, Record, Unreadable
from raymill.corpus.limits import ReadLimits
from raymill.corpus.sources import SourceFile


def read(file: SourceFile, limits: ReadLimits) -> Iterator[Record]:
    """Every topic, by name."""
    try:
        tree = ast.parse(Path(file.path).read_bytes())
        tables = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    except (SyntaxError, ValueError) as error:
        yield Unreadable(file.name, None, 0, "bad_topics", str(error)[:200])
        return
    for name, text in sorted(tables[0].items()) if tables else ():
        yield Document(f"{file.name}#{name}", text, file.kind, file.source)
