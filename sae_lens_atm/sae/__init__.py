"""SAELens' classes of the architecture "atm"."""
