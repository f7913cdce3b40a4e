from sae_lens_atm.cli.main import main

main()
