"""The checks of `braid doctor` on the machine and the store, one small function each.

A check takes the `Subject` and returns a `Finding`. If it raises, the error becomes a finding. To add a check, write a
function and add it to `CHECKS` here or in `model_checks`.
"""

import importlib.metadata
import os
import platform
import shutil
import sqlite3
import stat
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch

from braidsdk.errors import BraidError
from braidsdk.settings import index_folder
from braidsdk.store import REPAIR, ChunkStore
from braidsdk.types import MARGIN_BYTES, size

if TYPE_CHECKING:
    from braidsdk import Braid

Status = Literal["ok", "warn", "fail", "skip"]

LIBRARIES = (
    "braidsdk",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
    "sqlite-utils",
    "xxhash",
)

PROBE_BYTES = 64 * 2**20
"""Bytes that are written and read to measure the disk."""

SLOW_DISK_BYTES_PER_S = 200e6
"""On a slower disk, reading an entry may take longer than computing it again."""

LITTLE_DISK_BYTES = 2 * 2**30

VERIFIED_ENTRIES = 64
"""This many of the newest entries have their digests checked. For all others only the file must exist."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        status: "warn" means a problem that one can live with. "skip" means that the check could not run.
        detail: what was found, in words.
        remedy: what to do, if there is a problem.
        facts: what was found, as data.
    """

    status: Status
    detail: str
    remedy: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Subject:
    """What is checked.

    Attributes:
        model, device, dtype, weights: as `Braid` takes them.
        store: the store's folder; it may not be there yet.
        scratch: an empty folder that is deleted afterwards.
        braid: the model over a store in `scratch`, once a check has opened it.
    """

    model: str
    device: str
    dtype: str
    weights: str
    store: Path
    scratch: Path
    braid: "Braid | None" = None


def check_versions(_subject: Subject) -> Finding:
    """Which versions of which libraries are installed."""
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    words = ", ".join(f"{name} {version}" for name, version in found.items())
    missing = [name for name in LIBRARIES if name not in found and (name != "triton" or sys.platform == "linux")]
    if missing:
        remedy = f"Install them: pip install {' '.join(missing)}."
        return Finding("fail", f"{', '.join(missing)} missing; {words}", remedy, found)
    return Finding("ok", words, facts=found)


def check_processor(_subject: Subject) -> Finding:
    """Cores, threads, and the instructions that make bfloat16 fast."""
    name, flags = processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    quick = sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16"})
    facts = {"processor": name, "cores": cores, "threads": threads, "instructions": quick}
    detail = f"{name}, cores: {cores}, threads: {threads}, {' '.join(quick) or torch.backends.cpu.get_cpu_capability()}"
    if threads * 2 < cores:
        remedy = f"Set OMP_NUM_THREADS={cores}, or unset it, if nothing else needs the cores."
        return Finding("warn", detail, remedy, facts)
    return Finding("ok", detail, facts=facts)


def check_device(_subject: Subject) -> Finding:
    """The devices that torch sees."""
    if torch.cuda.is_available():
        devices: list[dict[str, Any]] = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            devices.append({"name": torch.cuda.get_device_name(index), "free_bytes": free, "total_bytes": total})
        words = "; ".join(f"{each['name']}, {size(each['free_bytes'])} free" for each in devices)
        return Finding("ok", f"CUDA {torch.version.cuda}: {words}", facts={"cuda": devices})
    if shutil.which("nvidia-smi"):
        remedy = "Install torch's CUDA build, and check with nvidia-smi that the driver answers."
        return Finding("warn", "cpu; there is an NVIDIA driver, but torch sees no CUDA device", remedy)
    return Finding("ok", "cpu; no CUDA device", facts={"cuda": []})


def check_store(subject: Subject) -> Finding:
    """Whether the store can be opened and written, and what it holds."""
    folder = subject.store
    if not folder.exists():
        nearest = _nearest(folder)
        if not os.access(nearest, os.W_OK):
            remedy = f"Make {nearest} writable, or choose another folder with --store."
            return Finding("fail", f"{folder} does not exist and can't be created", remedy)
        return Finding("ok", f"{folder} does not exist yet; the first `braid add` creates it")
    with ChunkStore(folder, index=index_folder()) as store:
        held = [store.stats(namespace) for namespace in store.namespaces()]
        read_only = store.read_only
    mode = stat.filemode(folder.stat().st_mode)
    sums = {name: sum(getattr(each, name) for each in held) for name in ("chunks", "entries", "bytes")}
    facts = {"path": str(folder), "mode": mode, "read_only": read_only, **sums}
    detail = f"{folder} ({mode}): {sums['chunks']:,} chunks, {sums['entries']:,} KV entries of {size(sums['bytes'])}"
    if read_only:
        return Finding("warn", f"{detail}; it can only be read", "Correct its permissions to register texts.", facts)
    return Finding("ok", detail, facts=facts)


def check_integrity(subject: Subject) -> Finding:
    """Whether the index and the chunks' files are sound, every entry's header is, and some entries are to the last
    byte."""
    if not subject.store.exists():
        return Finding("skip", "there is no store yet")
    with ChunkStore(subject.store, index=index_folder()) as store:
        aside = store.damaged_count
        held = sum(store.stats(namespace).entries for namespace in store.namespaces())
        found = store.check(min(1.0, VERIFIED_ENTRIES / max(1, held)))
    facts = {"entries": found.entries, "damaged": [each for each, _ in found.damaged], "set_aside": aside}
    if found.index:
        return Finding("fail", f"the index is damaged: {'; '.join(found.index)[:300]}", REPAIR, facts)
    if bad := [*found.damaged, *found.behind]:
        remedy = "Run `braid store repair`. Nothing is lost: damaged entries are computed again. Check the disk."
        return Finding("warn", f"{len(bad):,} files missing or damaged, such as {bad[0][0]}", remedy, facts)
    looked = f"all {found.entries:,} entries and {found.chunks:,} chunks are there, {found.read:,} entries read whole"
    detail = looked + (f"; {aside:,} damaged files were set aside earlier" if aside else "")
    return Finding("ok", detail, facts=facts)


def check_disk_space(subject: Subject) -> Finding:
    """Free space on the store's disk."""
    usage = shutil.disk_usage(_nearest(subject.store))
    facts = {"free_bytes": usage.free, "total_bytes": usage.total}
    detail = f"{size(usage.free)} of {size(usage.total)} free"
    if usage.free < LITTLE_DISK_BYTES:
        remedy = "Free some space, delete chunks with `braid rm`, or put the store on another disk with --store."
        return Finding("fail" if usage.free < MARGIN_BYTES else "warn", detail, remedy, facts)
    return Finding("ok", detail, facts=facts)


def check_disk_speed(subject: Subject) -> Finding:
    """How fast the store's disk writes a file durably, and reads it back without the system's cache."""
    data = os.urandom(2**20) * (PROBE_BYTES // 2**20)
    with NamedTemporaryFile(dir=_nearest(subject.store), prefix=".braid-doctor-") as file:
        started = perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = PROBE_BYTES / (perf_counter() - started)
        past_cache = hasattr(os, "posix_fadvise")
        if past_cache:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = perf_counter()
        if file.read() != data:
            return Finding("fail", "what was read back differs from what was written", "Check the disk.")
        read = PROBE_BYTES / (perf_counter() - started)
    facts = {"write_bytes_per_s": written, "read_bytes_per_s": read}
    detail = f"{size(int(written))}/s written, {size(int(read))}/s read{'' if past_cache else ', perhaps from memory'}"
    if min(read, written) < SLOW_DISK_BYTES_PER_S:
        remedy = "Put the store on a local SSD with --store: caches that are slow to read gain little."
        return Finding("warn", detail, remedy, facts)
    return Finding("ok", detail, facts=facts)


Check = Callable[[Subject], Finding]

CHECKS: tuple[Check, ...] = (
    check_versions,
    check_processor,
    check_device,
    check_store,
    check_integrity,
    check_disk_space,
    check_disk_speed,
)


def name_of(check: Check) -> str:
    """The name of a check: `check_disk_speed` is "disk speed"."""
    return check.__name__.removeprefix("check_").replace("_", " ")


def look(check: Check, subject: Subject, *, debug: bool = False) -> Finding:
    """Run a check. If it raises, that is a problem too, and `debug` shows its traceback on stderr."""
    try:
        return check(subject)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, BraidError):  # its message says what to do
            return Finding("fail", str(error))
        return Finding("fail", f"{type(error).__name__}: {str(error)[:400]}", "--debug shows where it happened.")


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


def processor() -> tuple[str, set[str]]:
    """The processor's name and flags from Linux; on other systems what Python knows."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    return facts.get("model name") or platform.processor() or platform.machine(), flags
