# The last program before the user's: performs a table of system calls, in order. hv/container/stub.py holds the
# assembled bytes and says why; tests/unit/test_container_stub.py assembles this file and compares.
#
# Behind the code, 8 bytes aligned: the number of a descriptor, then rows of eight words:
#     number, six arguments, and (low half) the step's tag, (high half) what is done with the result:
#         1  it is a descriptor, for the reply from now on
#         2  it is a new process, which goes on with the next row; this one reports (tag, pid + 2^31) and ends
#         3  the same, but this one stays, as the first process of the container that reaps what others leave
# A row that fails ends it: 8 bytes (tag, errno) go to the descriptor, exit code 1.

        .intel_syntax noprefix
        .globl  _start
_start: lea     rbx, [rip + table]
        mov     r12, [rbx]
        add     rbx, 8
step:   mov     rax, [rbx]
        mov     rdi, [rbx + 8]
        mov     rsi, [rbx + 16]
        mov     rdx, [rbx + 24]
        mov     r10, [rbx + 32]
        mov     r8, [rbx + 40]
        mov     r9, [rbx + 48]
        syscall
        test    rax, rax
        js      failed
        mov     ecx, [rbx + 60]
        dec     ecx
        js      next
        cmovz   r12, rax
        jz      next
        test    rax, rax
        jz      next                    # the new process
        dec     ecx
        jnz     reap
        bts     rax, 31                 # no error number
        jmp     report
next:   add     rbx, 64
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
        .balign 8, 0xcc
table:
