"""`python -m megatron_mtp.cli.agent`: torchrun's agent with the project's exit codes; see `megatron_mtp.launch.agent`."""

import sys

from megatron_mtp.launch.agent import main

if __name__ == "__main__":
    sys.exit(main())
