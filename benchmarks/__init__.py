"""Side-by-side measurements of raymill and the field; one folder per part of the line."""
