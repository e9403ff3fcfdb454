"""What an endpoint's reply says: an answer's text, or why there is none."""

import zlib

from skillsd_jax.skills import exchange, untrusted
from skillsd_jax.skills.asking import Endpoint

# Why a request has no answer.
FAILURES = (
    "timeout",  # no whole reply in time
    "refused",  # nobody listens there
    "network",  # any other way a connection breaks
    "denied",  # 401 or 403: the key is wrong or not set
    "redirect",  # 3xx, never followed: the key is for this host alone
    "status",  # any other status but 200
    "too_large",
    "not_json",
    "no_choice",  # JSON without choices[0].message.content
    "not_recorded",  # nowhere in the recording that is replayed
    "closed",  # the writer was closed first
)
# Beside the statuses of 500 and more.
AGAIN = (408, 409, 429)


class Again(exchange.Failed):
    """A failure that may not come again."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.wait_s = wait_s


def content(reply: exchange.Reply) -> str:
    """What the model said. Raises Failed."""
    status = reply.status
    if status in AGAIN or status >= 500:
        raise Again("status", exchange.seconds(reply.retry_after))
    if status in (401, 403):
        raise exchange.Failed("denied")
    if status != 200:
        raise exchange.Failed("redirect" if 300 <= status < 400 else "status")
    try:
        found = untrusted.loads(reply.body.decode())
    except ValueError:
        raise exchange.Failed("not_json") from None
    choices = found.get("choices") if isinstance(found, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str):
        raise exchange.Failed("no_choice")
    return content


def pause_s(endpoint: Endpoint, hash: str, attempt: int, again: Again) -> float:
    """Half to all of a doubling pause, the same for the same request and attempt."""
    share = 0.5 + 0.5 * (zlib.crc32(f"{hash} {attempt}".encode()) / 2**32)
    own = share * endpoint.backoff_s * 2.0 ** min(attempt, 60)
    return min(max(own, again.wait_s), endpoint.max_wait_s)
