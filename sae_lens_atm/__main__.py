from sae_lens_atm.cli import main

main()
