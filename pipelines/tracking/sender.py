"""The sender: a thread that carries journals to MLflow while the stage works.

It connects (which imports MLflow: two seconds off the stage's path), sends what earlier stages left, then
follows its own stage's journal. A server that fails or is silent costs the stage one warning and nothing
else: the thread tries again at growing intervals, and what is left at the end stays in the journal.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.tracking import identity
from pipelines.tracking.outbox import Outbox, pending
from pipelines.tracking.store import Address, Store, answering, connect

POLL = 0.5  # seconds between two looks at the journal
LONGEST_PAUSE = 30.0  # seconds between two tries of a server that fails
PATIENCE = 8.0  # seconds of failure that are not worth a word
SILENCE = 12.0  # seconds after which a server that said nothing at all is called silent
LAST_WAIT = 10.0  # seconds that the end of a stage waits for its last lines to be taken


class Sender(threading.Thread):
    """Sends one stage's journal, and what others left behind, until told to `end`."""

    def __init__(self, outbox: Outbox, state: Path, address: Address, warn: Callable[[str], None]) -> None:
        super().__init__(name="tracking", daemon=True)
        self.outbox, self.state, self.address, self._say = outbox, state, address, warn
        self.store: Store | None = None
        self.trouble = ""
        self._well = time.monotonic()
        self._wake, self._ending, self._speaking = threading.Event(), threading.Event(), threading.Lock()
        self._spoken = self._refused = False
        self._watch = threading.Timer(SILENCE, self._check_silence)
        self._watch.daemon = True

    def start(self) -> None:
        super().start()
        self._watch.start()

    def run(self) -> None:
        pause = POLL
        while not self.outbox.sent.done:
            last = self._ending.is_set()
            try:
                self._round()
                self.trouble, self._well, pause = "", time.monotonic(), POLL
            except Exception as error:  # whatever MLflow and its drivers raise, the stage goes on
                self.store, self.trouble, pause = None, str(error), min(2 * pause, LONGEST_PAUSE)
                if time.monotonic() - self._well > PATIENCE:
                    self._warn(self.trouble)
            if last:
                break
            self._wake.wait(pause)
            self._wake.clear()
        self.outbox.release()

    def flush(self, seconds: float) -> bool:
        """Wait until MLflow has what the journal holds now; False if it did not take it in time."""
        wanted, until = self.outbox.path.stat().st_size, time.monotonic() + seconds
        while self.outbox.sent.offset < wanted and time.monotonic() < until and self.is_alive():
            self._wake.set()
            time.sleep(POLL / 10)
        return self.outbox.sent.offset >= wanted

    def end(self) -> None:
        """Send the last lines, for at most ten seconds; not at all if the server was failing anyway."""
        self._watch.cancel()
        self._ending.set()
        self._wake.set()
        self.join(0 if self.trouble else LAST_WAIT)
        if not self.outbox.sent.done:
            self._warn(self.trouble or f"MLflow at {self.address} is slow")

    def _round(self) -> None:
        """One look at everything there is to send."""
        if self.store is None:
            self.store = connect(self.address, self.state)
            identity.write(self.state, self.address, self.store.identity)
            self._send_left_behind(self.store)
        with answering(self.address):
            self.outbox.forward(self.store, self.state, self._warn_refused)

    def _send_left_behind(self, store: Store) -> None:
        for path in pending(self.outbox.path.parent):
            if path == self.outbox.path or (other := Outbox.claim(path)) is None:
                continue
            try:
                other.forward(store, self.state, self._warn_refused)
                other.finish(store)
            except Exception:  # if the server fails, our own lines will tell; if the journal does, they must not wait
                return
            finally:
                other.release()

    def _check_silence(self) -> None:
        if self.store is None:
            self.trouble = self.trouble or f"MLflow at {self.address} does not answer (silent for {SILENCE:.0f} s)"
            self._warn(self.trouble)

    def _warn(self, reason: str) -> None:
        with self._speaking:
            if self._spoken:
                return
            self._spoken = True
        self._say(f"{reason}; the stage goes on, {self.outbox.path} keeps its record for the next one to send")

    def _warn_refused(self, reason: str) -> None:
        if not self._refused:
            self._refused = True
            self._say(reason)
