"""lumed: the Lume API for Linux hosts, on QEMU."""

__version__ = "0.1.0"
