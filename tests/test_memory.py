"""Memory as the system and its control groups tell of it."""

import pytest

from transformers_dsv3 import memory


MIB = 2**20


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Function from contents by path to a machine that has these files."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text))

    return write


PLAIN = {"proc/meminfo": f"MemTotal: {800 * 1024} kB\nMemAvailable: {500 * 1024} kB\nHugePages_Total: 0\n"}


def test_a_system_that_tells_nothing_has_no_limit(system):
    assert memory.meminfo() == {} and memory.total_memory() == memory.free_memory() == memory.UNLIMITED
    assert memory.resident_bytes() == {"now": None, "peak": None}


def test_without_control_groups(system):
    system(PLAIN | {"proc/self/status": "Name: a\nVmHWM:\t 30 kB\nVmRSS:\t 20 kB\n"})
    assert (memory.total_memory(), memory.free_memory()) == (800 * MIB, 500 * MIB)
    assert memory.resident_bytes() == {"now": 20 * 1024, "peak": 30 * 1024}


def test_the_closest_limit_of_nested_groups_counts(system):
    """The inner group has none, or a wider one than those around it, which hold others beside it."""
    inner, outer = "groups/pod/container/", "groups/pod/"
    system(PLAIN | {"proc/self/cgroup": "0::/pod/container\n", f"{inner}memory.max": "max\n"})
    assert memory.free_memory() == 500 * MIB
    system({f"{outer}memory.max": 300 * MIB, f"{outer}memory.current": 250 * MIB, f"{outer}memory.stat": "anon 1\n"})
    assert (memory.total_memory(), memory.free_memory()) == (300 * MIB, 50 * MIB)
    system({f"{outer}memory.stat": f"anon 1\ninactive_file {100 * MIB}\n"})  # of files that need not stay
    assert memory.free_memory() == 150 * MIB
    system({f"{inner}memory.max": 100 * MIB, f"{inner}memory.current": 120 * MIB, f"{inner}memory.stat": ""})
    assert (memory.total_memory(), memory.free_memory()) == (100 * MIB, 0)


def test_groups_of_version_1(system):
    system(PLAIN | {"proc/self/cgroup": "5:cpu:/docker/a\n4:memory,hugetlb:/docker/a\n1:name=systemd:/docker/a\n"})
    top = "groups/memory/"  # of the container alone, which sees itself at the top
    system({f"{top}memory.limit_in_bytes": 400 * MIB, f"{top}memory.usage_in_bytes": 350 * MIB})
    assert memory.total_memory() == 400 * MIB
    system({f"{top}memory.stat": f"inactive_file 1\ntotal_inactive_file {20 * MIB}\n"})
    assert memory.free_memory() == 70 * MIB
