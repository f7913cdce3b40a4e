"""Plan a comparison: which SAEs to train, with which settings."""
