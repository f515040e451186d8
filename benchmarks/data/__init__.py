"""The data line beside its peers; `python -m benchmarks.data` (see __main__)."""
