# The program of a container's first process until the user's: performs tables of system calls, in order.
# hv/container/stub.py holds the assembled bytes and says why; tests/unit/test_container_stub.py assembles this file and
# compares. Two ways into the same loop: `_start`, as a program, and `launch`, called by
# the runtime, which gives what the new process does before it is one.
#
# Behind the code, 8 bytes aligned: the number of a descriptor, then rows of nine words:
#     number (low half); (high half) bit 8: it may fail
#     six arguments; bit 62 set, and 63 not: this is the address of the argument
#     (low half) the step's tag, (high half) what is done with the result:
#         1  it is a descriptor, for the reply from now on
#         2  it is a new process, which goes on with the next row; this one reports (tag, pid + 2^31) and ends
#         3  the same, but this one stays, as the first process of the container that reaps what others leave
#         4  it is how much was read; the address read (second argument) is where the rows go on. Nothing read: the end
#     0, or the address where the result is kept
# A row that fails ends it: 8 bytes (tag, errno) go to the descriptor, exit code 1.

        .intel_syntax noprefix
        .globl  _start, launch
        .macro  argument reg, at
        mov     \reg, [rbx + \at]
        mov     rax, \reg
        shr     rax, 62
        cmp     eax, 1
        jne     1f
        btr     \reg, 62
        mov     \reg, [\reg]
1:
        .endm

_start: lea     rbx, [rip + table]
        mov     r12, [rbx]
        add     rbx, 8
step:   argument rdi, 8
        argument rsi, 16
        argument rdx, 24
        argument r10, 32
        argument r8, 40
        argument r9, 48
        mov     eax, [rbx]
        syscall
        mov     rdx, [rbx + 64]
        test    rdx, rdx
        jz      1f
        mov     [rdx], rax
1:      test    rax, rax
        jns     done
        test    byte ptr [rbx + 5], 1
        jz      failed
next:   add     rbx, 72
        jmp     step
done:   mov     ecx, [rbx + 60]
        dec     ecx
        js      next
        cmovz   r12, rax
        jz      next
        mov     edi, 1
        cmp     ecx, 3
        je      further
        test    rax, rax
        jz      next                    # the new process
        dec     ecx
        jnz     reap
        bts     rax, 31                 # no error number
        jmp     report
further:
        test    rax, rax
        jz      end                     # the runtime has gone
        mov     rbx, [rbx + 16]
        mov     rbx, [rbx]
        jmp     step
failed: neg     rax
report: shl     rax, 32
        mov     edx, [rbx + 56]
        or      rax, rdx
        push    rax
        mov     edi, r12d
        mov     rsi, rsp
        mov     edx, 8
        mov     eax, 1
        syscall                         # write
        mov     edi, 1
end:    mov     eax, 231
        syscall                         # exit_group

# All signals are blocked (a row before did that) and read here: the program's are passed on to it.
reap:   mov     r13, rax
        mov     edi, r12d
        mov     eax, 3
        syscall                         # close: the program's exec is seen by that
        mov     edi, 3
        mov     esi, -1
        xor     edx, edx
        mov     eax, 436
        syscall                         # close_range: what the program was given is the program's alone
        sub     rsp, 144
wait:   mov     qword ptr [rsp], -1     # every signal
        mov     rdi, rsp
        lea     rsi, [rsp + 16]         # siginfo_t: number, errno, code
        xor     edx, edx
        mov     r10d, 8
        mov     eax, 128
        syscall                         # rt_sigtimedwait
        test    eax, eax
        jle     wait
        cmp     eax, 17                 # SIGCHLD
        je      look
        cmp     dword ptr [rsp + 24], 0x80      # SI_KERNEL: the terminal's, which the program has got as well
        je      wait
        mov     rdi, r13
        mov     esi, eax
        mov     eax, 62
        syscall                         # kill
        jmp     wait
look:   mov     rdi, -1
        mov     rsi, rsp
        mov     edx, 1                  # WNOHANG
        xor     r10d, r10d
        mov     eax, 61
        syscall                         # wait4
        test    eax, eax
        jle     wait
        cmp     rax, r13
        jne     look
        mov     eax, [rsp]
        movzx   edi, ah                 # WEXITSTATUS
        and     eax, 0x7f               # WTERMSIG
        jz      end
        lea     edi, [rax + 128]
        jmp     end

# long launch(words *rdi), called by the runtime: all signals blocked, words[2] is called with words[3] to [7], a clone
# with CLONE_VM and CLONE_VFORK: the new process does the rows from words[9] on with words[8] for the reply, on this
# stack, whose owner waits until the last of them, an exec, has given it a memory of its own.
launch: push    rbx
        push    r12
        mov     rbx, rdi
        mov     edi, 2                  # SIG_SETMASK: words[0] is the mask, words[1] keeps the old one
        mov     rsi, rbx
        lea     rdx, [rbx + 8]
        mov     r10d, 8
        mov     eax, 14
        syscall                         # rt_sigprocmask
        mov     rax, [rbx + 16]
        mov     rdi, [rbx + 24]
        mov     rsi, [rbx + 32]
        mov     rdx, [rbx + 40]
        mov     r10, [rbx + 48]
        mov     r8, [rbx + 56]
        syscall
        test    rax, rax
        jnz     1f
        mov     r12, [rbx + 64]
        add     rbx, 72
        jmp     step
1:      push    rax
        mov     edi, 2
        lea     rsi, [rbx + 8]
        xor     edx, edx
        mov     r10d, 8
        mov     eax, 14
        syscall
        pop     rax
        pop     r12
        pop     rbx
        ret
        .balign 8, 0xcc
table:
