"""CelebA: lists and photographs in the official formats, whole and spoiled, and the cache of decoded images."""

import os
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from vaecirc_fast.data import image_cache, load, memory, takes_root
from vaecirc_fast.data.celeba import CelebA
from vaecirc_fast.errors import InputError

NAMES = [f"Attribute_{k}" for k in range(40)]
N = 12
FILES = [f"{n + 1:06d}.jpg" for n in range(N)]
PARTS = [0] * 6 + [1] * 3 + [2] * 3


def values():
    """Both values of every attribute in every partition."""
    drawn = np.random.default_rng(0).choice([-1, 1], (N, 40))
    for start in (0, 6, 9):
        drawn[start], drawn[start + 1] = -1, 1
    return drawn


def photograph(n):
    """(218, 178, 3): smooth, so that a JPEG keeps it, and different for every n; the border is white."""
    y, x = np.mgrid[0:218, 0:178]
    pixels = np.stack([x + 5 * n, y + 3 * n, 0 * x + 20 * n], -1).clip(0, 255).astype(np.uint8)
    pixels[:30] = 255
    return pixels


def attribute_lines(rows=None, files=FILES):
    rows = values() if rows is None else rows
    return [f"{file} " + " ".join(f"{v:2d}" for v in row) for file, row in zip(files, rows, strict=True)]


def partition_lines(parts=PARTS, files=FILES):
    return [f"{file} {part}" for file, part in zip(files, parts, strict=True)]


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def official(root, attributes=None, partitions=None, images="img_align_celeba"):
    write(root / "list_attr_celeba.txt", attributes or [str(N), " ".join(NAMES) + " ", *attribute_lines()])
    write(root / "list_eval_partition.txt", partitions or partition_lines())
    (root / images).mkdir(parents=True)
    for n, file in enumerate(FILES):
        Image.fromarray(photograph(n)).save(root / images / file, quality=95)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return official(tmp_path_factory.mktemp("celeba"))


@pytest.fixture
def root(whole, tmp_path):
    """A copy to be spoiled."""
    return shutil.copytree(whole, tmp_path / "celeba")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vaecirc_fast"


def refused(root, message, **options):
    with pytest.raises(InputError, match=message) as caught:
        CelebA(root, **options)
    assert "\n" not in str(caught.value)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_photographs_are_cropped_and_resized(whole):
    data = load("celeba", root=whole)
    assert isinstance(data, CelebA) and takes_root("celeba") and not data.complete
    x = data.images(range(6))
    assert x.shape == (6, 3, 64, 64) and x.dtype == torch.float32 and data.shape == (3, 64, 64)
    assert 0 <= x.min() and x.max() <= 1
    # The middle 148 x 148 leaves 15 columns and 35 rows away: pixel (r, c) lies at 35 + 148 (r + .5) / 64 - .5.
    at = 148 * (torch.arange(64) + 0.5) / 64 - 0.5
    for n in range(6):
        expected = torch.stack([(15 + at + 5 * n).expand(64, 64), (35 + at + 3 * n)[:, None].expand(64, 64)])
        inside = x[n, :2] * 255
        assert (inside - expected)[:, 2:-2, 2:-2].abs().max() < 4  # of a JPEG
        assert (x[n, 2] * 255 - 20 * n).abs().max() < 6
    assert torch.equal(data.images([4, 0, 4])[1], x[0])


def test_factors_are_the_attributes(whole):
    data = CelebA(whole)
    assert data.factor_names == tuple(NAMES) and data.factor_sizes == (2,) * 40
    assert torch.equal(data.factors(range(6)), torch.from_numpy((values()[:6] + 1) // 2))
    x, v = data.sample(20, torch.Generator().manual_seed(0))
    assert x.shape == (20, 3, 64, 64) and v.shape == (20, 40) and v.dtype == torch.int64
    with pytest.raises(InputError, match="'celeba' do not determine the image"):
        data.index_of(v)
    with pytest.raises(InputError, match=r"\[0, 6\)"):
        data.images([6])


@pytest.mark.parametrize("partition, rows", [("train", (0, 6)), ("valid", (6, 9)), ("test", (9, 12)), ("all", (0, 12))])
def test_partitions(whole, partition, rows):
    data, all_of_it = CelebA(whole, partition=partition), CelebA(whole, partition="all")
    assert len(data) == rows[1] - rows[0]
    assert torch.equal(data.images(range(len(data))), all_of_it.images(range(*rows)))
    assert torch.equal(data.factors(range(len(data))), all_of_it.factors(range(*rows)))
    assert (data.contents == all_of_it.contents) == (partition == "all")


def test_the_forms_of_other_distributions(whole, root, tmp_path):
    expected = CelebA(whole).images(range(6))
    for name, header in (
        ("list_attr_celeba", ["image_id", *NAMES]),
        ("list_eval_partition", ["image_id", "partition"]),
    ):
        lines = [line.split() for line in (root / f"{name}.txt").read_text().splitlines()]
        lines = [header, *(lines[2:] if "attr" in name else lines)]
        write(root / f"{name}.csv", [",".join(line) for line in lines])
        (root / f"{name}.txt").unlink()
    (root / "img_align_celeba").rename(root / "inner")
    (root / "img_align_celeba").mkdir()
    (root / "inner").rename(root / "img_align_celeba" / "img_align_celeba")
    data = CelebA(str(root))
    assert torch.equal(data.images(range(6)), expected) and data.contents == CelebA(whole).contents
    apart = official(tmp_path / "apart", images="Img/img_align_celeba")
    for below, name in (("Anno", "list_attr_celeba.txt"), ("Eval", "list_eval_partition.txt")):
        (apart / below).mkdir()
        (apart / name).rename(apart / below / name)
    assert torch.equal(CelebA(apart).images(range(6)), expected)


def test_lists_may_have_their_own_order_and_more_photographs_may_lie_there(root):
    expected = CelebA(root).images(range(6))
    write(root / "list_eval_partition.txt", partition_lines()[::-1])
    Image.new("RGB", (3, 3)).save(root / "img_align_celeba" / "mine.jpg")
    assert torch.equal(CelebA(root).images(range(6)), expected)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_no_root_says_where_the_files_are():
    refused(None, "celeba: needs root, .*img_align_celeba/.*mmlab.*stand-in faces_like")


def test_bad_arguments(whole):
    refused(whole / "nowhere", "celeba: root: .*nowhere is no directory")
    refused(whole, "partition: expected 'train', 'valid', 'test' or 'all', got 'dev'", partition="dev")


@pytest.mark.parametrize(
    "name, message",
    [
        ("list_attr_celeba.txt", "no list_attr_celeba.txt or list_attr_celeba.csv in .*; expected it beside img_align"),
        ("list_eval_partition.txt", "no list_eval_partition.txt or list_eval_partition.csv in"),
        ("img_align_celeba", "no folder img_align_celeba/ of .jpg files in"),
        ("img_align_celeba/000003.jpg", r"000003.jpg is listed and not there \(1 of 6 images are missing\)"),
    ],
)
def test_what_is_missing_is_named(root, name, message):
    path = root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(root, "celeba: .*" + message)


def edited(**changes):
    """The lines of the attributes with some of them, counted from 1, replaced or, for None, left out."""
    lines = [str(N), " ".join(NAMES), *attribute_lines()]
    for key, text in changes.items():
        lines[int(key[1:]) - 1] = text
    return [line for line in lines if line is not None]


ROW = attribute_lines()[2]
ATTRIBUTES = {
    "count": (edited(_1="13"), "line 1: says 13 images, 12 follow"),
    "no count": (edited(_1=None), "line 1: expected the number of images, found 'Attribute_0 Attribute_1"),
    "empty": ([""], "line 1: expected the number of images, found ''"),
    "count alone": (["0"], "line 2: expected the names of 40 attributes, found 0"),
    "names": (edited(_2=" ".join(NAMES[:39])), "line 2: expected the names of 40 attributes, found 39"),
    "twice named": (edited(_2=" ".join([*NAMES[:39], NAMES[0]])), "line 2: an attribute is named twice"),
    "short row": (edited(_5=ROW[:-3]), "line 5: expected a file and 40 values, found 40 columns"),
    "long row": (edited(_5=ROW + " 1"), "line 5: expected a file and 40 values, found 42 columns"),
    "zero": (edited(_5=ROW[:-2] + " 0"), "line 5: Attribute_39 is '0', expected -1 or 1"),
    "word": (edited(_5=ROW[:-2] + " x"), "line 5: Attribute_39 is 'x', expected -1 or 1"),
    "twice listed": (edited(_5=attribute_lines()[3]), "line 6: 000004.jpg is listed twice"),
    "another file": (edited(_5="9.jpg" + ROW[10:]), "has 12 images and .*partition.txt 12: 9.jpg is in the first only"),
    "a row less": (edited(_1="11", _14=None), "partition.txt has 12 images and .*attr_celeba.txt 11: 000012.jpg is in"),
    "no row": (["0", " ".join(NAMES)], "lists no image"),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_faults_of_the_attributes_are_named(root, name):
    lines, message = ATTRIBUTES[name]
    write(root / "list_attr_celeba.txt", lines)
    refused(root, "celeba: .*" + message)


PARTITION = {
    "three columns": ([*partition_lines()[:4], "000005.jpg 0 0", *partition_lines()[5:]], "line 5: .* found 3 columns"),
    "fourth": (
        [*partition_lines()[:4], "000005.jpg 3", *partition_lines()[5:]],
        "line 5: partition is '3', expected 0, 1",
    ),
    "twice": ([*partition_lines()[:5], partition_lines()[4]], "line 6: 000005.jpg is listed twice"),
    "short": (partition_lines()[:-1], "attr_celeba.txt has 12 images and .*partition.txt 11: 000012.jpg is in"),
    "no training images": (partition_lines([1] * 6 + [2] * 6), r"partition 'train' \(0\) has no image"),
}


@pytest.mark.parametrize("name", PARTITION)
def test_faults_of_the_partition_are_named(root, name):
    lines, message = PARTITION[name]
    write(root / "list_eval_partition.txt", lines)
    refused(root, "celeba: .*" + message)


def test_a_missing_partition_counts_only_if_it_is_asked_for(root):
    write(root / "list_eval_partition.txt", partition_lines([0] * 6 + [1] * 6))
    assert len(CelebA(root)) == 6
    for partition in ("test", "all"):
        refused(root, r"partition 'test' \(2\) has no image", partition=partition)


def test_an_attribute_of_one_value_is_named(root):
    rows = values()
    rows[:6, 7] = -1
    write(root / "list_attr_celeba.txt", [str(N), " ".join(NAMES), *attribute_lines(rows)])
    refused(root, "Attribute_7 is -1 for all 6 images of partition 'train'; expected both -1 and 1")
    assert len(CelebA(root, partition="all")) == 12


def test_csv_faults_are_named(root):
    (root / "list_attr_celeba.txt").rename(root / "list_attr_celeba.csv")
    refused(root, "list_attr_celeba.csv, line 1: expected the names of 40 attributes, found 0")
    write(
        root / "list_attr_celeba.csv",
        [",".join(["image_id", *NAMES]), *(x.replace("  ", " ").replace(" ", ",") for x in attribute_lines())],
    )
    assert len(CelebA(root)) == 6
    write(root / "list_eval_partition.csv", ["image_id", *partition_lines()])
    (root / "list_eval_partition.txt").unlink()
    refused(root, "list_eval_partition.csv, line 1: expected the header image_id,partition, found 'image_id'")


def test_a_list_that_is_no_text(root):
    (root / "list_attr_celeba.txt").write_bytes(b"12\n\xff\xfe\x00")
    refused(root, "list_attr_celeba.txt is no text")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no image", "cannot identify"),
        (b"", "cannot identify"),
        ("small", "20 x 30 pixels, expected the aligned .* 178 x 218"),
    ],
)
def test_an_unreadable_photograph_is_named(root, cache, content, message):
    file = root / "img_align_celeba" / "000004.jpg"
    if content == "small":
        Image.new("RGB", (20, 30)).save(file)
    else:
        file.write_bytes(content)
    data = CelebA(root)
    with pytest.raises(InputError, match=f"celeba: .*000004.jpg is not a readable image .{message}.*; download the"):
        data.images([0])
    assert [p.suffix for p in cache.iterdir()] == [".lock"]  # nothing half done is left


# --- the cache --------------------------------------------------------------------------------------------------------


def cached(cache):
    return sorted(p.name for p in cache.glob("*.u8"))


def test_photographs_are_decoded_when_the_first_is_asked_for_and_once(root, cache, monkeypatch):
    data = CelebA(root)
    data.factors([0])
    assert not cache.exists()
    x = data.images([2])
    (name,) = cached(cache)
    assert (cache / name).stat().st_size == 6 * 3 * 64 * 64
    monkeypatch.setattr(CelebA, "_decode", None)
    assert torch.equal(CelebA(root).images([2]), x)
    os.utime(root / "img_align_celeba" / FILES[2], ns=(1, 1))
    with pytest.raises(TypeError):
        CelebA(root).images([2])  # it has changed: decoded anew


def test_a_changed_photograph_is_seen(root, cache):
    before = CelebA(root).images(range(6))
    Image.fromarray(photograph(11)).save(root / "img_align_celeba" / FILES[2], quality=95)
    after = CelebA(root).images(range(6))
    assert [n for n in range(6) if not torch.equal(before[n], after[n])] == [2] and len(cached(cache)) == 2


def test_a_cache_of_the_wrong_size_is_written_anew(root, cache):
    x = CelebA(root).images(range(6))
    (name,) = cached(cache)
    (cache / name).write_bytes(b"cut")
    assert torch.equal(CelebA(root).images(range(6)), x) and (cache / name).stat().st_size == 6 * 12288


def test_a_cache_that_cannot_be_written_is_read(root, cache):
    x = CelebA(root).images(range(6))
    (cache / cached(cache)[0]).chmod(0o400)
    cache.chmod(0o500)
    try:
        data = CelebA(root)
        assert torch.equal(data.images(range(6)), x) and isinstance(data._images, np.memmap)
    finally:
        cache.chmod(0o700)


@pytest.mark.parametrize("why", ["a file in its place", "a full disk"])
def test_without_a_cache_the_images_are_kept_in_memory(whole, root, cache, monkeypatch, why):
    expected = CelebA(whole, partition="all").images(range(6))
    shutil.rmtree(cache.parent)
    if why == "a full disk":
        full = shutil.disk_usage("/")._replace(free=12287)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    else:
        cache.parent.write_text("no directory")
    data = CelebA(root)
    assert torch.equal(data.images(range(6)), expected) and not isinstance(data._images, np.memmap)
    assert why != "a full disk" or cached(cache) == []
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(InputError, match="celeba needs 73.7 kB of memory, of which 1.0 kB are free; the cache"):
        CelebA(root).images([0])


def test_an_interruption_leaves_nothing_and_the_next_call_starts_over(root, cache, monkeypatch):
    decode = CelebA._decode

    def interrupted(self, n):
        if n == 4:
            raise KeyboardInterrupt
        return decode(self, n)

    data = CelebA(root)
    monkeypatch.setattr(CelebA, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.images([0])
    assert [p.suffix for p in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(CelebA, "_decode", decode)
    assert data.images([0]).shape == (1, 3, 64, 64) and len(cached(cache)) == 1


def test_of_two_writers_one_waits_for_the_other(cache):
    reads = []
    begun = threading.Event()

    def read(n):
        reads.append(n)
        begun.set()
        return np.full((2,), n % 256, np.uint8)

    results = []
    threads = [
        threading.Thread(target=lambda: results.append(image_cache.decoded("pair.u8", 700, (2,), read, "toy")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert begun.is_set() and sorted(reads) == list(range(700))
    for result in results:
        assert np.array_equal(result[:, 1], np.arange(700) % 256)


def test_progress_is_told(monkeypatch, capsys):
    monkeypatch.setattr(image_cache, "_FIRST_LINE", 0.0)
    monkeypatch.setattr(image_cache, "_NEXT_LINE", 0.0)
    image_cache.decoded("long.u8", 1200, (1,), lambda n: np.zeros(1, np.uint8), "toy")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"toy: decoding image 512 of 1,200, \d+\.\d min left", lines[0])


def test_the_cache_has_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert image_cache.directory() == tmp_path / ".cache" / "vaecirc_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(image_cache.directory()) == "/elsewhere/vaecirc_fast"
