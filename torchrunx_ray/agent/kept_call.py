"""A run's function and arguments, kept on the host between the attempts of the run."""

from collections.abc import Sequence

from torchrunx_ray.wire import messages
from torchrunx_ray.wire.values.payload import Packed


class KeptCall:
    """The values of a run's call. Large ones stay in the memory of Ray's object store, and are not copied."""

    def __init__(self) -> None:
        self._run_id = ""
        self._values: Sequence[Packed] = ()

    def values_for(self, wanted: messages.WorkerWanted, sent: Sequence[Packed]) -> Sequence[Packed]:
        """Return the values of an attempt: those that were sent, else the kept ones.

        Keep them as long as another attempt may follow.
        """
        run_id = wanted.attempt.run_id
        values = sent or (self._values if self._run_id == run_id else ())
        assert values, f"the function of {run_id} was not sent to this agent"
        self._run_id, self._values = "", ()
        if wanted.may_be_restarted:
            self._run_id, self._values = run_id, values
        return values

    def forget(self, run_id: str) -> None:
        if self._run_id == run_id:
            self._run_id, self._values = "", ()
