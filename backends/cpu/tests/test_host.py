from __future__ import annotations

import pytest

from polyradix.backend.protocol import Memory
from polyradix_cpu import host

MIB = 2**20
MEMINFO = {"proc/meminfo": "MemTotal: 16384 kB\nMemFree: 1 kB\nMemAvailable: 8192 kB\n"}
FLAGS = "flags\t\t: fpu avx2 avx512f amx_tile"


@pytest.fixture
def machine(tmp_path):
    def make(files):
        for name, text in {
            "proc/meminfo": "MemTotal: 16384 kB\nMemFree: 1 kB\nMemAvailable: 8192 kB\n",
            **files,
        }.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def test_without_control_groups_the_machine_counts(machine):
    assert host.memory(machine({})) == Memory(free=8 * MIB, total=16 * MIB)


def test_the_tightest_of_nested_groups_counts_and_file_cache_is_free(machine):
    root = machine(
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": f"{6 * MIB}\n",
            "sys/fs/cgroup/a/memory.current": f"{4 * MIB}\n",
            "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {MIB}\nactive_file {MIB}\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
        }
    )
    assert host.memory(root) == Memory(free=4 * MIB, total=6 * MIB)


def test_version_1_groups(machine):
    root = machine(
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(5 * MIB),
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": str(7 * MIB),
        }
    )
    assert host.memory(root) == Memory(free=0, total=5 * MIB)


def test_without_proc_the_system_is_asked(tmp_path):
    memory = host.memory(tmp_path)
    assert 0 < memory.free < memory.total


def test_processor(machine):
    root = machine({"proc/cpuinfo": f"processor : 0\nmodel name\t: Some CPU\n{FLAGS}\n\nmodel name : B\n"})
    assert host.processor(root) == ("Some CPU", ("avx2", "avx512f", "amx_tile"))


def test_processor_of_another_kind(machine):
    root = machine({"proc/cpuinfo": "processor : 0\nFeatures : fp asimd\n"})
    name, sets = host.processor(root)
    assert name
    assert sets == ("asimd",)
