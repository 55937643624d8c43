from __future__ import annotations

import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megatron_mtp.launch.local import reserved_port

pytestmark = pytest.mark.dist


def test_only_a_store_gets_a_reserved_port():
    with reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="already in use"):
            other.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, 1, is_master=True, timeout=timedelta(seconds=20))
        store.set("key", "value")
        assert TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20)).get("key") == b"value"


def test_two_reservations_differ():
    with reserved_port() as one, reserved_port() as other:
        assert one != other
