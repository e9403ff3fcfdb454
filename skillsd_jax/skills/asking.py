"""How an endpoint is asked: its settings, what is sent, and the key.

The key is read from the environment when it is sent. It is in no setting, text, file or
error, and what comes back is freed of it.
"""

import dataclasses
import math
import os
import re

from skillsd_jax.skills import exchange

DAY_S = 86_400.0
SECRET = 8  # characters of a key from which on it is one; 'EMPTY' is not


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """How to ask, and how hard to try.

    Args:
      url: up to what `/chat/completions` is appended to, e.g. http://localhost:8000/v1.
      model: as the server calls it.
      temperature: of the answers.
      max_tokens: of one answer.
      seed: sent if set.
      key_variable: environment variable with the key; where it is "" or not set,
        none is sent. To an http address it travels unencrypted.
      timeout_s: of one attempt, from the connection to the last byte.
      max_bytes: of one reply.
      retries: further attempts after one that may go better next time.
      backoff_s: before the first of them; doubled every time.
      max_wait_s: before any of them, whatever the server asks for.
      concurrency: requests at a time.
      record: file that every request and its answer is appended to; what it answers
        already is not asked again. "": none.
      replay: file to answer from instead of the network; "": none.

    Raises:
      ValueError: they cannot be. Begins with a setting's name and repeats no secret.
    """

    url: str
    model: str
    temperature: float = 0.7
    max_tokens: int = 512
    seed: int | None = None
    key_variable: str = "OPENAI_API_KEY"
    timeout_s: float = 60.0
    max_bytes: int = 1_000_000
    retries: int = 3
    backoff_s: float = 1.0
    max_wait_s: float = 30.0
    concurrency: int = 4
    record: str = ""
    replay: str = ""

    def __post_init__(self):
        check_public(self.url, self.key_variable)
        if not self.model:
            raise ValueError("model is not set; name one that the server has")
        for name in ("max_tokens", "timeout_s", "max_bytes", "concurrency"):
            self._check(name, getattr(self, name) > 0, "more than 0")
        for name in ("temperature", "retries", "backoff_s", "max_wait_s"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("timeout_s", "backoff_s", "max_wait_s"):
            self._check(name, getattr(self, name) <= DAY_S, f"at most {DAY_S}")
        self._check("temperature", math.isfinite(self.temperature), "finite")
        if self.record and self.replay:
            raise ValueError("record and replay are both set; leave one of them out")

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(f"{name}={getattr(self, name)} must be {wanted}")

    def body(self, request: str) -> dict:
        """What is sent, and all that the answer depends on."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": request}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        return body if self.seed is None else body | {"seed": self.seed}

    def key(self) -> str:
        """The key, or "" if none is set.

        Raises:
          ValueError: it cannot be sent in a header. Says nothing of it.
        """
        key = _found(self.key_variable)
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(
                f"key_variable: {self.key_variable} holds spaces, line ends or other "
                "characters that no key has; set it again"
            )
        return key

    def scrub(self, text: str) -> str:
        """The text with '(key)' for the key, however JSON may spell that.

        Ask again for what is read from the text: taking hidden characters out may put
        a key together.
        """
        key = _found(self.key_variable)
        return re.sub(_spelled(key), "(key)", text) if len(key) >= SECRET else text


def check_public(url: str, key_variable: str) -> None:
    """Refuses settings that may hold a secret: they would end up in config.json.

    Raises:
      ValueError: begins with the setting's name and repeats nothing of it.
    """
    exchange.Target.of(url)
    if key_variable and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", key_variable):
        raise ValueError(
            "key_variable is no name of an environment variable; put the key into "
            "one, such as OPENAI_API_KEY, and give that name"
        )


def _found(variable: str) -> str:
    return os.environ.get(variable, "").strip() if variable else ""


def _spelled(key: str) -> str:
    """A pattern of the key, each character plain or escaped, in JSON in JSON too.

    Atomic and bounded: its time is linear in the text.
    """
    return "".join(
        rf"(?>\\{{1,8}}u(?i:{ord(c):04x})|\\{{0,8}}{re.escape(c)})" for c in key
    )
