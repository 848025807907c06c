"""`braid stats` shows what a store holds, and its hit rate. It loads no model."""

from dataclasses import asdict

from braidsdk.cli.opening import model_names, open_store
from braidsdk.cli.options import NamespaceOption, StoreOption
from braidsdk.cli.output import Output
from braidsdk.store import counters
from braidsdk.types import size


def stats(out: Output, store: StoreOption = None, namespace: NamespaceOption = "default") -> None:
    """Show what the store holds of a namespace, by model and level, and its hit rate.

    A hit is a KV entry that a question found; a miss is one that it had to compute.
    """
    with open_store(store) as opened:
        held = opened.stats(namespace)
        names = model_names(opened, [group.weights for group in held.groups])
        counted = counters(namespace)
        counts = opened.recall(counted)
        path, free = str(opened.path), opened.free_bytes
    hits, misses = (int(counts.get(key, 0)) for key in counted)
    groups = [{"model": names[group.weights], **asdict(group)} for group in held.groups]
    if out.json:
        out.document(
            {
                "store": path,
                "namespace": namespace,
                "chunks": held.chunks,
                "entries": held.entries,
                "bytes": held.bytes,
                "damaged": held.damaged,
                "free_disk_bytes": free,
                "hits": hits,
                "misses": misses,
                "groups": groups,
            }
        )
        return
    share = f" ({hits / (hits + misses):.0%} hits)" if hits + misses else ""
    facts = [
        ("store", path),
        ("namespace", namespace),
        ("chunks", f"{held.chunks:,}"),
        ("KV entries", f"{held.entries:,} of {size(held.bytes)}"),
        ("damaged", f"{held.damaged:,} files set aside"),
        ("disk", f"{size(free)} free"),
        ("served", f"{hits:,} hits, {misses:,} misses{share}"),
    ]
    for name, value in facts:
        out.text(f"{name + ':':<11} {value}")
    if held.groups:
        out.text("")
        rows = [
            (names[group.weights], group.dtype, str(group.level), f"{group.entries:,}", size(group.bytes))
            for group in held.groups
        ]
        out.table(("model", "dtype", "level", "entries", "size"), rows)
