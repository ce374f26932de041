"""The native kernels: NativeOps runs the verbs one by one, or records a whole step into one C call."""

from polyradix_cpu.native.kv import LayerKV, alloc_kv, copy_pages, export_pages, import_pages, kv_page_bytes
from polyradix_cpu.native.lib import Library, find_isa, load
from polyradix_cpu.native.ops import NativeOps
from polyradix_cpu.native.params import NativeWeight, pack
from polyradix_cpu.native.program import NativeMeta

__all__ = [
    "LayerKV",
    "Library",
    "NativeMeta",
    "NativeOps",
    "NativeWeight",
    "alloc_kv",
    "copy_pages",
    "export_pages",
    "find_isa",
    "import_pages",
    "kv_page_bytes",
    "load",
    "pack",
]
