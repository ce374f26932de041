"""The eager backend of Polyradix. Importing this must stay cheap: the device is touched in `create`."""

from __future__ import annotations

from polyradix.backend.protocol import Backend, Found


class Entry:
    protocol = (1, 0)

    def probe(self) -> Found:
        """An example to copy, not to serve with: `--device auto` never takes a negative rank."""
        return Found(True, "plain torch, an example of a backend", rank=-1)

    def create(self) -> Backend:
        from polyradix_eager.backend import EagerBackend

        return EagerBackend()


entry = Entry()
