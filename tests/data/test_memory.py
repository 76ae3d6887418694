"""Free memory: what the machine and the control groups of either version leave, and the refusal."""

import math

import pytest

from vaecirc_fast.data import memory
from vaecirc_fast.errors import InputError


def group(folder, limit, used, inactive, version=2):
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")


def left(tmp_path, membership):
    (tmp_path / "self").write_text(membership)
    return min(memory._of_groups(tmp_path / "self", tmp_path / "mount"))


def test_this_machine_has_some():
    assert 2**20 < memory.free_bytes() < 2**50


def test_the_machine_s_own_number(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemFree: 5 kB\nMemAvailable:      123 kB\n")
    assert memory._of_machine(tmp_path / "meminfo") == 123 * 1024
    for text in ("", "MemAvailable:\n", "MemAvailable: many kB\n"):
        (tmp_path / "meminfo").write_text(text)
        assert math.isinf(memory._of_machine(tmp_path / "meminfo"))
    assert math.isinf(memory._of_machine(tmp_path / "none"))


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_above_counts(tmp_path, version):
    root = tmp_path / "mount" / ("memory" if version == 1 else ".")
    line = "4:memory:/a/b\n" if version == 1 else "0::/a/b\n"
    group(root / "a" / "b", 1000, 300, 100, version)
    assert left(tmp_path, f"7:cpu:/other\n{line}") == 800
    group(root / "a", 900, 400, 0, version)
    assert left(tmp_path, line) == 500
    group(root, 10**6, 10**6 + 5, 0, version)
    assert left(tmp_path, line) == 0
    group(root, "max", 5, 0, version)
    assert left(tmp_path, line) == 500


def test_a_container_whose_path_the_mount_does_not_have(tmp_path):
    group(tmp_path / "mount", 700, 200, 0)
    assert left(tmp_path, "0::/known/to/the/host/only\n") == 500


@pytest.mark.parametrize("membership", ["", "nonsense\n", "0::/\n", "3:cpuset,memory:/\n"])
def test_without_groups_there_is_no_limit(tmp_path, membership):
    assert math.isinf(left(tmp_path, membership))


def test_the_refusal_has_both_numbers(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3.14e9)
    memory.check(3.14e9, "toy", "buy more")
    with pytest.raises(InputError) as caught:
        memory.check(5.898e9, "shapes3d", "free some memory")
    assert str(caught.value) == "shapes3d needs 5.9 GB of memory, of which 3.1 GB are free; free some memory"
    with pytest.raises(InputError, match="GB of memory on cuda:0, of"):
        memory.check(5.898e9, "shapes3d", "free some memory", device="cuda:0")


def test_sizes_as_words():
    assert [memory.sized(n) for n in (0, 999, 1500, 2e6, 5.9e9)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "2.0 MB",
        "5.9 GB",
    ]
