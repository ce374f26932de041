import pytest

from polyradix.cache.pool import PagePool


def test_hands_out_every_page_but_scratch_once():
    pool = PagePool(8)
    pages = pool.alloc(3) + pool.alloc(4)
    assert sorted(pages) == [1, 2, 3, 4, 5, 6, 7]
    assert pool.available == 0


def test_a_short_pool_refuses_and_takes_nothing():
    pool = PagePool(4)
    with pytest.raises(MemoryError, match="4 pages wanted; 3 of 3 are free"):
        pool.alloc(4)
    assert pool.available == 3
    assert pool.alloc(0) == []
    assert pool.available == 3


@pytest.mark.parametrize("page", [0, -1, 4])
def test_refuses_pages_it_never_owned(page):
    with pytest.raises(ValueError, match=f"page {page} freed; expected 1 to 3"):
        PagePool(4).free([page])


def test_refuses_a_double_free():
    pool = PagePool(4)
    a, b = pool.alloc(2)
    pool.free([a])
    with pytest.raises(ValueError, match=f"page {a} freed twice"):
        pool.free([a])
    with pytest.raises(ValueError, match="freed twice"):
        pool.free([b, b])
    assert sorted(pool.free_pages()) == [1, 2, 3]


def test_needs_a_page_beside_scratch():
    with pytest.raises(ValueError, match="pages is 1"):
        PagePool(1)
