"""From rules to a filter: one search tree over the numbers of each architecture's system calls.

Numbers with the same answer that stand side by side are one interval, so a profile of 350 names makes a tree of some
60 leaves and a path of 6 to 8 comparisons. The kernel finds out which calls are always allowed whatever their
arguments are (kernel/seccomp.c, seccomp_cache_prepare) and does not run the filter for those.

    A call gets     the answer of its first rule without conditions; else that of the first rule whose conditions hold;
                    else the default.
    i386            makes calls through socketcall and ipc as well: a rule for `socket` counts for both. What socketcall
                    points to no filter can see, so a condition on argument 0 is lost there (as with libseccomp).
    numbers         above all that the table knows get ENOSYS where the default is an error: programs that probe for
                    newer calls then fall back, as they would on an older kernel. (runc does so above all that a profile
                    names.)
    foreign         architectures kill the thread; x32 where it is not asked for, too.

Driven by tests/unit/test_seccomp_peer.py and tests/unit/test_seccomp_profile.py.
"""

from __future__ import annotations

__all__ = ["build"]

import errno

from hv.container.seccomp.bpf import ARCH, JEQ, JGE, JGT, NR, Assembler, argument
from hv.container.seccomp.rules import ERRNO, KILL_THREAD, Condition, Profile
from hv.container.seccomp.syscalls import ARCHITECTURES, IPC, SOCKETCALL, X32_BIT, Architecture, read_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    # a bare answer, or (rules in order, whether arguments have 64 bits)
    Rules = tuple[tuple[tuple[Condition, ...], int], ...]
    Decision = int | tuple[Rules, bool]

_SKIPPED = 0xFFFFFFFF           # -1: a tracer cancelled the call; it gets the default, whatever the ABI
_LOW = 0xFFFFFFFF
_DATA = 0xFFFF                  # SECCOMP_RET_DATA
_IPC_CALL = 0xFFFF              # ipc(2): the upper half of `call` is a version


def build(profile: Profile) -> bytes:
    """The filter."""
    table = read_table()
    tokens: dict[int, dict[int, Decision]] = {}
    newest: dict[int, list[tuple[int, int]]] = {}       # token -> (first number that is not known, last that counts)
    for name in profile.architectures:
        architecture = ARCHITECTURES[name]
        calls = {call: int(row[architecture.column]) for call, row in table.items() if row[architecture.column] != "-"}
        tokens.setdefault(architecture.token, {}).update(_decide(profile, architecture, calls))
        first = max(calls.values()) + 1 | architecture.bit
        last = X32_BIT - 1 if name == "SCMP_ARCH_X86_64" else _SKIPPED - 1
        newest.setdefault(architecture.token, []).append((first, last))
    x86_64 = ARCHITECTURES["SCMP_ARCH_X86_64"].token
    writer = _Writer(profile.default)
    start = writer.code.ret(KILL_THREAD)
    for token, decisions in reversed(tokens.items()):   # the host's own is asked for first
        spans = []
        if profile.default & ~_DATA == ERRNO:
            spans = [(first, last, ERRNO | errno.ENOSYS) for first, last in newest[token]]
        if token == x86_64 and "SCMP_ARCH_X32" not in profile.architectures:
            spans.append((X32_BIT, _SKIPPED - 1, KILL_THREAD))
        tree = writer.code.load(NR, writer.tree(_intervals(decisions, spans, profile.default)))
        start = writer.code.jump(JEQ, token, tree, start)
    return writer.code.finish(writer.code.load(ARCH, start))


def _decide(profile: Profile, architecture: Architecture, calls: dict[str, int]) -> dict[int, Decision]:
    """Number to answer, for one architecture."""
    always: dict[int, int] = {}
    sometimes: dict[int, list[tuple[tuple[Condition, ...], int]]] = {}
    bit, multiplexed = architecture.bit, architecture is ARCHITECTURES["SCMP_ARCH_X86"]
    for names, action, alternatives in profile.rules:
        if action == profile.default:
            continue
        for name in names:
            number = calls.get(name)
            if number is not None:
                if alternatives:
                    sometimes.setdefault(number | bit, []).extend((one, action) for one in alternatives)
                else:
                    always.setdefault(number | bit, action)
            if multiplexed and (name in SOCKETCALL or name in IPC):
                gate, which = _multiplexed(name)
                for one in alternatives or [()]:
                    rest = tuple(condition for condition in one if condition[0])
                    sometimes.setdefault(calls[gate], []).append(((which, *rest), action))
    decisions: dict[int, Decision] = {number: (tuple(rules), architecture.wide) for number, rules in sometimes.items()}
    decisions.update(always)
    return decisions


def _multiplexed(name: str) -> tuple[str, Condition]:
    """The call through which i386 makes `name` as well, and the condition that tells."""
    if name in SOCKETCALL:
        return "socketcall", (0, "SCMP_CMP_EQ", SOCKETCALL[name], _LOW)
    return "ipc", (0, "SCMP_CMP_MASKED_EQ", IPC[name], _IPC_CALL)


def _intervals(decisions: dict[int, Decision], spans: list[tuple[int, int, int]],
               default: int) -> list[tuple[int, Decision]]:
    """All numbers from 0 on: (first of an interval, its answer). `spans`: (first, last, answer), without overlap."""
    edges: list[tuple[int, int, Decision]] = [(number, number, answer) for number, answer in decisions.items()]
    edges += spans
    edges.sort(key=lambda edge: edge[0])
    rows: list[tuple[int, Decision]] = []
    position = 0
    last: Decision | None = None
    for first, end, answer in edges:
        if first > position and last != default:
            rows.append((position, default))
            last = default
        if last != answer or not rows:
            rows.append((first, answer))
            last = answer
        position = end + 1
    if position <= _SKIPPED and last != default:
        rows.append((position, default))
    return rows


class _Writer:
    """Writes trees and rules."""

    def __init__(self, default: int) -> None:
        self.code = Assembler()
        self.default = default
        self._known: dict[Decision, int] = {}

    def tree(self, rows: list[tuple[int, Decision]]) -> int:
        """Find the interval that the number in the accumulator lies in."""
        if len(rows) == 1:
            return self._leaf(rows[0][1])
        if len(rows) == 3 and rows[0][1] == rows[2][1] and rows[1][0] + 1 == rows[2][0]:
            outside, inside = self._leaf(rows[0][1]), self._leaf(rows[1][1])
            return self.code.jump(JEQ, rows[1][0], inside, outside)
        middle = len(rows) // 2
        right = self.tree(rows[middle:])
        left = self.tree(rows[:middle])
        return self.code.jump(JGE, rows[middle][0], right, left)

    def _leaf(self, answer: Decision) -> int:
        if isinstance(answer, int):
            return self.code.ret(answer)
        label = self._known.get(answer)
        if label is None:
            rules, wide = answer
            label = self.code.ret(self.default)
            for conditions, action in reversed(rules):
                yes, no = self.code.ret(action), label
                for condition in reversed(conditions):
                    yes = self._test(condition, wide, yes, no)
                label = yes
            self._known[answer] = label
        return label

    def _test(self, condition: Condition, wide: bool, yes: int, no: int) -> int:
        """Two halves, the upper first; of narrow arguments the lower one only."""
        index, operator, value, mask = condition
        if operator in ("SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE"):
            yes, no = no, yes
        low, high = argument(index, False), argument(index, True)
        if operator in ("SCMP_CMP_EQ", "SCMP_CMP_NE", "SCMP_CMP_MASKED_EQ"):
            yes = self._equal(low, value & _LOW, mask & _LOW, yes, no)
            return self._equal(high, value >> 32, mask >> 32, yes, no) if wide else yes
        test = JGE if operator in ("SCMP_CMP_GE", "SCMP_CMP_LT") else JGT
        result = self.code.load(low, self.code.jump(test, value & _LOW, yes, no))
        if wide:
            same = self.code.jump(JEQ, value >> 32, result, no)
            result = self.code.load(high, self.code.jump(JGT, value >> 32, yes, same))
        return result

    def _equal(self, offset: int, value: int, mask: int, yes: int, no: int) -> int:
        if not mask:
            return yes
        test = self.code.jump(JEQ, value, yes, no)
        return self.code.load(offset, test if mask == _LOW else self.code.mask(mask, test))
