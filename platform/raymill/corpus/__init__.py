"""Documents, from files to a corpus. The room by its steps, in the order a document takes them:

read        sources storage hub -> readers formats/ html templates; limits, document
clean       cleaning (the order of steps): repair normalize languages; filters (rules, reasons) bad_words decontaminate pii
words       words chunks word_facts repetition pages measures: what the rules count; phrases: word lists and n-grams
segment     segments sentences
sign        dedup (MinHash), blocks (lines and paragraphs)
decide      clusters (who is like whom), split (train or val)
augment     augment
account     accounting, reasons, table (columns of a corpus file), card (the data card)
passes      clean_pass -> decision -> split_pass: the steps over one shard, between shards, over one shard again
"""
