"""What a layout does with every key of its input: the account, the counts by component, the losses in words."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from weightops.errors import listing
from weightops.ops.report import Account, Unused, tensors
from weightops.ops.respell import becomes

if TYPE_CHECKING:
    from weightops.ops.layout import Layout


def account_of(found: Layout) -> Account:
    """Every key: cast (used), copied, kept though it is a stranger, or unused with a reason.

    What was asked for, and what is needless in the layout, is no surprise; what is lost is.
    """
    opened = found.opened
    account = Account()
    account.unused += [Unused(key, opened.label, why, asked=False) for key, why in opened.left_out]
    account.unused += found.left
    account.unused += [Unused(key, opened.label, why, asked=True) for key, why in found.needless.items()]
    account.unused += [Unused(key, opened.label, why, asked=False) for key, why in found.lost.items()]
    strange = {key: why for _, done in found.done for key, why in done.strange.items()}
    account.kept += strange.items()
    gone = {u.key for u in account.unused} | strange.keys()
    for key, info in opened.tensors.items():
        if key not in gone:
            is_cast = becomes(info.spec, found.wish.dtype).dtype != info.spec.dtype
            (account.used if is_cast else account.copied).append(key)
    return account


def groups_of(found: Layout, account: Account) -> list[dict[str, Any]]:
    """Input keys by component. `split` and `fused` are among the copied and the cast."""
    outcomes = dict.fromkeys((*account.copied, *(key for key, _ in account.kept)), "copied")
    outcomes |= dict.fromkeys(account.used, "cast")
    counts: dict[str, Counter[str]] = {way.name: Counter() for way, _ in found.done}
    for key, component in found.identity.components.items():
        counts.setdefault(component, Counter())[outcomes.get(key, "dropped")] += 1
    for way, done in found.done:
        pairs = {(task.inputs[0].slot.key, task.outputs[0].key) for task in done.tasks}
        leaving, arriving = Counter(key for key, _ in pairs), Counter(key for _, key in pairs)
        counts[way.name]["split"] = sum(count > 1 for count in leaving.values())
        counts[way.name]["fused"] = sum(arriving[key] > 1 for _, key in pairs)
    groups = []
    for name, count in counts.items():
        count["tensors"] = count["copied"] + count["cast"] + count["dropped"]
        columns = ("tensors", "copied", "cast", "split", "fused", "dropped")
        groups.append({"component": name} | {column: count[column] for column in columns})
    return groups


def losses_of(found: Layout) -> list[str]:
    """One line for each component and reason for which tensors are lost."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, reason in found.lost.items():
        reasons.setdefault((found.identity.components[key], reason), []).append(key)
    return [
        f"lost: {tensors(len(keys))} of {component} ({reason}): {listing(keys)}"
        for (component, reason), keys in reasons.items()
    ]
