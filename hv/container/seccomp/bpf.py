"""An assembler of classic BPF, as far as seccomp's filters go (include/uapi/linux/bpf_common.h, kernel/seccomp.c).

All jumps of BPF go forward, so a program is written from its end: whatever an instruction jumps to is there already,
its distance known, and one pass does. A conditional jump reaches 255 instructions far. Where the target lies farther
off, a copy of it (a return) or a jump to it is put right behind, and serves the instructions before it as well.

    code = Assembler()
    deny, allow = code.ret(ERRNO | 1), code.ret(ALLOW)
    program = code.finish(code.load(NR, code.jump(JEQ, 59, deny, allow)))

Left out: arithmetic other than AND, scratch memory, the index register. Driven by tests/unit/test_seccomp_bpf.py.
"""

from __future__ import annotations

__all__ = ["ARCH", "JEQ", "JGE", "JGT", "JSET", "NR", "Assembler", "argument"]

from struct import pack

from hv.errors import ConfigError

# include/uapi/linux/bpf_common.h: class | size or operation | mode or source
_LD_W_ABS, _ALU_AND_K, _JA, _RET_K = 0x20, 0x54, 0x05, 0x06
JEQ, JGT, JGE, JSET = 0x15, 0x25, 0x35, 0x45
INSTRUCTIONS_MOST = 4096        # include/uapi/linux/bpf_common.h: BPF_MAXINSNS
_REACH = 255                    # struct sock_filter: jt and jf are bytes

# struct seccomp_data, include/uapi/linux/seccomp.h
NR, ARCH = 0, 4


def argument(index: int, high: bool) -> int:
    """Where one half of a system call's argument stands in struct seccomp_data (little endian)."""
    return 16 + 8 * index + 4 * high


class Assembler:
    """A program, from its end on. A label is what each method answers: the instruction (or block) just written."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int]] = []    # the program's last instruction first
        self._first: list[int] = []             # label -> where it stands in _code
        self._near: list[int] = []              # label -> where it, or the last copy of it, stands
        self._returns: dict[int, int] = {}

    def ret(self, value: int) -> int:
        """Answer `value`."""
        label = self._returns.get(value)
        if label is None:
            label = self._returns[value] = self._add(_RET_K, 0, 0, value)
        return label

    def jump(self, test: int, value: int, yes: int, no: int) -> int:
        """Go to `yes` where the accumulator passes `test` (JEQ, JGT, JGE, JSET) with `value`, else to `no`."""
        if yes == no:
            return yes
        # Bringing one nearer moves the other away, by two at most.
        for label in (yes, no, yes):
            self._bring(label)
        return self._add(test, self._distance(yes), self._distance(no), value)

    def mask(self, value: int, then: int) -> int:
        """AND the accumulator with `value`."""
        self._go(then)
        return self._add(_ALU_AND_K, 0, 0, value)

    def load(self, offset: int, then: int) -> int:
        """Load a word of struct seccomp_data into the accumulator."""
        self._go(then)
        return self._add(_LD_W_ABS, 0, 0, offset)

    def finish(self, start: int) -> bytes:
        """The program, which begins at `start`."""
        self._go(start)
        if len(self._code) > INSTRUCTIONS_MOST:
            raise ConfigError(f"linux.seccomp: a filter of {len(self._code)} instructions",
                              f"the kernel takes {INSTRUCTIONS_MOST}; use fewer conditions")
        return b"".join([pack("=HBBI", *instruction) for instruction in reversed(self._code)])

    def __len__(self) -> int:
        return len(self._code)

    def _add(self, code: int, yes: int, no: int, value: int) -> int:
        self._code.append((code, yes, no, value))
        self._first.append(len(self._code) - 1)
        self._near.append(len(self._code) - 1)
        return len(self._first) - 1

    def _distance(self, label: int) -> int:
        return len(self._code) - 1 - self._near[label]

    def _bring(self, label: int) -> None:
        """Have `label` in reach of a conditional jump, and of the two instructions that may still come before it."""
        if self._distance(label) > _REACH - 2:
            code, _, _, value = self._code[self._first[label]]
            if code == _RET_K:
                self._code.append((_RET_K, 0, 0, value))
            else:
                self._code.append((_JA, 0, 0, len(self._code) - 1 - self._first[label]))
            self._near[label] = len(self._code) - 1

    def _go(self, label: int) -> None:
        """Make `label` what the next one written falls through to."""
        distance = self._distance(label)
        if distance:
            self._code.append((_JA, 0, 0, distance))
