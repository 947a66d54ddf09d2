# What KVM must be able to do before lumed trusts it, as firmware for an otherwise empty machine.
#
# The image is 64 KiB, mapped at 0xf0000; the processor starts it in real mode at its last
# 16 bytes, as it starts every firmware. After each step that worked, one letter goes to the
# debug console (port 0xe9); longmode.py names the steps. At the end the machine is reset, which
# ends QEMU with status 0 under -no-reboot.
#
# To build the bytes in longmode.py (binutils; tests/unit/test_longmode.py compares them):
#   as --64 longmode.S -o longmode.o && ld -Ttext=0xf0000 --oformat=binary longmode.o
#
# Memory: 0x1000 interrupt table, 0x8000 top of stack, 0x10000 page tables (2 MiB pages, 4 GiB).

        .set    UPPER, 0xffff800000000000       # kernels live in the upper half
        .set    IDT, 0x1000
        .set    STACK, 0x8000
        .set    PML4, 0x10000
        .set    PDPT, 0x11000
        .set    PD, 0x12000
        .set    HOLE, 0x400000                  # unmapped until the page fault
        .set    HOLE_ENTRY, PD + (HOLE >> 21) * 8
        .set    APIC, 0xfee00000
        .set    TIMER_VECTOR, 64

        .macro  say letter
        mov     $\letter, %al
        out     %al, $0xe9
        .endm

        .globl  _start
        .code16
_start: cli
        lgdtl   %cs:gdt_register - _start
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $0x08, $protected

        .code32
protected:
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $STACK, %esp
        say     'p'

        movl    $PDPT + 7, PML4                 # 7: present, writable, for ring 3 too
        movl    $PDPT + 7, PML4 + 256 * 8
        movl    $PD + 0x0007, PDPT
        movl    $PD + 0x1007, PDPT + 8
        movl    $PD + 0x2007, PDPT + 16
        movl    $PD + 0x3007, PDPT + 24
        mov     $PD, %edi
        mov     $0x87, %eax
1:      mov     %eax, (%edi)
        add     $8, %edi
        add     $0x200000, %eax
        jnc     1b
        movl    $0, HOLE_ENTRY

        mov     $0x20, %eax                     # CR4.PAE
        mov     %eax, %cr4
        mov     $PML4, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx               # EFER: LME, SCE
        rdmsr
        or      $0x101, %eax
        wrmsr
        mov     %cr0, %eax
        or      $0x80010000, %eax               # CR0: PG, WP
        mov     %eax, %cr0
        ljmp    $0x18, $long

        .code64
long:   movabs  $UPPER + upper, %rax
        jmp     *%rax
upper:  movabs  $UPPER + STACK, %rsp
        xor     %eax, %eax
        cpuid
        say     'l'

        mov     $20000000, %ecx
1:      dec     %ecx
        jnz     1b
        say     's'

        lea     page_fault(%rip), %rax
        mov     $IDT + 14 * 16, %edi
        call    set_gate
        lea     timer(%rip), %rax
        mov     $IDT + TIMER_VECTOR * 16, %edi
        call    set_gate
        lidt    idt_register(%rip)

        mov     $HOLE, %ebx
        movl    $0x5a, (%rbx)
        cmpl    $0x5a, (%rbx)
        jne     stop
        say     'f'

        mov     $0xff, %al                      # the old interrupt controllers stay silent
        out     %al, $0x21
        out     %al, $0xa1
        mov     $APIC, %ebx
        movl    $0x1ff, 0xf0(%rbx)              # local APIC on
        movl    $3, 0x3e0(%rbx)                 # timer: divide by 16, one shot
        movl    $TIMER_VECTOR, 0x320(%rbx)
        movl    $0x10000, 0x380(%rbx)           # about a millisecond
        xor     %ebp, %ebp
1:      sti
        hlt
        cli
        test    %ebp, %ebp
        jz      1b
        say     't'

        mov     $0xc0000081, %ecx               # STAR: ring 0 from 0x18, ring 3 from 0x20
        xor     %eax, %eax
        mov     $0x00200018, %edx
        wrmsr
        mov     $0xc0000082, %ecx               # LSTAR
        lea     from_user(%rip), %rax
        mov     %rax, %rdx
        shr     $32, %rdx
        wrmsr
        lea     user(%rip), %rcx
        mov     $2, %r11d                       # flags in ring 3: no interrupts
        sysretq
user:   syscall
from_user:
        mov     %cs, %eax
        cmp     $0x18, %eax
        jne     stop
        say     'u'

        mov     $0xcf9, %edx                    # the chipset's reset register
        mov     $6, %al
        out     %al, %dx
stop:   cli
        hlt
        jmp     stop

# Make the gate at rdi an interrupt gate to the handler at rax.
set_gate:
        mov     %ax, (%rdi)
        movl    $0x8e000018, 2(%rdi)
        shr     $16, %rax
        mov     %ax, 6(%rdi)
        shr     $16, %rax
        mov     %eax, 8(%rdi)
        ret

page_fault:
        movl    $0x87 + HOLE, HOLE_ENTRY
        add     $8, %rsp                        # the error code
        iretq

timer:  inc     %ebp
        movl    $0, 0xb0(%rbx)                  # end of interrupt
        iretq

# In ROM, so every descriptor is marked as accessed already.
        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff              # 08 ring 0 code, 32 bit
        .quad   0x00cf93000000ffff              # 10 ring 0 data
        .quad   0x00af9b000000ffff              # 18 ring 0 code, 64 bit
        .quad   0x00cf93000000ffff              # 20 ring 0 data, where syscall expects it
        .quad   0x00cff3000000ffff              # 28 ring 3 data
        .quad   0x00affb000000ffff              # 30 ring 3 code, 64 bit
gdt_register:
        .word   . - gdt - 1
        .long   gdt
idt_register:
        .word   0xfff
        .quad   UPPER + IDT
