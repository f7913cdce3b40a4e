"""Train and evaluate the SAEs of a comparison."""
