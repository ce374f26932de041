"""What a request asks of the queue and the prefix cache, besides tokens."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

from polyradix.serve.errors import field_error
from polyradix.serve.openai import Sampling


@dataclass(frozen=True)
class Terms:
    """`timeout` is in seconds, None for the server's. `tenant` is whom fairness counts it for."""

    namespace: str = ""
    priority: int = 0
    timeout: float | None = None
    tenant: str = ""


def terms(body: Sampling) -> Terms:
    """Raises ApiError 400 for the first field out of range."""
    priority, timeout = body.priority or 0, body.timeout
    if not -(2**31) <= priority < 2**31:
        raise field_error("priority", priority, "a 32-bit integer, the lower the more important")
    if timeout is not None and not (timeout > 0 and math.isfinite(timeout)):
        raise field_error("timeout", timeout, "a number of seconds above 0")
    if body.cache_salt == "":
        raise field_error("cache_salt", "", "a string that is not empty")
    salted = body.cache_salt is not None or bool(body.extra_key)
    namespace = _digest(body.cache_salt, body.extra_key) if salted else ""
    return Terms(namespace, priority, timeout, _digest(body.user) if body.user else "")


def _digest(*values: object) -> str:
    """Of bounded length, whatever the client sent; JSON escapes what is no Unicode."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
