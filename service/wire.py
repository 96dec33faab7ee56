"""HTTP as uvicorn reads it, with a limit on what comes before a body, and with refusals in the envelope."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service import errors

_MAX_HEAD = 64 * 1024
"""Bytes of a request line and headers. Without a limit they are kept as they come, and each byte of a URL costs more
than the one before."""
_FRAMING = 8
"""Bytes that may stand around each byte of a body that comes in chunks, however small these are."""


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    _read = _body = 0
    """Bytes of this request, and those of its body."""

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        self._read += len(data)
        super().data_received(data)
        if self._read - self._body > _MAX_HEAD + _FRAMING * self._body and not self.transport.is_closing():
            self._refuse(431, f"the request line and headers are longer than {_MAX_HEAD} bytes")

    def on_message_begin(self) -> None:
        """A request's first byte: what came with it is part of the one before, or too little to matter."""
        self._read = self._body = 0
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        """Part of a body."""
        self._body += len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(400, f"{msg.rstrip('.')}: it is malformed, or its lengths contradict each other")

    def _refuse(self, status: int, message: str) -> None:
        data = bytes(JSONResponse(errors.body(status, errors.code_of(status), message)).body)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(data)
        self.transport.write(STATUS_LINE[status] + head + data)
        self.transport.close()
