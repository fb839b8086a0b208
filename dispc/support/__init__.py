"""What everything stands on: errors, files, signals, optional packages, graph helpers."""
