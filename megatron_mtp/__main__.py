"""`python -m megatron_mtp`, which is also what `torchrun -m megatron_mtp` starts."""

from megatron_mtp.cli.main import main

if __name__ == "__main__":  # processes started by spawn import this module again
    main()
