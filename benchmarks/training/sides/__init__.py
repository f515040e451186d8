"""One script per side of a comparison, run by path; see timing.py."""
