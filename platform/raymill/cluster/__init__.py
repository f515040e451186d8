"""Where a job runs: the cluster file, the one Ray session, and the files other launchers read."""
