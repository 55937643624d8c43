"""The old place of `megatron_mtp.launch.agent`, which running jobs may name."""

import sys

from megatron_mtp.launch.agent import main

if __name__ == "__main__":
    sys.exit(main())
