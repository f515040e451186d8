"""One file per kind of input, all of one shape: `read(file, limits)` yields the records that begin in the file's range."""
