"""The replicas that are there, as their presence says. Pure."""

from pgrealtime.log.beat import GONE_SECONDS, Presence


class Replicas:
    """What each said last, by its tag. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[float, Presence]] = {}

    def hear(self, presence: Presence, now: float) -> None:
        """Take what a replica says of itself."""
        self._heard[presence.tag] = now, presence

    def present(self, now: float) -> list[Presence]:
        """Return what the replicas said that are there."""
        self._heard = {
            tag: said for tag, said in self._heard.items() if now - said[0] < GONE_SECONDS
        }
        return [presence for _, presence in self._heard.values()]

    def rank(self, tag: str, now: float) -> int:
        """Return how many replicas with a lower tag there are."""
        return sum(presence.tag < tag for presence in self.present(now))
