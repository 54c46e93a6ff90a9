"""``--profile``: what a few steps spend time and memory on, in ``profile/`` of the run folder.

::

    trace.json        every operation and kernel of ACTIVE steps, for chrome://tracing or Perfetto
    memory.pickle     on a GPU: every allocation in them, for https://pytorch.org/memory_viz
    summary.json      the operations, or on a GPU the kernels, that took most time

The first steps, in which code is compiled and memory finds its place, are left out. Rank 0 alone
is looked at.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from lst.errors import UserError
from lst.train.run_folder import PROFILE, write_json, writing

SKIPPED = 3  # steps before the recorded ones; then one that warms the profiler itself up
ACTIVE = 3
STEPS = SKIPPED + 1 + ACTIVE
LISTED = 40  # operations in the summary
MEMORY_EVENTS = 200_000


class Profiler:
    """Records the steps that follow the first few; call :meth:`before` each and then :meth:`after`.

    With ``active`` False, or once the steps are recorded, neither does anything.
    """

    def __init__(self, out: Path, device: torch.device, *, active: bool) -> None:
        self.folder, self.device = out / PROFILE, device
        self.remaining = STEPS if active else 0
        self.profiler: torch_profile | None = None

    @property
    def writes(self) -> bool:
        """Whether the step under way is the last one recorded, so that :meth:`after` writes."""
        return self.remaining == 1

    def before(self) -> None:
        """A step begins."""
        if self.remaining == ACTIVE + 1:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.profiler = torch_profile(
                activities=activities,
                schedule=torch.profiler.schedule(wait=0, warmup=1, active=ACTIVE, repeat=1),
            )
            self.profiler.start()
        elif self.remaining == ACTIVE and self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)

    def after(self) -> str | None:
        """A step is done; a line to tell once everything is written, or cannot be."""
        told = None
        if self.profiler is not None:
            if self.writes:
                told = self._write(self.profiler)
            else:
                self.profiler.step()
        self.remaining = max(0, self.remaining - 1)
        return told

    def _write(self, profiler: torch_profile) -> str:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        profiler.stop()
        self.profiler = None
        try:
            with writing(self.folder):
                self.folder.mkdir(exist_ok=True)
                if self.device.type == "cuda":
                    _replacing(
                        self.folder / "memory.pickle",
                        lambda path: torch.cuda.memory._dump_snapshot(path),
                    )
                _replacing(self.folder / "trace.json", profiler.export_chrome_trace)
            write_json(self.folder / "summary.json", summarise(profiler, self.device, ACTIVE))
        except UserError as error:
            for part in self.folder.glob(".*"):
                part.unlink()
            return f"{error}; the run goes on"
        finally:
            self._forget_memory()
        return f"{ACTIVE} steps are profiled in {self.folder}"

    def close(self) -> str | None:
        """Stop recording where a run ends before the steps are over; a line that says so."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None
            self._forget_memory()
        if not self.remaining:
            return None
        taken = STEPS - self.remaining
        return f"--profile: expected {STEPS} steps to be taken, got {taken}; nothing is recorded"

    def _forget_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)


def _replacing(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}")
    write(str(temporary))
    os.replace(temporary, path)


def summarise(profiler: torch_profile, device: torch.device, steps: int) -> dict[str, Any]:
    """Time a step of what ``profiler`` has recorded, the longest first.

    On a GPU of kernels, whose times add up to that in which it was busy with one stream; elsewhere
    of operations, without those that they call.
    """
    gpu = device.type == "cuda"
    rows = []
    for event in profiler.key_averages():
        if gpu and event.device_type == torch.autograd.DeviceType.CPU:
            continue
        # Annotations span the kernels within them.
        if event.key.startswith("ProfilerStep") or getattr(event, "is_user_annotation", False):
            continue
        micros = event.self_device_time_total if gpu else event.self_cpu_time_total
        rows.append((micros / 1e3 / steps, event.count / steps, event.key))
    rows.sort(reverse=True)
    total = sum(milliseconds for milliseconds, _, _ in rows)
    return {
        "device": device.type,
        "steps": steps,
        "milliseconds": total,
        "operations": [
            {
                "name": name,
                "calls": calls,
                "milliseconds": milliseconds,
                "share": milliseconds / total if total else 0.0,
            }
            for milliseconds, calls, name in rows[:LISTED]
        ],
    }
