"""Code that runs in SAEBench's environment, where `sae_lens_atm` is not installed."""
