"""What the house tells of itself: progress lines, logs, metrics, alert rules."""
