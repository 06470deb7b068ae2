"""Frames between the client and its helper process: a JSON object and some bytes."""

import json
import socket
import struct
from typing import Any

#: Lengths of the JSON text and of the bytes after it.
_HEAD = struct.Struct("!II")

Message = dict[str, Any]


def send(sock: socket.socket, message: Message, payload: bytes = b"") -> None:
    """Sends one frame; waits while the other side is not reading.

    Raises:
        OSError: The other side is gone.
    """
    text = json.dumps(message).encode()
    sock.sendall(_HEAD.pack(len(text), len(payload)) + text + payload)


def receive(sock: socket.socket) -> tuple[Message, bytes] | None:
    """Waits for one frame.

    Returns:
        The object and the bytes, or None once the other side is gone.
    """
    head = _exactly(sock, _HEAD.size)
    if head is None:
        return None
    text_bytes, payload_bytes = _HEAD.unpack(head)
    body = _exactly(sock, text_bytes + payload_bytes)
    if body is None:
        return None
    return json.loads(body[:text_bytes]), body[text_bytes:]


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        try:
            part = sock.recv(min(count, 1 << 20))
        except OSError:
            return None
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
