"""What the house tells of itself: progress lines, logs, metrics, alert rules, and the page that reports are shown on."""
