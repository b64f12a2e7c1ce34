"""The assembler: what jumps reach, at every distance around the limit."""

from __future__ import annotations

import pytest
from framework.seccomp import check_form, decode, interpret, seccomp_data

from hv.container.seccomp.bpf import JEQ, JGE, JGT, JSET, NR, Assembler, argument
from hv.errors import ConfigError


def run(program: bytes, nr: int = 0, args: tuple[int, ...] = ()) -> int:
    check_form(decode(program))
    return interpret(decode(program), seccomp_data(nr, 0, args))[0]


@pytest.mark.parametrize(("test", "true", "false"), [(JEQ, 7, 6), (JGT, 8, 7), (JGE, 7, 6), (JSET, 3, 8)])
def test_tests(test, true, false):
    code = Assembler()
    yes, no = code.ret(1), code.ret(2)
    program = code.finish(code.load(NR, code.jump(test, 7, yes, no)))
    assert (run(program, true), run(program, false)) == (1, 2)


def test_mask_and_halves():
    code = Assembler()
    yes, no = code.ret(1), code.ret(2)
    low = code.load(argument(3, False), code.mask(0xF0, code.jump(JEQ, 0x50, yes, no)))
    program = code.finish(code.load(argument(3, True), code.jump(JEQ, 9, low, no)))
    assert run(program, args=(0, 0, 0, 0x9_0000005F)) == 1
    assert run(program, args=(0, 0, 0, 0x9_0000006F)) == 2
    assert run(program, args=(0, 0, 0, 0x8_0000005F)) == 2


@pytest.mark.parametrize("gap", [*range(240, 270), 600])
@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("far", ["return", "block"])
def test_far_targets(gap, count, far):
    """A return, or a block, at every distance, jumped to from `count` places; the other branch is the next one."""
    code, block = _with_gap(gap)
    target = block if far == "block" else code.ret(1)
    label = code.ret(3)
    for number in range(100, 100 + count):
        label = code.load(NR, code.jump(JEQ, number, target, label))
    program = code.finish(label)
    for number in range(100, 100 + count):
        assert run(program, number, (5,)) == 1
        assert run(program, number, (6,)) == (2 if far == "block" else 1)
    assert run(program, 99) == 3


@pytest.mark.parametrize("gap", [*range(240, 270), 600])
def test_both_targets_far(gap):
    code, block = _with_gap(gap)
    program = code.finish(code.load(NR, code.jump(JEQ, 100, block, code.ret(2))))
    assert (run(program, 100, (5,)), run(program, 100, (6,)), run(program, 99)) == (1, 2, 2)
    code, block = _with_gap(gap)
    program = code.finish(code.load(NR, code.jump(JEQ, 100, code.ret(1), block)))
    assert (run(program, 100), run(program, 99, (5,)), run(program, 99, (6,))) == (1, 1, 2)


def _with_gap(gap: int) -> tuple[Assembler, int]:
    """A program with a block that asks for argument 0, then `gap` instructions that nothing reaches."""
    code = Assembler()
    block = code.load(argument(0, False), code.jump(JEQ, 5, code.ret(1), code.ret(2)))
    code.ret(3)
    for number in range(gap - 1):
        code.mask(number, len(code) - 1)
    return code, block


def test_copies_of_a_far_return_are_shared():
    code = Assembler()
    far = code.ret(1)
    label = code.ret(2)
    for number in range(1000):
        label = code.jump(JEQ, number, far, label)
    # one copy for some 250 jumps
    assert len(code) < 1000 + 2 + 8
    program = code.finish(code.load(NR, label))
    assert run(program, 999) == run(program, 0) == 1
    assert run(program, 1000) == 2


def test_the_same_target_twice_needs_no_jump():
    code = Assembler()
    answer = code.ret(1)
    assert code.jump(JEQ, 5, answer, answer) == answer
    assert len(code) == 1


def test_a_program_that_is_too_long_is_refused():
    code = Assembler()
    label, other = code.ret(1), code.ret(2)
    for number in range(4100):
        label = code.jump(JEQ, number, other, label)
    with pytest.raises(ConfigError, match="a filter of 41"):
        code.finish(label)
