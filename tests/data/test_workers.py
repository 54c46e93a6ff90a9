"""A worker that dies is named wherever its end is met; what streams hold is in test_loader.py."""

from types import SimpleNamespace

import pytest

from lst.data import workers


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("met", [ConnectionResetError("reset by peer"), EOFError()])
def test_a_worker_that_died_in_the_middle_of_an_item_is_named(
    alive: bool, met: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is fetched over a connection, which breaks before DataLoader looks for it."""

    class Breaking:
        def __init__(self, *_: object, **__: object) -> None:
            self._workers = [SimpleNamespace(pid=11 + n, is_alive=lambda: True) for n in range(2)]
            self._workers[1].is_alive = lambda: alive

        def __iter__(self) -> "Breaking":
            return self

        def __next__(self) -> None:
            raise met

    monkeypatch.setattr(workers, "DataLoader", Breaking)
    monkeypatch.setattr(workers, "DEATH_SECONDS", 0.1)
    awaited: list[int | None] = []
    streams = workers.in_step([[1], [2]], num_workers=2, await_worker=awaited.append)
    error = type(met) if alive else RuntimeError
    with pytest.raises(error, match=None if alive else r"DataLoader worker \(pid\(s\) 12\) exited"):
        next(streams)
    assert awaited == [11]
