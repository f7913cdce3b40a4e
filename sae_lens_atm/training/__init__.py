"""Training one SAE from a run file, with SAELens' trainer."""
