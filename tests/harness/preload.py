"""Imported once by the fork server, so that the ranks of the tests start in a tenth of a second."""

import megatron_mtp.model.torch_backend
import megatron_mtp.verify.preload  # noqa: F401
