"""Every reason that takes a record out of a corpus, in one sentence each: for counts, messages and the data card."""

from __future__ import annotations

from raymill.corpus.filters import REASONS as RULES

STEPS = {
    "language": "in none of the languages to keep, or not surely",
    "bad_words": "more words of the list of bad words than allowed",
    "contaminated": "holds text of an evaluation file",
    "no_segment": "no segment is long enough",
    "only_repeats": "every line or paragraph stood in an earlier document",
}
QUARANTINED = {
    "too_long": "the record is longer than `max_document_mib`",
    "not_utf8": "bytes that are not UTF-8",
    "nul": "a NUL character: a binary file",
    "unreadable": "the file, or the rest of it, cannot be read",
    "damaged_archive": "the packed file is cut or damaged; what came before is kept",
    "damaged_parquet": "the parquet file, or a part of it, is damaged",
    "bad_json": "no valid JSON",
    "not_an_object": "the JSON value is no object with fields",
    "no_text_field": "the record lacks the source's `text_field`",
    "text_not_a_string": "the text field holds something else than text",
    "missing_column": "a column that the template names is missing",
    "unknown_label": "a value that the template's labels do not name",
    "empty_completion": "there is nothing to learn in the answer",
    "no_turns": "a conversation without turns",
    "bad_turn": "a turn without a role or text",
    "unknown_role": "a role that is not system, user, assistant or tool",
    "no_answer": "a conversation in which the assistant says nothing",
    "open_quote": "a quotation mark in a csv file that is not closed",
    "ragged_row": "a csv row with another number of cells than the header",
    "bad_csv": "no valid csv",
    "bad_header": "the first line of a csv file names no columns",
    "bad_warc": "no valid WARC record",
    "bad_length": "a WARC record that is not as long as it says",
    "bad_http": "an HTTP answer that cannot be taken apart",
    "http_encoding": "an HTTP answer packed in a way that is not read",
    "bad_topics": "the table of Python's documentation cannot be read",
}
MEANINGS = {**QUARANTINED, **STEPS, **RULES}
