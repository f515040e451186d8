"""One script per engine, run by path: ours in our interpreter, a peer's in the peers'."""
