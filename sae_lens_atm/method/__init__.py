"""The mathematics of ATM. It needs PyTorch and nothing of SAELens."""
