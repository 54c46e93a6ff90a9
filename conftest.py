"""GPU tests run only where they are asked for (``-m gpu``) and can run; one line says so."""

import pytest

_left_out = pytest.StashKey[str]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    reason = _reason_against_gpu(config) if gpu else None
    if reason is None:
        return
    items[:] = [item for item in items if item not in gpu]
    config.hook.pytest_deselected(items=gpu)
    config.stash[_left_out] = f"{len(gpu)} GPU tests not run: {reason}"


def _reason_against_gpu(config: pytest.Config) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device here"
    if "gpu" not in config.option.markexpr:
        return "ask for them with -m gpu"
    return None


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if _left_out in config.stash:
        terminalreporter.write_line(config.stash[_left_out])
