"""What several passes share, and the passes every target runs."""
